"""Where training starts: unit rows, a tied encoder of the right length, and the decoder's bias at the data's centre."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from plmsae_cli.sae.dictionary import Dictionary

Start = Literal["auto", "random", "fitted", "data"]
SILENT = 0.01
"""Share of latents without a win in the sample from which `auto` keeps W_enc = W_dec."""

_TILE = 4096  # rows of the sample encoded at once


@torch.no_grad()
def initialise(model: Dictionary, seed: int, sample_MD: Tensor, start: Start = "auto") -> None:
    """Unit decoder rows, W_enc = s W_dec, b_enc = 0, b_dec = geometric median of `sample_MD`, in place.

    Rows are random directions, or with `start` "data" those of x - b_dec for different rows x of the sample; where
    it has fewer than there are latents, the rest is random. s is that of `survey` ("fitted", "data") or 1 ("random").
    Random numbers are drawn on the CPU, so that a seed means the same rows on every device.

    At s = 1 the k rows of a token overlap and overshoot, which costs the first steps; but it pushes back the latents
    that win most often, so that others come to life. "auto" fits s where nearly every latent wins somewhere anyway.
    """
    generator = torch.Generator().manual_seed(seed)
    rows_ND = torch.randn(model.num_latents, model.d, generator=generator)
    model.b_dec_D.copy_(geometric_median(sample_MD))
    if start == "data":
        chosen_C = torch.randperm(len(sample_MD), generator=generator)[: model.num_latents]
        residuals_CD = (sample_MD[chosen_C.to(sample_MD.device)] - model.b_dec_D).cpu()
        norm_C1 = torch.linalg.vector_norm(residuals_CD, dim=1, keepdim=True)
        rows_ND[: len(chosen_C)] = torch.where(norm_C1 > 0, residuals_CD, rows_ND[: len(chosen_C)])
    rows_ND /= torch.linalg.vector_norm(rows_ND, dim=1, keepdim=True)
    model.w_dec_ND.copy_(rows_ND)
    model.w_enc_ND.copy_(rows_ND)
    model.b_enc_N.zero_()
    model.start_(generator)
    if start != "random":
        scale, silent = survey(model, sample_MD)
        if start != "auto" or silent < SILENT:
            model.w_enc_ND.mul_(scale)


@torch.no_grad()
def survey(model: Dictionary, sample_MD: Tensor) -> tuple[float, float]:
    """The factor s of W_enc at which the squared error of the sample is least, and the share of latents never active.

    While b_enc = 0, the k active latents do not depend on s > 0 and the reconstruction is b_dec + s r, so that
    s = sum <x - b_dec, r> / sum ||r||^2 (least squares). (1, 0) where a threshold selects, or nothing is active.
    """
    along = energy = sample_MD.new_zeros(())
    fired_N = torch.zeros(model.num_latents, dtype=torch.bool, device=sample_MD.device)
    for x_BD in torch.split(sample_MD, _TILE):
        latents = model.start_latents(x_BD)
        if latents is None:
            return 1.0, 0.0
        r_BD = model.decode(latents) - model.b_dec_D
        along = along + torch.linalg.vecdot(x_BD - model.b_dec_D, r_BD).sum()
        energy = energy + r_BD.square().sum()
        fired_N[latents.indices_BK[latents.acts_BK > 0]] = True
    if not energy > 0:
        return 1.0, 0.0
    return float(along / energy), 1.0 - float(fired_N.float().mean())


@torch.no_grad()
def geometric_median(x_MD: Tensor, tolerance: float = 1e-6, iterations: int = 1000) -> Tensor:
    """The point whose summed Euclidean distance to the rows of `x_MD` is least, [D].

    Weiszfeld's iteration from the mean, with the step of Vardi and Zhang (2000, PNAS 97:1423) where the
    iterate meets a row. Ends when a step is shorter than `tolerance` times the mean distance, or after
    `iterations`.
    """
    point_D = x_MD.mean(0)
    for _ in range(iterations):
        distance_M = torch.linalg.vector_norm(x_MD - point_D, dim=1)
        apart_M = distance_M > torch.finfo(x_MD.dtype).eps * distance_M.mean()
        weights_M = torch.where(apart_M, 1 / distance_M, 0.0)
        if not apart_M.any():
            break
        target_D = weights_M @ x_MD / weights_M.sum()
        # Rows that coincide with the point, up to rounding, hold it back with a force of 1 each.
        pull = torch.linalg.vector_norm(weights_M @ (x_MD - point_D))
        held = (~apart_M).sum()
        share = torch.where(held > 0, (held / pull).clamp(max=1.0), 0.0)
        step_D = (1 - share) * (target_D - point_D)
        point_D = point_D + step_D
        if torch.linalg.vector_norm(step_D) <= tolerance * distance_M.mean():
            break
    return point_D
