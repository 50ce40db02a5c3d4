"""The fused step of JumpReLU with an L0 penalty, on one GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from plmsae_cli.sae.fused.dense import DenseStep
from plmsae_cli.sae.fused.given import AdamOptions, Batch, Masters
from plmsae_cli.sae.fused.residual import residuals
from plmsae_cli.sae.fused.step import FusedStep
from plmsae_cli.sae.fused.threshold import ThresholdEncoder
from plmsae_cli.sae.jumprelu import JumpReLU
from plmsae_cli.sae.ranks import Ranks

FEWEST, MOST = 64, 512
SHARE = 64
"""Pairs a token for which there are places: this share of the latents, within these limits. Beyond that, products over all
latents take about as long."""
SMALLEST = 32
"""Pairs up to which a token's decoder rows are held at once in the first launch."""


def capacity(num_latents: int) -> int:
    """Places for pairs a token, on average over a batch."""
    return min(MOST, max(FEWEST, num_latents // SHARE))


class FusedJumpStep(FusedStep):
    """As `FusedStep`, with thresholds; all of `JumpReLU.loss` with `penalty` l0, without AuxK. There is one rank.

    A batch whose pairs have places is computed over them, any other over all latents: the same sums.
    """

    _encode: ThresholdEncoder

    def __init__(self, model: JumpReLU, masters: Masters, batch: Batch, adam: AdamOptions, ranks: Ranks) -> None:
        assert ranks.world == 1
        assert model.penalty == "l0"
        self._jump, self._log_theta_N = model, masters.parameters["log_theta_N"]
        super().__init__(model, masters, batch, adam, ranks)
        self._update.aux_weight = model.sparsity  # the step's: its schedule fills it
        self._dense = DenseStep(batch.rows, model.num_latents, model.d, masters.ages_N.device)
        self._per_active = torch.zeros((), device=masters.ages_N.device)

    def _encoder(self) -> ThresholdEncoder:
        model, rows = self._jump, self._batch.rows
        places = rows * capacity(model.num_latents)
        return ThresholdEncoder(rows, model.num_latents, model.bandwidth, self._log_theta_N, places)

    def _product(self, places: int) -> None:
        encode = self._encode
        encode(self._x_BD, self._update.w_enc_ND, self._update.b_enc_N)
        torch.std(encode.active_B.float(), dim=0, correction=0, out=self._l0_std)
        self._penalise(encode.active_B.sum() / self._batch.rows)

    def _penalise(self, l0: Tensor) -> None:
        """The penalty, and the derivative of the loss by the number of active pairs."""
        model, rows = self._jump, self._batch.rows
        if model.target_l0 is None:
            self._aux_loss.copy_(l0)
            self._per_active.copy_(model.sparsity / rows)
        else:
            miss = l0 / model.target_l0 - 1
            self._aux_loss.copy_(miss.square())
            self._per_active.copy_(model.sparsity * miss * (2 / (model.target_l0 * rows)))

    def _errors(self, places: int) -> None:
        encode, w_dec_ND = self._encode, self._update.w_dec_ND
        out = (self._residual_BGD, self._slope_P, self._energy_2B)
        prefixes_G, void = self._gradients.prefixes_G, encode.dense
        residuals(self._x_BD, w_dec_ND, encode.pairs, prefixes_G, *out, smallest=SMALLEST, listed=True, void=void)
        self._dense.decode(encode, self._x_BD, w_dec_ND, self._residual_BGD, self._energy_2B)

    def _half_gradients(self, places: int, decoder: bool, encoder: bool) -> None:
        super()._half_gradients(places, decoder, encoder)
        encode, grads = self._encode, self._gradients
        encode.sum_near(grads.offsets_N1, grads.order_P, grads.token_P, self._slope_P)
        self._dense.gradients(encode, self._x_BD, self._update.w_dec_ND, self._residual_BGD, self._factor, grads)

    def _own_gradients(self) -> None:
        encode = self._encode
        slope_N, number_N = encode.near_2N.unbind()
        by_theta_N = encode.theta_N * self._factor * slope_N + self._per_active * number_N
        torch.mul(encode.theta_N, by_theta_N / -self._jump.bandwidth, out=self._update.own_gradients["log_theta_N"])
