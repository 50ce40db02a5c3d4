"""Real activations for benchmarks, made in the GPU's memory: no dataset on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from plmsae_cli.plm.alphabet import encode, pack
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.store.fasta import records

PASS_TOKENS, LONGEST = 32_768, 1022


@torch.inference_mode()
def activations(
    model: str, fasta: str, layers: Sequence[int], rows: int, heldout: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """`rows` training and `heldout` held-out residue rows, bfloat16 on the GPU, of different proteins; training rows shuffled.

    Those of several layers stand side by side. Without a GPU the model runs in float32.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plm = load_plm(model, device=device.type, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    out = torch.empty(rows + heldout, len(layers) * plm.config.d, dtype=torch.bfloat16, device=device)
    filled, waiting, size = 0, [], 0
    for _, _, sequence in records(Path(fasta)):
        waiting.append(encode(sequence[:LONGEST]))
        size += len(waiting[-1])
        if size < PASS_TOKENS:
            continue
        packed = pack(waiting).to(device)
        hidden = plm(packed.tokens_T, packed.documents, layers=list(layers)).hidden
        found = torch.cat([hidden[layer][packed.residue_mask_T] for layer in layers], 1)
        waiting, size = [], 0
        found = found[: len(out) - filled].bfloat16()
        out[filled : filled + len(found)] = found
        filled += len(found)
        if filled == len(out):
            break
    assert filled == len(out), f"{fasta} has too few residues: {filled:,} of {len(out):,}"
    order_R = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).to(device)
    return out[:rows][order_R], out[rows:]
