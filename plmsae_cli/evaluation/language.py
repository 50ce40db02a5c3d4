"""Masked prediction of a language model over proteins: which are scored, and their sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.language_models import LanguageModels
from plmsae_cli.evaluation.proteins import groups, read_any
from plmsae_cli.plm.alphabet import encode, pack
from plmsae_cli.plm.esm2 import ESM2
from plmsae_cli.plm.unet import UNet
from plmsae_cli.runtime.masked_scores import MaskedScores, mask, masks_of_pack
from plmsae_cli.runtime.models import arithmetic
from plmsae_cli.store.fs import Store
from plmsae_cli.store.tokens import TokenStream, find_shards, read_tokens

Tokens = npt.NDArray[np.uint8]


def scored_proteins(options: LanguageModels, store: Store) -> tuple[list[Tokens], dict[str, int]]:
    """The residues of each protein as tokens, and how many were `used` and `cut`.

    Raises:
        UserError: there is none.
    """
    proteins = [p for p in islice(_all(options, store), options.sequences) if len(p)]
    if not proteins:
        raise UserError("eval.lm: there is no protein to score on", "name other files")
    cut = sum(len(p) > options.max_length for p in proteins)
    kept = [p[: options.max_length] for p in proteins]
    return kept, {"used": len(kept), "cut": cut, "residues": sum(map(len, kept))}


def _all(options: LanguageModels, store: Store) -> Iterable[Tokens]:
    if options.bin is None:
        assert options.fasta is not None
        return (encode(entry.sequence) for entry in read_any(store.local(options.fasta)))
    stream = TokenStream([read_tokens(store, path) for path in find_shards(store, options.bin)])
    return (stream.read(int(first), int(length)) for first, length in zip(*stream.documents(), strict=True))


@torch.inference_mode()
def score(
    model: ESM2 | UNet,
    proteins: Sequence[Tokens],
    mask_rate: float,
    batch_tokens: int,
    compute: torch.dtype,
    part: int = 0,
    parts: int = 1,
    check_stop: Callable[[], None] = lambda: None,
    progress: Callable[[float, float], None] = lambda *_: None,
) -> MaskedScores:
    """Every `parts`-th pack of the proteins, from `part` on: what several add up is what one would find."""
    device = next(model.parameters()).device
    packs = list(groups([len(protein) for protein in proteins], batch_tokens))
    found = MaskedScores(len(packs), device)
    for number in range(part, len(packs), parts):
        check_stop()
        packed = pack([proteins[place] for place in packs[number]])
        masked_T = masks_of_pack(packed, mask_rate).to(device)
        packed = packed.to(device)
        with arithmetic(model, compute):
            logits_TV = model(mask(packed.tokens_T, masked_T), packed.documents, logits=True).logits
        found.add(number, logits_TV, packed.tokens_T, masked_T)
        progress(number + 1, len(packs))
    return found
