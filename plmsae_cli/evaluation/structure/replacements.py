"""What is put in the place of a layer before folding: the dictionary at various numbers of latents, and ablations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.structure.splicing import Value
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.interface import Latents
from plmsae_cli.sae.selection import encode_top_k
from plmsae_cli.sae.topk import TopK


class Reconstruction:
    """The dictionary's reconstruction of a protein, and after a call what it cost: `fvu` and `l0` of those residues."""

    def __init__(self, sae: Dictionary, mean_D: Tensor, k: int | None = None, prefix: int | None = None) -> None:
        """`k`: the k largest pre-activations of a residue instead of what the dictionary would choose; `prefix`: of the latents
        chosen, those of smaller index are decoded."""
        self.sae, self.mean_D, self.k, self.prefix = sae, mean_D, k, prefix
        self.fvu = self.l0 = 0.0

    def __call__(self, x_LD: Tensor) -> Tensor:
        if self.k is None:
            acts_LK, indices_LK = self.sae.encode(x_LD)
        else:
            acts_LK, indices_LK = encode_top_k(x_LD - self.sae.b_dec_D, self.sae.w_enc_ND, self.sae.b_enc_N, self.k)
        if self.prefix is not None:
            acts_LK = torch.where(indices_LK < self.prefix, acts_LK, 0.0)
        xhat_LD = self.sae.decode(Latents(acts_LK, indices_LK))
        self.fvu = float((xhat_LD - x_LD).double().square().sum() / (x_LD - self.mean_D).double().square().sum())
        self.l0 = float((acts_LK > 0).sum(1).double().mean())
        return xhat_LD


class Replacement(NamedTuple):
    """One of them, by its name in the tables."""

    variant: str
    """`original`, `sae`, `zero`, `mean`; `k` and `prefix` are sweeps."""
    number: int | None
    """Of active latents (`k`), or of the latents in the prefix."""
    value: Value | None


def replacements(
    sae: Dictionary, mean_D: Tensor, ks: Sequence[int], prefixes: Sequence[int] | str
) -> list[Replacement]:
    """All of them, `original` first.

    Raises:
        UserError: the dictionary has no k, no nested groups, or fewer latents.
    """
    is_top_k = isinstance(sae, TopK)
    if ks and not is_top_k:
        raise UserError("eval.structure.k: this dictionary has no number of active latents", "remove k")
    groups = sae.prefixes if isinstance(sae, TopK) else (sae.num_latents,)
    if prefixes and len(groups) == 1:
        raise UserError("eval.structure.prefixes: this dictionary has no nested groups", "remove prefixes")
    chosen = groups[:-1] if isinstance(prefixes, str) else tuple(prefixes)  # the last is the whole dictionary: `sae`
    for name, numbers in (("k", ks), ("prefixes", chosen)):
        if any(number > sae.num_latents for number in numbers):
            raise UserError(
                f"eval.structure.{name} names {max(numbers)}, the dictionary has {sae.num_latents:,} latents",
                "lower it",
            )
    return [
        Replacement("original", None, None),
        Replacement("sae", None, Reconstruction(sae, mean_D)),
        Replacement("zero", None, torch.zeros_like),
        Replacement("mean", None, lambda x_LD: mean_D.expand_as(x_LD)),
        *(Replacement("k", k, Reconstruction(sae, mean_D, k=k)) for k in ks),
        *(Replacement("prefix", m, Reconstruction(sae, mean_D, prefix=m)) for m in (chosen if prefixes else ())),
    ]
