"""The fused step of a dictionary whose latents are spread over ranks: `sae.latent_shard` in kernels.

A rank reads its share of the batch and scores its latents on all of it. Sums over tokens are of a rank's share, so that
what every rank holds whole is counted once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plmsae_cli.sae.fused.aux import AuxK, keep_top_, products
from plmsae_cli.sae.fused.centre import centre
from plmsae_cli.sae.fused.collect import FIGURES, Sums
from plmsae_cli.sae.fused.dead_bound import DeadBound
from plmsae_cli.sae.fused.given import AdamOptions, Batch, Masters
from plmsae_cli.sae.fused.gradients import WeightGradients
from plmsae_cli.sae.fused.graphs import Graphs, launched
from plmsae_cli.sae.fused.partial import decode, errors, slopes
from plmsae_cli.sae.fused.top_k import TopKEncoder
from plmsae_cli.sae.fused.update import Update
from plmsae_cli.sae.ranks import Ranks, Rows
from plmsae_cli.sae.topk import TopK


class FusedLatentStep:
    """As `step.FusedStep`, but of all `masters` there are only this rank's latents (`Rows`).

    All ranks have as many.
    """

    def __init__(self, model: TopK, masters: Masters, batch: Batch, adam: AdamOptions, ranks: Ranks) -> None:
        parameters, ages_N = masters.parameters, masters.ages_N
        device, d, rows, world = ages_N.device, model.d, batch.rows, ranks.world
        own = Rows(model.num_latents, ranks.rank, world)
        n, whole = own.num, rows * world
        self._model, self._batch, self._ranks, self._ages_N, self._n = model, batch, ranks, ages_N, n
        self._b_dec_D, self._global_rows = parameters["b_dec_D"], whole
        self._mine = slice(ranks.rank * rows, (ranks.rank + 1) * rows)
        prefixes_G = torch.tensor(model.prefixes, dtype=torch.int32, device=device)
        self._prefixes_G = (prefixes_G - own.first).clamp(0, n)
        groups = self._groups = len(prefixes_G)
        self._factor = -2.0 / (groups * whole * d)
        self._update = Update(masters, adam, own, others=False)
        self._update.aux_weight.fill_(model.aux_coefficient)
        self._k = min(model.k, n)
        self._encode = TopKEncoder(whole, n, self._k, device)
        self._gradients = WeightGradients(whole, n, d, whole * self._k, self._prefixes_G, device)
        self._aux = AuxK(model.k_aux, model.aux_coefficient, model.aux_fitted) if model.aux_coefficient else None
        self.dead_bound = DeadBound(ages_N, batch.window, whole, ranks)
        half = {"dtype": torch.bfloat16, "device": device}
        self._raw_BD: Tensor | None = None
        self._x_BD = torch.empty(whole, d, **half)  # type: ignore[call-overload]
        self._square_B = torch.empty(whole, device=device)
        self._candidates_BK = torch.empty(whole, self._k, **half)  # type: ignore[call-overload]
        self._all_WBK = torch.empty(world * whole, self._k, **half)  # type: ignore[call-overload]
        self._parts_BGD = torch.empty(whole, groups, d, device=device)
        self._xhat_RGD = torch.empty(rows, groups, d, device=device)
        self._residual_BGD = torch.empty(whole, groups, d, **half)  # type: ignore[call-overload]
        self._slope_BK = torch.empty(whole, self._k, device=device)
        self._energy_2R = torch.empty(2, rows, device=device)
        self._products_4 = torch.zeros(4, device=device)  # of AuxK: ||e||^2, <ehat, e>, ||ehat||^2, number of dead
        self._aux_loss, self._no_aux = torch.zeros(2, device=device)
        self._grad_b_D = torch.zeros(d, device=device)
        self._room = 0
        self._replay: Callable[[str, int, Callable[[int], None]], None] = Graphs() if ages_N.is_cuda else launched

    def copy_parameters(self) -> None:
        """To be called after the parameters were set from outside."""
        self._update.copy_parameters()

    def settle(self) -> None:
        """Nothing is under way between steps."""

    @torch.no_grad()
    def __call__(self, raw_BD: Tensor, step: int, rate: float) -> dict[str, Tensor]:
        """Train on the ranks' raw rows, of which `raw_BD` are this one's; see `FusedStep`."""
        ranks, replay = self._ranks, self._replay
        if self._raw_BD is None:
            self._raw_BD = raw_BD.new_empty(self._global_rows, raw_BD.shape[1])
        ranks.gather_rows_later(raw_BD, self._raw_BD).wait()
        self._update.rate.fill_(rate)
        places = self.dead_bound.places(step) if self._aux is not None else 0
        replay("encode", 0, self._candidates)
        choice = ranks.gather_rows_later(self._candidates_BK, self._all_WBK)
        if places:
            self._make(places)
            replay("dead", places, self._revive)
        choice.wait()
        replay("decode", 0, self._decode)
        xhat = ranks.sum_rows_later(self._parts_BGD, self._xhat_RGD)
        replay("order", 0, self._order)
        xhat.wait()
        replay("error", 0, self._error)
        residual = ranks.gather_rows_later(self._residual_BGD[self._mine], self._residual_BGD)
        if places:
            self._share_aux(places)
        residual.wait()
        replay("gradients", places, self._differentiate)
        ranks.sum(self._grad_b_D)
        replay("norm", places, self._norm)
        ranks.sum(self._update.partial)
        replay("update", 0, self._finish)
        return dict(zip(FIGURES, self._update.figures.unbind(), strict=True))

    def _candidates(self, places: int) -> None:
        batch, update = self._batch, self._update
        assert self._raw_BD is not None
        centre(self._raw_BD, batch.mean_D, batch.scale, self._b_dec_D, self._x_BD, self._square_B)
        self._encode(self._x_BD, update.w_enc_ND, update.b_enc_N)
        self._candidates_BK.copy_(self._encode.acts_BK)  # exact: scores are bfloat16

    def _decode(self, places: int) -> None:
        encode = self._encode
        encode.acts_BK.copy_(self._among_best(self._all_WBK, self._model.k))
        pairs = encode.pairs
        pairs.sort_keys_P.masked_fill_(pairs.acts_P <= 0, self._n - pairs.shift)
        decode(self._update.w_dec_ND, encode.acts_BK, encode.indices_BK, self._prefixes_G, self._parts_BGD)

    def _order(self, places: int) -> None:
        self._gradients.order(self._encode.pairs)

    def _among_best(self, all_WBK: Tensor, k: int) -> Tensor:
        """This rank's [B, K] of all ranks', 0 where not among a token's k largest; a rank's come by ascending latent."""
        columns = all_WBK.shape[1]
        in_order_BL = all_WBK.view(-1, self._global_rows, columns).transpose(0, 1).reshape(self._global_rows, -1)
        if k < in_order_BL.shape[1]:
            keep_top_(in_order_BL, k)
        own_BK: Tensor = in_order_BL.view(self._global_rows, -1, columns)[:, self._ranks.rank]
        return own_BK

    def _error(self, places: int) -> None:
        errors(self._x_BD[self._mine], self._xhat_RGD, self._residual_BGD[self._mine], self._energy_2R)

    def _make(self, places: int) -> None:
        """Buffers of AuxK for so many places; those of more serve."""
        assert self._aux is not None
        self._aux.prepare(places, self._x_BD)
        if places > self._room:
            self._room, whole, world, d = places, self._global_rows, self._ranks.world, self._model.d
            self._dead_WBC = self._x_BD.new_empty(world * whole * places)
            self._ehat_BD = self._parts_BGD.new_empty(whole, d)
            self._ehat_RD = self._parts_BGD.new_empty(whole // world, d)
            self._aux_slope_BD = torch.empty_like(self._x_BD)

    def _revive(self, places: int) -> None:
        update, dead_N = self._update, self._ages_N >= self._batch.window
        assert self._aux is not None
        self._aux.activate(dead_N, places, self._x_BD, update.w_enc_ND, update.b_enc_N, update.w_dec_ND)

    def _share_aux(self, places: int) -> None:
        ranks, replay = self._ranks, self._replay
        assert self._aux is not None
        if self._chooses_dead(places):
            ranks.gather_rows_later(self._aux.acts_BC, self._all_dead(places)).wait()
        replay("dead decode", places, self._decode_dead)
        ranks.sum_rows_later(self._ehat_BD, self._ehat_RD).wait()
        replay("dead error", places, self._error_dead)
        ranks.sum(self._products_4)
        replay("dead slope", places, self._slope_dead)
        ranks.gather_rows_later(self._aux_slope_BD[self._mine], self._aux_slope_BD).wait()

    def _chooses_dead(self, places: int) -> bool:
        return self._model.k_aux < places * self._ranks.world

    def _all_dead(self, places: int) -> Tensor:
        whole = self._ranks.world * self._global_rows
        dead_WBC: Tensor = self._dead_WBC[: whole * places].view(whole, places)
        return dead_WBC

    def _decode_dead(self, places: int) -> None:
        assert self._aux is not None
        if self._chooses_dead(places):
            self._aux.acts_BC.copy_(self._among_best(self._all_dead(places), self._model.k_aux))
        self._ehat_BD.copy_(self._aux.decode())

    def _error_dead(self, places: int) -> None:
        error_RD = self._residual_BGD[self._mine, -1]
        self._products_4[0] = self._energy_2R[1].sum()
        self._products_4[1:3] = products(self._ehat_RD, error_RD)
        self._products_4[3] = (self._ages_N >= self._batch.window).sum()

    def _slope_dead(self, places: int) -> None:
        assert self._aux is not None
        energy, along, length, dead = self._products_4.unbind()
        error_RD = self._residual_BGD[self._mine, -1]
        self._aux_loss.copy_(self._aux.slope_(self._ehat_RD, dead, error_RD, energy, along, length))
        self._aux_slope_BD[self._mine] = self._ehat_RD

    def _differentiate(self, places: int) -> None:
        update, encode, grads = self._update, self._encode, self._gradients
        pairs = (encode.acts_BK, encode.indices_BK, self._prefixes_G)
        slopes(update.w_dec_ND, *pairs, self._residual_BGD, self._slope_BK)
        grads.permute(encode.pairs, self._slope_BK.view(-1))
        grads.sum(self._x_BD, self._residual_BGD, self._factor)
        if self._aux is not None and places:
            self._aux.gradients(self._aux_slope_BD, self._x_BD)
            self._aux.add(update.w_dec_ND, grads)
        grads.of_decoder_bias(self._residual_BGD[self._mine], update.w_enc_ND, self._factor)
        torch.sum(grads.grad_b_SD, 0, out=self._grad_b_D)

    def _norm(self, places: int) -> None:
        grads, first = self._gradients, self._ranks.rank == 0
        sums = Sums(
            grads.square_SN,
            grads.along_N,
            grads.grad_b_N,
            grads.counts_N,
            self._grad_b_D.unsqueeze(0),
            self._energy_2R,
            self._square_B[self._mine],
            self._aux_loss if places else self._no_aux,
        )
        self._update.collect(sums, self._ages_N, self._batch.window, self._global_rows, with_centre=first)

    def _finish(self, places: int) -> None:
        grads = self._gradients
        self._update.finish(self._groups, self._global_rows, self._ranks.world)
        self._update.apply(grads.touched_N, grads.grad_enc_ND, grads.grad_dec_ND, grads.grad_b_N)
