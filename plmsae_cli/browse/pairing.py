"""Two runs side by side: for each latent of one its counterparts in the other."""

from __future__ import annotations

from typing import Any

import torch

from plmsae_cli.browse.encoder import Encoder
from plmsae_cli.browse.features import Features
from plmsae_cli.browse.matching import best_correlation, best_cosine
from plmsae_cli.browse.scripts import column
from plmsae_cli.config.errors import UserError
from plmsae_cli.runtime.saved import load_sae_with_facts

RESIDUES = 20_000
"""Residues on which co-activation is measured: of the proteins with examples, by number, both runs' in turn."""


def pair(first: Features, second: Features) -> list[dict[str, Any]]:
    """What `data/<n>/matches.js` holds, of the first run and of the second.

    Decoder rows are compared where both read one layer of one model; activations wherever both models are at hand.

    Raises:
        UserError: neither can be compared.
    """
    saved = [load_sae_with_facts(one.run) for one in (first, second)]
    models = [one.model for one in saved]
    same = all(
        saved[0].facts.get(key) == saved[1].facts.get(key) and saved[0].facts.get(key) is not None
        for key in ("weights", "layer")
    )
    bodies: list[dict[str, Any]] = [{}, {}]
    if same and models[0].d == models[1].d:
        for a, b in ((0, 1), (1, 0)):
            number, value = best_cosine(models[a].w_dec_ND.detach(), models[b].w_dec_ND.detach())
            bodies[a]["cosine"] = {"latent": column(number, "u4"), "value": column(value, "f4")}
    sequences = _sequences(first, second)
    try:
        latents = [Encoder(one.run).latents(sequences) for one in (first, second)] if sequences else []
    except UserError as error:
        if not bodies[0]:
            raise UserError(f"{first.run} and {second.run} cannot be compared: {error}", error.hint) from error
        return bodies
    for a, b in ((0, 1), (1, 0)) if latents else ():
        number, value = best_correlation(latents[a], latents[b], models[a].num_latents, models[b].num_latents)
        none = torch.where(number < 0, models[b].num_latents, number)
        bodies[a]["together"] = {"latent": column(none, "u4"), "value": column(value, "f4")}
        bodies[a]["residues"] = len(latents[a].acts_BK)
    return bodies


def _sequences(first: Features, second: Features) -> list[str]:
    both = [[row["sequence"] for row in one.proteins.values() if row["sequence"]] for one in (first, second)]
    turns = [text for pair in zip(*both, strict=False) for text in pair]
    chosen: dict[str, None] = {}
    used = 0
    for text in turns:
        if text not in chosen and used + len(text) <= RESIDUES:
            chosen[text] = None
            used += len(text)
    return list(chosen)
