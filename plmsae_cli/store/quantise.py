"""Rows in eight bits: d + 2 bytes a row.

Each dimension is standardised by a mean and a deviation that were frozen before the first row was stored, then each row is
divided by its own largest magnitude / 127, which is kept as a half-precision number in the row's last two bytes:

    z = (x - mean) / deviation,  s = max |z| / 127,  q = round(z / s),  x' = q s deviation + mean

With outlier dimensions brought to the size of the others, the error is that of 127 levels of a row without outliers; a plain
scale a row gives every dimension the step of the largest one. R: rows. D: dimensions. W: D + 2 bytes.
"""

from __future__ import annotations

import torch

from plmsae_cli.store.fs import FileRecord, Store
from plmsae_cli.store.tensorfile import TensorFile, write_tensors

CALIBRATION = "calibration.safetensors"
"""The frozen numbers, beside the rows: `mean` and `deviation` [D], float32, and `count` [1], the rows they are from."""
SCALE_BYTES = 2
_BLOCK_ROWS = 16_384
_LEVELS = 127
_SMALLEST_SCALE = 2.0**-24
"""The smallest half-precision number above 0."""


class Quantiser:
    """Encodes and decodes rows under frozen means and deviations.

    Args:
        mean_D, deviation_D: float32; a dimension whose deviation is 0 was constant and is given its own size.
    """

    def __init__(self, mean_D: torch.Tensor, deviation_D: torch.Tensor, count: int = 0) -> None:
        self.mean_D = mean_D.float()
        self.deviation_D = torch.where(deviation_D > 0, deviation_D, torch.ones_like(deviation_D)).float()
        self.count = count

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return self.mean_D.numel() + SCALE_BYTES

    def encode(self, rows_RD: torch.Tensor) -> torch.Tensor:
        """Rows of any float type -> int8 [R, D + 2]. Numbers that are not finite make a row that decodes to NaN."""
        out_RW = torch.empty(len(rows_RD), self.width, dtype=torch.int8, device=rows_RD.device)
        d = rows_RD.shape[1]
        for start in range(0, len(rows_RD), _BLOCK_ROWS):
            block_RW = out_RW[start : start + _BLOCK_ROWS]
            z_RD = (rows_RD[start : start + _BLOCK_ROWS].float() - self.mean_D).div_(self.deviation_D)
            largest_R1 = z_RD.abs().amax(1, keepdim=True)
            scale_R1 = (largest_R1 / _LEVELS).clamp(min=_SMALLEST_SCALE).to(torch.float16)
            # The largest is not beyond 127 levels of the rounded scale by more than half a step.
            codes_RD = z_RD.div_(scale_R1.float()).round_().clamp_(-_LEVELS, _LEVELS)
            block_RW[:, :d] = codes_RD.nan_to_num_(0.0).to(torch.int8)
            block_RW[:, d:] = scale_R1.view(torch.int8)
        return out_RW

    def decode(self, rows_RW: torch.Tensor) -> torch.Tensor:
        """int8 [R, D + 2] -> float32 [R, D], on the rows' device, where this quantiser must be."""
        d = self.mean_D.numel()
        # A copy even where the two bytes lie alone: they may begin at an odd address.
        scale_R1 = rows_RW[:, d:].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
        return torch.addcmul(self.mean_D, rows_RW[:, :d].float().mul_(scale_R1), self.deviation_D)

    def folded(self, mean_D: torch.Tensor, scale: float) -> Quantiser:
        """One whose `decode` gives (x - mean) * scale: decoding and a model's normalisation in one step."""
        return Quantiser((self.mean_D - mean_D.to(self.mean_D.device)) * scale, self.deviation_D * scale, self.count)

    def to(self, device: torch.device | str) -> Quantiser:
        return Quantiser(self.mean_D.to(device), self.deviation_D.to(device), self.count)

    def write(self, store: Store, path: str) -> FileRecord:
        tensors = {"mean": self.mean_D, "deviation": self.deviation_D, "count": torch.tensor([self.count])}
        return write_tensors(store, path, tensors)

    @classmethod
    def read(cls, store: Store, path: str) -> Quantiser:
        file = TensorFile(store, path)
        return cls(file.read("mean"), file.read("deviation"), int(file.read("count")))
