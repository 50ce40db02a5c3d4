"""Frozen activations of all layers, by residue or pooled over each protein."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from plmsae_cli.evaluation.proteins import groups
from plmsae_cli.evaluation.rows import group_residues
from plmsae_cli.runtime.embedding import Embedder


def layer_features(
    embedder: Embedder,
    sequences: Sequence[str],
    layers: Sequence[int],
    keep: Sequence[Tensor] | None,
    batch_tokens: str | int,
    check_stop: Callable[[], None],
    progress: Callable[[float, float], None],
) -> dict[int, Tensor]:
    """For each layer, float32 on the CPU: mean over each protein [P, D], or with `keep` the residues it marks [R, D].

    `keep` has a bool [L] a protein. A device holds the activations of one group of proteins at a time.
    """
    kept: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    batches = list(groups([len(sequence) for sequence in sequences], group_residues(embedder.device)))
    for done, places in enumerate(batches):
        check_stop()
        progress(done, len(batches))
        wanted = [sequences[p] for p in places]
        found = embedder.run(
            wanted, layers, [False] * len(wanted), embedder.compute, batch_tokens, lambda *_, **__: None, check_stop
        )
        lengths = [len(sequence) for sequence in wanted]
        for layer in layers:
            rows_RD = found[layer][0].float()
            if keep is None:
                kept[layer].append(
                    torch.stack([rows.double().mean(0) for rows in torch.split(rows_RD, lengths)]).float()
                )
            else:
                kept[layer].append(rows_RD[torch.cat([keep[p] for p in places])])
    return {layer: torch.cat(parts) for layer, parts in kept.items()}
