"""The whole training step of TopK and Matryoshka on CUDA, replayed as one graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plmsae_cli.sae.fused.aux import AuxK, DeadBound
from plmsae_cli.sae.fused.gradients import WeightGradients
from plmsae_cli.sae.fused.residual import centre, residuals
from plmsae_cli.sae.fused.top_k import TopKEncoder
from plmsae_cli.sae.fused.update import Moments, Update
from plmsae_cli.sae.interface import Reduce
from plmsae_cli.sae.matryoshka import MatryoshkaTopK
from plmsae_cli.sae.topk import TopK


@dataclass(frozen=True)
class StepOptions:
    """What a step needs to know besides the dictionary."""

    rows: int
    """Tokens of a step on this rank."""
    world: int
    mean_D: Tensor
    scale: float
    """The input is (raw - mean) * scale."""
    window: int
    """Global tokens without firing after which a latent is dead."""
    betas: tuple[float, float]
    eps: float
    max_norm: float | None


class FusedStep:
    """One optimiser step a call, without waiting for the device; all state lives in the tensors it is given.

    Args:
        model: its parameters, float32, are the masters and are updated in place.
        moments: Adam's state of each parameter by name, updated in place.
        steps: Adam's number of steps, 0-dim float32, updated in place.
        ages_N: global tokens since each latent fired, int64, updated in place.
        options: see `StepOptions`.
        reduce: sums over ranks, in place.
    """

    def __init__(
        self,
        model: TopK,
        moments: Mapping[str, Moments],
        steps: Tensor,
        ages_N: Tensor,
        options: StepOptions,
        reduce: Reduce,
    ) -> None:
        device, n, d, rows = ages_N.device, model.num_latents, model.d, options.rows
        self._model, self._options, self._reduce, self._ages_N = model, options, reduce, ages_N
        self._global_rows = rows * options.world
        last = torch.tensor([n], device=device)
        prefixes_G = model.prefixes_G if isinstance(model, MatryoshkaTopK) else last
        self._groups = len(prefixes_G)
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        self._update = Update(parameters, dict(moments), steps, options.betas, options.eps, options.max_norm)
        self._encode = TopKEncoder(rows, n, model.k, device)
        self._gradients = WeightGradients(
            rows, n, d, model.k, prefixes_G.to(torch.int32), device, write_zeros=options.world > 1
        )
        self._aux = AuxK(model.k_aux, model.aux_coefficient) if model.aux_coefficient else None
        self.dead_bound = DeadBound(ages_N, options.window, self._global_rows)
        self._x_BD = torch.empty(rows, d, dtype=torch.bfloat16, device=device)
        self._residual_BGD = torch.empty(rows, self._groups, d, dtype=torch.bfloat16, device=device)
        self._slope_BK = torch.empty(rows, model.k, device=device)
        self._energy_2B = torch.empty(2, rows, device=device)
        self._square_B = torch.empty(rows, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, dict[str, Tensor]] | None] = {}
        self._pool: Any = None

    def copy_parameters(self) -> None:
        """To be called after the parameters were set from outside."""
        self._update.copy_parameters()

    def __call__(self, raw_BD: Tensor, step: int, rate: float) -> dict[str, Tensor]:
        """Train on this rank's raw rows. Figures are shares of a sum over ranks, valid until the next call."""
        options = self._options
        centre(raw_BD, options.mean_D, options.scale, self._model.b_dec_D, self._x_BD, self._square_B)
        self._update.rate.fill_(rate)
        places = self.dead_bound.places(step) if self._aux is not None else 0
        if not raw_BD.is_cuda:
            return self._run(places)
        if places not in self._graphs:  # the first such step compiles kernels and lets libraries choose
            self._graphs[places] = None
            return self._run(places)
        captured = self._graphs[places]
        if captured is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                figures = self._run(places)
            self._pool = self._pool or graph.pool()  # type: ignore[no-untyped-call]
            captured = self._graphs[places] = (graph, figures)
        graph, figures = captured
        graph.replay()
        return figures

    @torch.no_grad()
    def _run(self, places: int) -> dict[str, Tensor]:
        options, grads, d = self._options, self._gradients, self._model.d
        x_BD, residual_BGD, update = self._x_BD, self._residual_BGD, self._update
        self._encode(x_BD, update.w_enc_ND, update.b_enc_N)
        acts_BK, indices_BK = self._encode.acts_BK, self._encode.indices_BK
        residuals(
            x_BD,
            update.w_dec_ND,
            acts_BK,
            indices_BK,
            grads.prefixes_G,
            residual_BGD,
            self._slope_BK,
            self._energy_2B,
        )
        # In the order nested error, full error, ||x||^2.
        sums = torch.cat([self._energy_2B.sum(1), self._square_B.sum(0, keepdim=True)])
        if options.world > 1 and places:
            self._reduce(sums)
        factor = -2.0 / (self._groups * self._global_rows * d)
        grads(x_BD, residual_BGD, acts_BK, indices_BK, self._slope_BK, factor)
        dead_N = self._ages_N >= options.window
        aux = x_BD.new_zeros((), dtype=torch.float32)
        if places:
            assert self._aux is not None
            aux = self._aux(
                dead_N,
                places,
                x_BD,
                residual_BGD[:, -1],
                sums[1],
                update.w_enc_ND,
                update.b_enc_N,
                update.w_dec_ND,
                grads,
            )
        grad_b_D = residual_BGD[:, 0].sum(0, dtype=torch.float32).mul_(factor)
        grad_b_D -= grads.through_encoder_bias(update.w_enc_ND)
        counts_N, touched_N, grad_b_N, along_N = grads.counts_N, grads.touched_N, grads.grad_b_N, grads.along_N
        if options.world == 1:
            squares = grads.square_SN.sum()
        else:
            parts = [grad_b_D, grad_b_N, along_N, counts_N.float(), aux.view(1)]
            if not places:
                parts.append(sums)
            flat = self._reduce(torch.cat(parts))
            grad_b_D, grad_b_N, along_N, count_N, aux, *rest = flat.split([len(part) for part in parts])
            sums, aux = rest[0] if rest else sums, aux[0]
            self._reduce(grads.grad_2ND)
            squares = torch.linalg.vector_norm(grads.grad_2ND, dtype=torch.float32).square()
            counts_N = touched_N = count_N.int()
            touched_N = torch.ones_like(touched_N)
        # Without its part along the decoder row, a gradient is that much shorter.
        squares = squares - along_N.dot(along_N) + grad_b_N.dot(grad_b_N) + grad_b_D.dot(grad_b_D)
        update(squares, touched_N, grads.grad_enc_ND, grads.grad_dec_ND, grad_b_N, grad_b_D)
        self._ages_N.add_(self._global_rows).masked_fill_(counts_N > 0, 0)
        share = 1.0 / options.world
        reconstruction = sums[0] * (share / (self._groups * self._global_rows * d))
        aux = aux * share
        return {
            "loss": reconstruction + self._model.aux_coefficient * aux,
            "reconstruction": reconstruction,
            "aux": aux,
            "fvu": sums[1] / sums[2] * share,
            "l0": counts_N.sum() * (share / self._global_rows),
            "dead": dead_N.float().mean() * share,
            "grad_norm": update.norm * share,
        }
