"""The whole training step of the TopK family on CUDA: one graph, or on several GPUs graphs with collectives between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from plmsae_cli.sae.batch_topk import BatchTopK
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.fused.aux import AuxK
from plmsae_cli.sae.fused.batch_top_k import BatchTopKEncoder
from plmsae_cli.sae.fused.centre import centre
from plmsae_cli.sae.fused.collect import FIGURES, Sums
from plmsae_cli.sae.fused.dead_bound import DeadBound
from plmsae_cli.sae.fused.given import AdamOptions, Batch, Masters
from plmsae_cli.sae.fused.gradients import WeightGradients
from plmsae_cli.sae.fused.graphs import Graphs, launched
from plmsae_cli.sae.fused.nested import pairs_held
from plmsae_cli.sae.fused.pairs import ActivePairs
from plmsae_cli.sae.fused.residual import residuals
from plmsae_cli.sae.fused.top_k import TopKEncoder
from plmsae_cli.sae.fused.update import Update
from plmsae_cli.sae.ranks import Pending, Ranks, Rows
from plmsae_cli.sae.topk import TopK


class Encoder(Protocol):
    """Finds the active pairs of a batch."""

    @property
    def pairs(self) -> ActivePairs: ...

    def __call__(self, x_BD: Tensor, w_ND: Tensor, b_N: Tensor) -> None:
        """Encode `x_BD` (bfloat16, already less b_dec); the result is in `pairs`."""


class FusedStep:
    """One optimiser step a call, without waiting for the device; all state lives in the tensors it is given.

    Several ranks are data parallel: each computes the gradients of its tokens, and of their sum each gets the rows of
    its latents (`Rows`), which it alone updates; all then gather the bfloat16 copies that the next step's products use
    (ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054, section 5: stages 1 and 2). The gradients of the decoder and of
    the vectors travel while the encoder's are computed, the encoder's copies while the decoder is updated, and the
    decoder's while the next step encodes.

    Args:
        model: its settings; of its tensors theta alone, which follows the training where there is one.
        masters: what it updates.
        batch, adam: constants.
    """

    def __init__(self, model: Dictionary, masters: Masters, batch: Batch, adam: AdamOptions, ranks: Ranks) -> None:
        parameters, ages_N = masters.parameters, masters.ages_N
        device, n, d, rows = ages_N.device, model.num_latents, model.d, batch.rows
        self._model, self._batch, self._ranks, self._ages_N = model, batch, ranks, ages_N
        self._b_dec_D = parameters["b_dec_D"]
        self._global_rows = rows * ranks.world
        prefixes = model.prefixes if isinstance(model, TopK) else (n,)
        prefixes_G = torch.tensor(prefixes, dtype=torch.int32, device=device)
        self._groups = len(prefixes_G)
        self._factor = -2.0 / (self._groups * self._global_rows * d)
        self._rows = Rows(n, ranks.rank, ranks.world)
        self._update = Update(masters, adam, self._rows)
        self._encode = self._encoder()
        pairs = len(self._encode.pairs.acts_P)
        padded = self._rows.padded * ranks.world if ranks.world > 1 else None
        self._gradients = WeightGradients(rows, n, d, pairs, prefixes_G, device, padded)
        self._aux = None
        if isinstance(model, TopK) and model.aux_coefficient:
            self._aux = AuxK(model.k_aux, model.aux_coefficient, model.aux_fitted)
            self._update.aux_weight.fill_(model.aux_coefficient)
        self.dead_bound = DeadBound(ages_N, batch.window, self._global_rows)
        self._x_BD = torch.empty(rows, d, dtype=torch.bfloat16, device=device)
        self._residual_BGD = torch.empty(rows, self._groups, d, dtype=torch.bfloat16, device=device)
        self._slope_P = torch.zeros(pairs, device=device)
        self._weight_B: Tensor | None = None
        self._l0_std = torch.zeros((), device=device)
        self._energy_2B = torch.empty(2, rows, device=device)
        self._square_B = torch.empty(rows, device=device)
        self._products_3 = torch.zeros(3, device=device)  # of AuxK: ||e||^2, <ehat, e>, ||ehat||^2
        self._aux_loss, self._no_aux = torch.zeros(2, device=device)
        self._replay: Callable[[str, int, Callable[[int], None]], None] = Graphs() if ages_N.is_cuda else launched
        self._gathers: dict[str, Pending] = {}
        if ranks.world > 1:
            self._own_2PD = torch.zeros(2, self._rows.padded, d, dtype=torch.bfloat16, device=device)
            self._square_2P = torch.zeros(2, self._rows.num, device=device)
            self._vectors = torch.zeros(3 * n + d, device=device)  # gradients of b_enc, along rows, counts, b_dec
            self._touched_P = torch.ones(self._rows.num, dtype=torch.int32, device=device)
            self._gather("w_enc_ND", "b_enc_N", "w_dec_ND")

    def _encoder(self) -> Encoder:
        model, rows, device = self._model, self._batch.rows, self._ages_N.device
        assert isinstance(model, TopK)
        if isinstance(model, BatchTopK):
            return BatchTopKEncoder(rows, model.num_latents, model.k, device, self._ranks)
        return TopKEncoder(rows, model.num_latents, model.k, device)

    def copy_parameters(self) -> None:
        """To be called, by all ranks, after the parameters were set from outside."""
        self.settle()
        self._update.copy_parameters()
        self._gather("w_enc_ND", "b_enc_N", "w_dec_ND")

    def settle(self) -> None:
        """Wait for what other ranks still send: after the last step, before a group of ranks is left."""
        self._arrived(*self._gathers)

    def __call__(self, raw_BD: Tensor, step: int, rate: float) -> dict[str, Tensor]:
        """Train on this rank's raw rows. Figures are shares of a sum over ranks, valid until the next call."""
        batch = self._batch
        centre(raw_BD, batch.mean_D, batch.scale, self._b_dec_D, self._x_BD, self._square_B)
        self._update.rate.fill_(rate)
        places = self.dead_bound.places(step) if self._aux is not None else 0
        with torch.no_grad():
            if self._ranks.world == 1:
                self._replay("step", places, self._alone)
            else:
                self._together(places)
        figures = dict(zip(FIGURES, self._update.figures.unbind(), strict=True))
        return figures if self._encode.pairs.offsets_B1 is None else figures | {"l0_std": self._l0_std}

    def _alone(self, places: int) -> None:
        self._product(places)
        self._errors(places)
        self._half_gradients(places, decoder=True, encoder=True)
        self._centre_gradient()
        self._own_gradients()
        g = self._gradients
        self._collect(places, g.square_SN, g.along_N, g.grad_b_N, g.counts_N, g.grad_b_SD)
        self._finish()
        self._update.apply(g.touched_N, g.grad_enc_ND, g.grad_dec_ND, g.grad_b_N)

    def _together(self, places: int) -> None:
        replay, ranks, grads = self._replay, self._ranks, self._gradients
        self._arrived("w_enc_ND", "b_enc_N")
        # BatchTopK's choice asks all ranks, which no graph may hold.
        (launched if isinstance(self._model, BatchTopK) else replay)("encode", 0, self._product)
        self._arrived("w_dec_ND")
        replay("residual", places, self._errors)
        if places:
            ranks.sum(self._products_3)
        own_dec_PD, own_enc_PD = self._own_2PD
        replay("decoder", places, lambda places: self._half_gradients(places, decoder=True, encoder=False))
        decoder = ranks.sum_rows_later(grads.whole_dec, own_dec_PD)
        replay("small", 0, self._small_gradients)
        vectors = ranks.sum_later(self._vectors)
        replay("encoder", places, lambda places: self._half_gradients(places, decoder=False, encoder=True))
        encoder = ranks.sum_rows_later(grads.whole_enc, own_enc_PD)
        decoder.wait()
        replay("decoder norm", 0, lambda _: self._squares(0))
        encoder.wait()
        vectors.wait()
        replay("norm", places, self._norm)
        ranks.sum(self._update.partial)
        replay("update encoder", 0, self._update_encoder)
        self._gather("w_enc_ND", "b_enc_N")
        replay("update decoder", 0, self._update_decoder)
        self._gather("w_dec_ND")

    def _gather(self, *names: str) -> None:
        update = self._update
        if self._ranks.world > 1:
            for name in names:
                self._gathers[name] = self._ranks.gather_rows_later(update.own[name], update.whole[name])

    def _arrived(self, *names: str) -> None:
        for name in names:
            if name in self._gathers:
                self._gathers.pop(name).wait()

    def _product(self, places: int) -> None:
        encode, model = self._encode, self._model
        encode(self._x_BD, self._update.w_enc_ND, self._update.b_enc_N)
        if isinstance(model, BatchTopK) and isinstance(encode, BatchTopKEncoder):
            model.follow(encode.smallest)
            encode.spread(self._l0_std)

    def _errors(self, places: int) -> None:
        update, energy_2B, model = self._update, self._energy_2B, self._model
        pairs = (self._encode.pairs, self._gradients.prefixes_G)
        out = (self._residual_BGD, self._slope_P, energy_2B)
        # Of BatchTopK's pairs there are twice as many places where there are other ranks, but no more pairs.
        smallest = pairs_held(model.k) if isinstance(model, TopK) else None
        residuals(self._x_BD, update.w_dec_ND, *pairs, *out, smallest=smallest)
        if self._aux is not None and places:
            dead_N, error_BD = self._ages_N >= self._batch.window, self._residual_BGD[:, -1]
            weights = (update.w_enc_ND, update.b_enc_N, update.w_dec_ND)
            self._products_3[0] = energy_2B[1].sum()
            self._products_3[1:] = self._aux.reconstruct(dead_N, places, self._x_BD, error_BD, *weights)

    def _half_gradients(self, places: int, decoder: bool, encoder: bool) -> None:
        grads, x_BD, residual_BGD = self._gradients, self._x_BD, self._residual_BGD
        if decoder:
            grads.order(self._encode.pairs)
            grads.permute(self._encode.pairs, self._slope_P, self._weight_B)
        grads.sum(x_BD, residual_BGD, self._factor, decoder, encoder)
        if self._aux is not None and places:
            if decoder:
                dead_N = self._ages_N >= self._batch.window
                aux = self._aux.differentiate(dead_N, x_BD, residual_BGD[:, -1], *self._products_3.unbind())
                self._aux_loss.copy_(aux)
            self._aux.add(self._update.w_dec_ND, grads, decoder, encoder)

    def _own_gradients(self) -> None:
        """Those of parameters that only this architecture has: none here."""

    def _centre_gradient(self) -> None:
        self._gradients.of_decoder_bias(self._residual_BGD, self._update.w_enc_ND, self._factor)

    def _small_gradients(self, places: int) -> None:
        self._centre_gradient()
        grads = self._gradients
        parts = (grads.grad_b_N, grads.along_N, grads.counts_N.float(), grads.grad_b_SD.sum(0))
        torch.cat(parts, out=self._vectors)

    def _squares(self, matrix: int) -> None:
        own_PD = self._own_2PD[matrix, : self._rows.num]
        torch.linalg.vector_norm(own_PD, dim=1, dtype=torch.float32, out=self._square_2P[matrix]).square_()

    def _norm(self, places: int) -> None:
        n, d = self._model.num_latents, self._model.d
        self._squares(1)
        grad_b_N, along_N, counts_N, grad_b_D = torch.split(self._vectors, [n, n, n, d])
        self._collect(places, self._square_2P, along_N, grad_b_N, counts_N, grad_b_D.unsqueeze(0))

    def _collect(
        self, places: int, square_SP: Tensor, along_N: Tensor, grad_b_N: Tensor, counts_N: Tensor, grad_b_SD: Tensor
    ) -> None:
        aux = self._no_aux if self._aux is not None and not places else self._aux_loss
        sums = Sums(square_SP, along_N, grad_b_N, counts_N, grad_b_SD, self._energy_2B, self._square_B, aux)
        centre_here = self._ranks.rank == 0
        self._update.collect(sums, self._ages_N, self._batch.window, self._global_rows, centre_here)

    def _finish(self) -> None:
        self._update.finish(self._groups, self._global_rows, self._ranks.world)

    def _update_encoder(self, places: int) -> None:
        self._finish()
        self._apply(decoder=False, encoder=True)

    def _update_decoder(self, places: int) -> None:
        self._apply(decoder=True, encoder=False)

    def _apply(self, decoder: bool, encoder: bool) -> None:
        dec_PD, enc_PD = self._own_2PD
        grad_b_N = self._vectors[: self._model.num_latents]
        self._update.apply(self._touched_P, enc_PD, dec_PD, grad_b_N[self._rows.latents], decoder, encoder)
