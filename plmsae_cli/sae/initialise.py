"""Where training starts: random unit rows, a tied encoder, and the decoder's bias at the data's centre."""

from __future__ import annotations

import torch
from torch import Tensor

from plmsae_cli.sae.dictionary import Dictionary


@torch.no_grad()
def initialise(model: Dictionary, seed: int, sample_MD: Tensor) -> None:
    """Unit random decoder rows, W_enc = W_dec, b_enc = 0, b_dec = geometric median of `sample_MD`, in place.

    Random numbers are drawn on the CPU, so that a seed means the same weights on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    rows_ND = torch.randn(model.num_latents, model.d, generator=generator)
    rows_ND /= torch.linalg.vector_norm(rows_ND, dim=1, keepdim=True)
    model.w_dec_ND.copy_(rows_ND)
    model.w_enc_ND.copy_(rows_ND)
    model.b_enc_N.zero_()
    model.b_dec_D.copy_(geometric_median(sample_MD))
    model.start_(generator)


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
