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

PER_LATENT = frozenset({"w_enc_ND", "b_enc_N", "w_dec_ND", "tokens_since_fired_N"})
"""Last or last but one in the names of tensors with a row a latent: the parameters', their moments' and the ages'."""


class Shard:
    """This rank's latents of a dictionary: parameters of their own, taken from the whole and given back to it."""

    def __init__(self, model: Dictionary, gang: Gang) -> None:
        self.rows = Rows(model.num_latents, gang.rank, gang.world)
        self._model, self._gang = model, gang
        self.parameters = {
            name: Parameter(p.detach()[self.rows.latents].clone()) if name in PER_LATENT else p
            for name, p in model.named_parameters()
        }
        """All that this rank trains, by name."""

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
            name: Part(tensor, self.rows.first, self.rows.num_latents) if _per_latent(name, tensor) else tensor
            for name, tensor in tensors.items()
        }

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts of whole tensors."""
        return {
            name: tensor[self.rows.latents] if _per_latent(name, tensor) else tensor for name, tensor in tensors.items()
        }


def _per_latent(name: str, tensor: Tensor) -> bool:
    return tensor.ndim > 0 and not PER_LATENT.isdisjoint(name.split("."))
