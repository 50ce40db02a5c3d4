"""The fused step of Switch, on one GPU."""

from __future__ import annotations

import torch

from plmsae_cli.sae.fused.experts import ExpertEncoder
from plmsae_cli.sae.fused.given import AdamOptions, Batch, Masters
from plmsae_cli.sae.fused.step import FusedStep
from plmsae_cli.sae.ranks import Ranks
from plmsae_cli.sae.switch import Switch


class FusedSwitchStep(FusedStep):
    """As `FusedStep`, with the router's parameters; all of `Switch.loss`, without AuxK. There is one rank."""

    _encode: ExpertEncoder

    def __init__(self, model: Switch, masters: Masters, batch: Batch, adam: AdamOptions, ranks: Ranks) -> None:
        assert ranks.world == 1
        self._switch = model
        self._w_router_ED, self._b_router_D = (masters.parameters[name] for name in ("w_router_ED", "b_router_D"))
        super().__init__(model, masters, batch, adam, ranks)
        self._update.aux_weight.fill_(model.balance_coefficient)
        self._weight_B = self._encode.probability_B

    def _encoder(self) -> ExpertEncoder:
        model = self._switch
        return ExpertEncoder(self._batch.rows, model.num_latents, model.k, model.num_experts, self._ages_N.device)

    def _product(self, places: int) -> None:
        self._encode.route(self._x_BD, self._w_router_ED, self._b_dec_D - self._b_router_D)
        self._encode(self._x_BD, self._update.w_enc_ND, self._update.b_enc_N)

    def _own_gradients(self) -> None:
        encode, rows, experts = self._encode, self._batch.rows, self._switch.num_experts
        load_E = encode.tokens_E * (experts / rows)  # E f
        torch.sum(load_E * encode.mean_E, 0, out=self._aux_loss)
        balance_E = load_E * (self._switch.balance_coefficient / rows)
        slopes_BE, sums_E = encode.slopes(self._slope_P, self._factor, balance_E)
        grads = self._update.own_gradients
        shift_D = self._b_dec_D - self._b_router_D
        torch.addr((slopes_BE.t() @ self._x_BD).float(), sums_E, shift_D, out=grads["w_router_ED"])
        torch.mv(self._w_router_ED.t(), -sums_E, out=grads["b_router_D"])
