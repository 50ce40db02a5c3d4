"""A trained SAE as a folder anyone can load: `sae.safetensors` eats raw activations, `sae.json` says which."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.export import fold, to_state
from plmsae_cli.store.blocks import Blocks
from plmsae_cli.store.fs import FileRecord, Store, join
from plmsae_cli.store.tensorfile import write_tensors
from plmsae_cli.training.sae_objective import SAEObjective

FORMAT = "plmsae.sae/1"
MAXIMUM_ROWS = 10_000_000
"""Training rows over which each latent's maximum is taken."""
SCORES = 2**28
"""Pre-activations held at once while it is taken: a gigabyte, however wide the dictionary."""


class Finished(NamedTuple):
    """A trained objective, what sae.json says of it, and the folder to write."""

    objective: SAEObjective
    facts: Mapping[str, Any]
    folder: str


def export_saes(
    finished: Sequence[Finished], blocks: Blocks, mean_D: torch.Tensor, scale: float, store: Store
) -> list[list[FileRecord]]:
    """Of released objectives: fold the scaling in, measure every latent's maximum in one reading, write both files of each."""
    models = []
    for objective, _, _ in finished:
        models.append(fold(objective.model, mean_D.to(objective.device), scale))
    rows = min(blocks.num_rows, MAXIMUM_ROWS)
    measure_maximum(models, blocks, rows)
    return [
        write_sae(model, scale, {"maximum_rows": rows, **facts}, folder, store)
        for model, (_, facts, folder) in zip(models, finished, strict=True)
    ]


def write_sae(model: Dictionary, scale: float, facts: Mapping[str, Any], folder: str, store: Store) -> list[FileRecord]:
    """Both files of a folded model; `scale` is that of the activations it was trained on."""
    tensors, config = to_state(model)
    body = {"format": FORMAT, "config": config, "normalisation": {"scale": scale, "folded": True}, **facts}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return [
        write_tensors(store, join(folder, "sae.safetensors"), tensors, {"format": FORMAT}),
        store.write(join(folder, "sae.json"), [json.dumps(body, indent=1, sort_keys=True).encode()]),
    ]


@torch.inference_mode()
def measure_maximum(models: Sequence[Dictionary], blocks: Blocks, rows: int, batch: int = 4096) -> None:
    """Set each model's `maximum_N` to its latents' largest activations over the first `rows` rows (they are shuffled)."""
    maxima = [torch.zeros_like(model.maximum_N) for model in models]
    for start in range(0, rows, batch):
        raw_BD = blocks.decode(blocks.read(start, min(start + batch, rows)).to(maxima[0].device))
        for model, maximum_N in zip(models, maxima, strict=True):
            for part_BD in torch.split(raw_BD, max(1, SCORES // model.num_latents)):
                torch.maximum(maximum_N, model.largest(part_BD), out=maximum_N)
    for model, maximum_N in zip(models, maxima, strict=True):
        model.maximum_N.copy_(maximum_N)
