"""A trained SAE as a folder anyone can load: `sae.safetensors` eats raw activations, `sae.json` says which."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from plmsae_cli.sae.export import fold, to_state
from plmsae_cli.store.blocks import Blocks
from plmsae_cli.store.fs import FileRecord, Store, join
from plmsae_cli.store.tensorfile import write_tensors
from plmsae_cli.training.sae_objective import SAEObjective

FORMAT = "plmsae.sae/1"
MAXIMUM_ROWS = 10_000_000
"""Training rows over which each latent's maximum is taken."""


def export_sae(
    objective: SAEObjective,
    blocks: Blocks,
    mean_D: torch.Tensor,
    scale: float,
    facts: Mapping[str, Any],
    folder: str,
    store: Store,
) -> list[FileRecord]:
    """Fold the normalisation in, measure every latent's maximum over training rows, write both files."""
    model = fold(objective.model, mean_D.to(objective.device), scale)
    rows = min(blocks.num_rows, MAXIMUM_ROWS)
    measure_maximum(model, blocks, rows, objective.device)
    tensors, config = to_state(model)
    body = {
        "format": FORMAT,
        "config": config,
        "normalisation": {"scale": scale, "folded": True},
        "maximum_rows": rows,
        **facts,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return [
        write_tensors(store, join(folder, "sae.safetensors"), tensors, {"format": FORMAT}),
        store.write(join(folder, "sae.json"), [json.dumps(body, indent=1, sort_keys=True).encode()]),
    ]


@torch.inference_mode()
def measure_maximum(model: Any, blocks: Blocks, rows: int, device: torch.device, batch: int = 4096) -> None:
    """Set `model.maximum_N` to each latent's largest activation over the first `rows` rows (they are shuffled)."""
    maximum_N = torch.zeros(model.num_latents, device=device)
    for start in range(0, rows, batch):
        raw_BD = torch.empty(min(batch, rows - start), blocks.d, dtype=blocks.dtype)
        blocks.read_into(start, raw_BD)
        latents = model.encode(raw_BD.to(device).float())
        maximum_N.scatter_reduce_(0, latents.indices_BK.flatten(), latents.acts_BK.flatten(), "amax")
    model.maximum_N.copy_(maximum_N)
