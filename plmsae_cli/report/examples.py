"""The latents worth a look, and where they fire most."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from plmsae_cli.report.plots import INTERESTING
from plmsae_cli.report.reading import Latents
from plmsae_cli.report.words import clean, count, number, percent


class Example(NamedTuple):
    """A latent worth a look, with the residue that excites it most: text before, the residue, text after."""

    latent: int
    density: str
    max: str
    mean_active: str
    protein: str
    residue: str
    context: tuple[str, str, str] | None


def examples(latents: Latents, limit: int = 20) -> list[Example]:
    """The latents with the largest maximum among those whose density lies in `INTERESTING`."""
    low, high = INTERESTING
    chosen = np.flatnonzero((latents.density >= low) & (latents.density <= high) & np.isfinite(latents.max))
    chosen = chosen[np.argsort(-latents.max[chosen], kind="stable")][:limit]
    absent = [None] * len(latents.latent)
    contexts = latents.examples.get("top_context", absent)
    offsets = latents.examples.get("top_context_offset", absent)
    places = latents.examples.get("top_residue", absent)
    proteins = latents.examples.get("top_protein", absent)
    return [
        Example(
            latent=int(latents.latent[row]),
            density=percent(float(latents.density[row])),
            max=number(float(latents.max[row])),
            mean_active=number(float(latents.mean_active[row])),
            protein=clean(proteins[row] or "", 60),
            residue="" if places[row] is None else count(places[row]),
            context=split_context(contexts[row], offsets[row]),
        )
        for row in chosen
    ]


def split_context(context: str | None, offset: int | None) -> tuple[str, str, str] | None:
    """Text before the residue at `offset` (from 0), the residue, text after; None without a context."""
    if not context or offset is None:
        return None
    text = clean(context, 80)
    return text[:offset], text[offset : offset + 1], text[offset + 1 :]
