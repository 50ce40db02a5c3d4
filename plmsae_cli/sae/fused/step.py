"""The whole training step of TopK, BatchTopK and Matryoshka on CUDA, replayed as one graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plmsae_cli.sae.batch_topk import BatchTopK
from plmsae_cli.sae.fused.aux import AuxK, DeadBound
from plmsae_cli.sae.fused.batch_top_k import BatchTopKEncoder
from plmsae_cli.sae.fused.collect import FIGURES
from plmsae_cli.sae.fused.gradients import WeightGradients
from plmsae_cli.sae.fused.residual import centre, residuals
from plmsae_cli.sae.fused.top_k import TopKEncoder
from plmsae_cli.sae.fused.update import AdamOptions, Update
from plmsae_cli.sae.interface import Reduce
from plmsae_cli.sae.matryoshka import MatryoshkaBatchTopK, MatryoshkaTopK
from plmsae_cli.sae.topk import TopK


@dataclass(frozen=True)
class Batch:
    """The constants of every batch."""

    rows: int
    """Tokens of a step on this rank."""
    world: int
    mean_D: Tensor
    scale: float
    """The input is (raw - mean) * scale."""
    window: int
    """Global tokens without firing after which a latent is dead."""


class FusedStep:
    """One optimiser step a call, without waiting for the device; all state lives in the tensors it is given.

    Args:
        model: its parameters, float32, are the masters and are updated in place.
        state: Adam's state, `<parameter>.<step | exp_avg | exp_avg_sq>`, updated in place; see `Update`.
        ages_N: global tokens since each latent fired, int64, updated in place.
        batch, adam: constants.
        reduce: sums over ranks, in place.
    """

    def __init__(
        self,
        model: TopK,
        state: Mapping[str, Tensor],
        ages_N: Tensor,
        batch: Batch,
        adam: AdamOptions,
        reduce: Reduce,
    ) -> None:
        device, n, d, rows = ages_N.device, model.num_latents, model.d, batch.rows
        self._model, self._batch, self._reduce, self._ages_N = model, batch, reduce, ages_N
        self._global_rows = rows * batch.world
        prefixes_G = torch.tensor([n], device=device)
        if isinstance(model, MatryoshkaTopK | MatryoshkaBatchTopK):
            prefixes_G = model.prefixes_G
        self._groups = len(prefixes_G)
        self._update = Update({name: p.detach() for name, p in model.named_parameters()}, state, adam)
        self._encode = (
            BatchTopKEncoder(rows, n, model.k, device, batch.world, model.first_row, reduce)
            if isinstance(model, BatchTopK)
            else TopKEncoder(rows, n, model.k, device)
        )
        places = len(self._encode.pairs.acts_P)
        self._gradients = WeightGradients(rows, n, d, places, prefixes_G.int(), device, write_zeros=batch.world > 1)
        self._aux = (
            AuxK(model.k_aux, model.aux_coefficient, model.aux_fitted, reduce) if model.aux_coefficient else None
        )
        self.dead_bound = DeadBound(ages_N, batch.window, self._global_rows)
        self._x_BD = torch.empty(rows, d, dtype=torch.bfloat16, device=device)
        self._residual_BGD = torch.empty(rows, self._groups, d, dtype=torch.bfloat16, device=device)
        self._slope_P = torch.zeros(places, device=device)
        self._energy_2B = torch.empty(2, rows, device=device)
        self._square_B = torch.empty(rows, device=device)
        self._l0_std = torch.zeros((), device=device)
        self._no_aux = torch.zeros((), device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self._pool: Any = None

    def copy_parameters(self) -> None:
        """To be called after the parameters were set from outside."""
        self._update.copy_parameters()

    def __call__(self, raw_BD: Tensor, step: int, rate: float) -> dict[str, Tensor]:
        """Train on this rank's raw rows. Figures are shares of a sum over ranks, valid until the next call."""
        batch = self._batch
        centre(raw_BD, batch.mean_D, batch.scale, self._model.b_dec_D, self._x_BD, self._square_B)
        self._update.rate.fill_(rate)
        self._replay(self.dead_bound.places(step) if self._aux is not None else 0)
        figures = dict(zip(FIGURES, self._update.figures.unbind(), strict=True))
        return figures if self._encode.pairs.offsets_B1 is None else figures | {"l0_std": self._l0_std}

    def _replay(self, places: int) -> None:
        # The first such step compiles kernels and lets libraries choose. Ranks launch every step: a communicator cannot be
        # closed while a graph holds its calls.
        if places not in self._graphs or not self._x_BD.is_cuda or self._batch.world > 1:
            self._graphs[places] = None
            self._run(places)
            return
        graph = self._graphs[places]
        if graph is None:
            # The number of dead grows in steps: graphs of smaller numbers give their memory back.
            self._graphs = {size: g for size, g in self._graphs.items() if size == 0 or size >= places}
            graph = self._graphs[places] = torch.cuda.CUDAGraph()
            # Other threads (the loader, NCCL) go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._run(places)
            self._pool = self._pool or graph.pool()
        graph.replay()

    @torch.no_grad()
    def _run(self, places: int) -> None:
        batch, grads, update, encode = self._batch, self._gradients, self._update, self._encode
        x_BD, residual_BGD, energy_2B, square_B = self._x_BD, self._residual_BGD, self._energy_2B, self._square_B
        encode(x_BD, update.w_enc_ND, update.b_enc_N)
        if isinstance(self._model, BatchTopK):
            assert isinstance(encode, BatchTopKEncoder)
            self._model.follow(encode.smallest)
        residuals(x_BD, update.w_dec_ND, encode.pairs, grads.prefixes_G, residual_BGD, self._slope_P, energy_2B)
        factor = -2.0 / (self._groups * self._global_rows * self._model.d)
        grads(x_BD, residual_BGD, encode.pairs, self._slope_P, factor)
        if batch.world > 1:
            sums_3 = self._reduce(torch.stack([*energy_2B.sum(1), square_B.sum()]))
            energy_2B, square_B = sums_3[:2, None], sums_3[2:]
        aux = self._no_aux
        if self._aux is not None and places:
            dead_N = self._ages_N >= batch.window
            error_BD, weights = residual_BGD[:, -1], (update.w_enc_ND, update.b_enc_N, update.w_dec_ND)
            aux = self._aux(dead_N, places, x_BD, error_BD, energy_2B[1].sum(), *weights, grads)
        grads.of_decoder_bias(residual_BGD, update.w_enc_ND, factor)
        if batch.world > 1:
            aux = self._sum_over_ranks(aux)
        update(
            grads,
            self._ages_N,
            batch.window,
            energy_2B,
            square_B,
            aux,
            self._model.aux_coefficient,
            self._groups,
            self._global_rows,
            batch.world,
        )
        if encode.pairs.offsets_B1 is not None:
            active_B = encode.pairs.offsets_B1.diff().double()
            mean, square = (
                self._reduce(torch.stack([active_B.sum(), active_B.square().sum()])) / self._global_rows
            ).unbind()
            self._l0_std.copy_((square - mean.square()).clamp(min=0.0).sqrt() / batch.world)

    def _sum_over_ranks(self, aux: Tensor) -> Tensor:
        grads = self._gradients
        small = (grads.grad_b_SD, grads.grad_b_N, grads.along_N, grads.counts_N, aux)
        flat = self._reduce(torch.cat([part.float().flatten() for part in small]))
        *sums, aux = torch.split(flat, [part.numel() for part in small])
        for part, total in zip(small, sums, strict=False):
            part.copy_(total.view_as(part))
        self._reduce(grads.grad_2ND)
        grads.square_SN.zero_()
        torch.linalg.vector_norm(grads.grad_2ND, dim=(0, 2), dtype=torch.float32, out=grads.square_SN[0])
        grads.square_SN[0].square_()
        grads.touched_N.fill_(1)
        return aux
