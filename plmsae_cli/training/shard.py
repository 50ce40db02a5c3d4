"""A dictionary whose latents are spread over ranks: which tensors a rank holds a part of, and how they come together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from plmsae_cli.runtime.dist import Gang
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.ranks import Rows
from plmsae_cli.store.checkpoint import Part

PER_LATENT = frozenset({"w_enc_ND", "b_enc_N", "w_dec_ND"})
"""Parameters with a row a latent; their names are in those of their moments."""
AGES = "tokens_since_fired_N"


class Shard:
    """This rank's latents of a dictionary: parameters of their own, taken from the whole and given back to it."""

    def __init__(self, model: Dictionary, gang: Gang, ages: bool = False) -> None:
        """`ages`: whether it holds those of its latents alone."""
        self._spread = PER_LATENT | {AGES} if ages else PER_LATENT
        self.rows = Rows(model.num_latents, gang.rank, gang.world)
        self._model, self._gang = model, gang
        self.parameters = {
            name: Parameter(p.detach()[self.rows.latents].clone()) if name in PER_LATENT else p
            for name, p in model.named_parameters()
        }
        """All that this rank trains, by name."""
        self.first_rows = {name: self.rows.first for name in self.parameters if name in PER_LATENT}

    @torch.no_grad()
    def take(self) -> None:
        """From the whole dictionary, which keeps none of its latents."""
        for name, parameter in self.parameters.items():
            if name in PER_LATENT:
                whole = self._model.get_parameter(name)
                parameter.copy_(whole[self.rows.latents])
                whole.data = whole.data.new_empty(0)

    @torch.no_grad()
    def give_back(self) -> None:
        """Make the dictionary whole again; on all ranks."""
        for name, parameter in self.parameters.items():
            if name in PER_LATENT:
                shape = parameter.shape[1:]
                own = parameter.new_zeros(self.rows.padded, *shape)
                own[: self.rows.num] = parameter
                whole = parameter.new_empty(self.rows.padded * self.rows.world, *shape)
                self._gang.gather_rows_later(own, whole).wait()
                self._model.get_parameter(name).data = whole[: self.rows.num_latents]

    def parts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | Part]:
        """The same by name, those with a row a latent as parts of the whole."""
        return {
            name: Part(tensor, self.rows.first, self.rows.num_latents) if self._is_spread(name, tensor) else tensor
            for name, tensor in tensors.items()
        }

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts of whole tensors."""
        return {
            name: tensor[self.rows.latents] if self._is_spread(name, tensor) else tensor
            for name, tensor in tensors.items()
        }

    def _is_spread(self, name: str, tensor: Tensor) -> bool:
        return tensor.ndim > 0 and not self._spread.isdisjoint(name.split("."))
