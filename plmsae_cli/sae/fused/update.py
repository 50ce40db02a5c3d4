"""One pass over parameters and moments: clip, projection, Adam, renormalisation, and the bfloat16 copies."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from plmsae_cli.sae.fused.adam import Constants, Stored, update_flat, update_rows
from plmsae_cli.sae.fused.collect import FIGURES, PROGRAMS, Sums, collect, finish
from plmsae_cli.sae.fused.given import AdamOptions, Masters
from plmsae_cli.sae.ranks import Rows

PARAMETERS = ("w_enc_ND", "b_enc_N", "w_dec_ND", "b_dec_D")
"""In the order that numbers the salts of their moments' rounding; an architecture's own parameters follow."""
FLAT_TILE = 1024


class Update:
    """What `project_gradients`, `Optimizer.step` and `normalize_decoder` do, ages and figures included.

    Nothing but the ages changes where the gradient is not finite. `collect`, `finish`, then `apply`.
    """

    def __init__(self, masters: Masters, options: AdamOptions, rows: Rows, others: bool = True) -> None:
        """`others`: whether there are copies, ages and gradients of the other ranks' latents too.

        Parameters beyond the four of every dictionary are updated by their gradients in `own_gradients`.

        Of the matrices and b_enc, `masters` hold the latents in `rows`.
        """
        parameters = self._parameters = masters.parameters
        self._moments, self._options, self._rows = masters.moments, options, rows
        beta1, beta2 = options.betas
        self._constants = Constants(beta1, beta2, 1 - beta1, 1 - beta2, options.eps)
        d, device = len(parameters["b_dec_D"]), parameters["b_dec_D"].device
        self.rate = torch.zeros((), device=device)
        """The learning rate; fill it before a step."""
        self.figures = torch.zeros(len(FIGURES), device=device)
        """Those of `FIGURES`, as this rank's share of a sum over ranks."""
        self.partial = torch.zeros(PROGRAMS, 8, device=device)
        """What `finish` goes by: its sum over ranks."""
        self.own_gradients = {
            name: torch.zeros_like(tensor) for name, tensor in parameters.items() if name not in PARAMETERS
        }
        """float32; to be set before `collect`."""
        self.aux_weight = torch.zeros((), device=device)
        """What the auxiliary loss counts in the figure of the whole."""
        self._own_square = torch.zeros((), device=device)
        self._scalars = torch.zeros(5, device=device)
        self._grad_b_D = torch.zeros_like(parameters["b_dec_D"])
        self._first, self._num = (rows.first, rows.num_latents) if others else (0, rows.num)
        places = rows.padded * rows.world if others else rows.num
        self.whole = {
            name: torch.zeros(places, *shape, dtype=torch.bfloat16, device=device)
            for name, shape in (("w_enc_ND", (d,)), ("w_dec_ND", (d,)), ("b_enc_N", ()))
        }
        """The bfloat16 copies of all latents, and padding; `own` is this rank's part, with as much padding as any."""
        self.own = {name: tensor[rows.places] if others else tensor for name, tensor in self.whole.items()}
        self.w_enc_ND, self.w_dec_ND, self.b_enc_N = (tensor[: self._num] for tensor in self.whole.values())
        self.copy_parameters()

    def copy_parameters(self) -> None:
        """Renew this rank's part of the copies after the parameters were changed from outside."""
        for name, tensor in self.own.items():
            tensor[: self._rows.num].copy_(self._parameters[name])

    def collect(self, sums: Sums, ages_N: Tensor, window: int, global_rows: int, with_centre: bool) -> None:
        """Add up what the norm and the figures are made of, as `partial`; move `ages_N` on.

        `with_centre`: count the gradient of b_dec, which all ranks hold whole.
        """
        if self.own_gradients:
            squares = [gradient.square().sum() for gradient in self.own_gradients.values()]
            torch.sum(torch.stack(squares), 0, out=self._own_square)
        collect[(PROGRAMS,)](
            sums,
            ages_N,
            self._grad_b_D,
            self._own_square,
            self.partial,
            self._num,
            self._first,
            self._rows.num,
            sums.energy_2B.shape[1],
            len(self._grad_b_D),
            window,
            global_rows,
            int(with_centre),
            len(sums.square_SP),
            len(sums.grad_b_SD),
            256,
        )

    def finish(self, groups: int, global_rows: int, world: int) -> None:
        """The norm, what Adam needs of it, and the figures, from `partial` over all ranks."""
        beta1, beta2 = self._options.betas
        max_norm = self._options.max_norm
        share, d = 1.0 / world, len(self._grad_b_D)
        finish[(1,)](
            self.partial,
            self.rate,
            *(self._moments[f"{name}.step"] for name in PARAMETERS),
            self._scalars,
            self.figures,
            max_norm or 0.0,
            -math.log(beta1) if beta1 else math.inf,
            -math.log(beta2) if beta2 else math.inf,
            share / (groups * global_rows * d),
            share / global_rows,
            share / self._rows.num_latents,
            share,
            self.aux_weight,
            share * d,
            max_norm is not None,
            PROGRAMS,
        )

    def apply(
        self,
        touched_P: Tensor,
        grad_enc_PD: Tensor,
        grad_dec_PD: Tensor,
        grad_b_P: Tensor,
        decoder: bool = True,
        encoder: bool = True,
    ) -> None:
        """Update this rank's latents of one matrix or of both, b_enc with the encoder, b_dec with the decoder."""
        n, d = self._rows.num, len(self._grad_b_D)
        tile = triton.next_power_of_2(d)
        update_rows[(n + 1,)](
            touched_P,
            self._stored("w_enc_ND", grad_enc_PD),
            self._stored("w_dec_ND", grad_dec_PD),
            self._stored("b_enc_N", grad_b_P),
            self._stored("b_dec_D", self._grad_b_D),
            self._scalars,
            self._constants,
            self._rows.first,
            n,
            d,
            decoder,
            encoder,
            tile,
            num_warps=max(1, min(16, tile // 2048)),
        )
        for place, (name, gradient) in enumerate(self.own_gradients.items(), start=len(PARAMETERS)):
            self._moments[f"{name}.step"].copy_(self._moments["b_dec_D.step"])
            size = gradient.numel()
            update_flat[(triton.cdiv(size, FLAT_TILE),)](
                self._stored(name, gradient), self._scalars, self._constants, size, 2 * place, FLAT_TILE
            )

    def _stored(self, name: str, gradient: Tensor) -> Stored:
        average, square = (self._moments[f"{name}.{what}"] for what in ("exp_avg", "exp_avg_sq"))
        return Stored(self._parameters[name], average, square, gradient, self.own.get(name))
