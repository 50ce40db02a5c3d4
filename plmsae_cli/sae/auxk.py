"""AuxK, the loss that revives dead latents (Gao et al. 2024, arXiv 2406.04093, A.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.interface import Reduce
from plmsae_cli.sae.selection import top_k


def auxk_loss(
    model: Dictionary,
    x_BD: Tensor,
    error_BD: Tensor,
    dead_N: Tensor,
    k_aux: int,
    reduce: Reduce,
    fitted: bool,
) -> Tensor:
    """This rank's share of min(n_dead / k_aux, 1) * sum ||c ehat - e||^2 / sum ||e||^2 over the global batch.

    `error_BD` is e = x - xhat, taken as a constant; ehat = ReLU(TopK_k'(a over dead latents)) W_dec with
    k' = min(k_aux, n_dead), without b_dec, as e has none either. 0 where nothing is dead or e vanishes.

    Gao et al. have c = 1. With `fitted`, c is `fitted_length`: what is too long is fitted before it is compared. Where
    little error is left, many dead latents together overshoot it many times; c = 1 then teaches them above all to be
    silent, and they stay dead.
    """
    w_enc_CD: Tensor = model.w_enc_ND
    b_enc_C: Tensor = model.b_enc_N
    w_dec_CD: Tensor = model.w_dec_ND
    if not dead_N.is_cuda:  # on a GPU, picking rows would wait for their number: there a mask silences the living
        dead_C = dead_N.nonzero().squeeze(1)
        if dead_C.numel() == 0:
            return x_BD.new_zeros(())
        w_enc_CD, b_enc_C, w_dec_CD = w_enc_CD[dead_C], b_enc_C[dead_C], w_dec_CD[dead_C]

    # b_dec goes into the bias: its gradient then costs a matrix-vector product, not one with all tokens.
    acts_BC = F.linear(x_BD, w_enc_CD, b_enc_C - w_enc_CD @ model.b_dec_D).relu()
    if dead_N.is_cuda:
        acts_BC = acts_BC * dead_N
    if k_aux < acts_BC.shape[1]:
        chosen_BK = top_k(acts_BC.detach(), k_aux, ordered=False).indices_BK
        acts_BC = acts_BC * torch.zeros_like(acts_BC).scatter_(1, chosen_BK, 1.0)
    ehat_BD = acts_BC @ w_dec_CD

    error_BD = error_BD.detach()
    ehat = ehat_BD.detach()
    energy, along, length = reduce(
        torch.stack([error_BD.square().sum(), (ehat * error_BD).sum(), ehat.square().sum()])
    ).unbind()
    factor = fitted_length(along, length, energy) if fitted else 1.0
    misfit = (factor * ehat_BD - error_BD).square().sum() / torch.where(energy > 0, energy, 1.0)
    ramp = (dead_N.sum() / k_aux).clamp(max=1.0)
    return torch.where(energy > 0, ramp * misfit, 0.0)


def fitted_length(along: Tensor, length: Tensor, energy: Tensor) -> Tensor:
    """min(1, max(<ehat, e> / ||ehat||^2, ||e|| / (10 ||ehat||))) from these products over the batch, a constant.

    The least-squares factor, but never more than 1, nor so small that latents that point elsewhere learn nothing.
    """
    least = (energy / length).sqrt() / 10
    return torch.where(length > 0, torch.maximum(along / length, least), 1.0).clamp(max=1.0)
