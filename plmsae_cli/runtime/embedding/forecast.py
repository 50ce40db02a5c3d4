"""What an embedding will take, before it runs: tokens from the lengths, hours from a stated model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from plmsae_cli.config.launching import Launch
from plmsae_cli.plm.cost import Config, forward_flops
from plmsae_cli.runtime.embedding.packing import SPECIAL_TOKENS, Typical

_GPU_SHARE = 0.5
"""Of a GPU's peak that the forward pass is assumed to reach."""
_CORE_FLOPS = 16e9
"""Assumed of one CPU core in float32."""
_PIECE = 1 << 16
"""Proteins whose numbers are computed at a time: of millions every array counts."""


def typical(lengths_P: npt.NDArray[np.int32], max_length: int, ranges: Sequence[Sequence[int]]) -> Typical:
    """The largest shard and the whole, in tokens: from these every worker derives the same shapes of passes.

    Longer proteins are counted as windows of `max_length`, as `windows.pieces` makes them. `ranges` leave none out.
    """
    shards = [_tokens(lengths_P[start:stop], max_length) for start, stop in ranges]
    longest = int(min(lengths_P.max(), max_length)) + SPECIAL_TOKENS
    return Typical(
        max(tokens for tokens, _, _ in shards),
        max(documents for _, documents, _ in shards),
        longest,
        sum(tokens for tokens, _, _ in shards),
    )


def _tokens(lengths_P: npt.NDArray[np.int32], max_length: int) -> tuple[int, int, int]:
    """Tokens, documents, and the sum of the documents' squared tokens."""
    tokens = documents = squares = 0
    for start in range(0, len(lengths_P), _PIECE):
        part_P = lengths_P[start : start + _PIECE]
        documents_P = _documents(part_P, max_length)
        tokens_P = np.minimum(part_P, max_length).astype(np.int64) + SPECIAL_TOKENS
        tokens += int((tokens_P * documents_P).sum())
        documents += int(documents_P.sum())
        squares += int((tokens_P**2 * documents_P).sum())
    return tokens, documents, squares


def _documents(lengths_P: npt.NDArray[np.int32], max_length: int) -> npt.NDArray[np.int64]:
    beyond_P = np.maximum(lengths_P.astype(np.int64) - max_length, 0)
    return 1 - -beyond_P // max(1, max_length // 2)


def forecast(
    config: Config, depth: int, lengths_P: npt.NDArray[np.int32], max_length: int, launch: Launch, compute: str
) -> dict[str, Any]:
    """`hours` on this machine's devices as the launch has them, and `hours_from`: the model in words.

    Operations (`cost.forward_flops`) over an assumed rate: half of the GPU's peak, or 16 GFLOP/s a CPU core. No hours
    where the GPU's peak is not known.
    """
    tokens, _, squares = _tokens(lengths_P, max_length)
    flops = forward_flops(config, depth, float(tokens), float(squares))
    rate, device = _rate(launch, compute)
    work = f"{flops / max(tokens, 1) / 1e9:.3g} GFLOP a token x {tokens:,.0f} tokens"
    if rate is None:
        return {"hours_from": f"{work}; the rate of {device} is not known"}
    return {
        "hours": round(flops / rate / 3600, 4),
        "hours_from": f"{work} at {rate / 1e12:.3g} TFLOP/s, assumed of {device}",
    }


def _rate(launch: Launch, compute: str) -> tuple[float | None, str]:
    import torch

    from plmsae_cli.runtime.device import compute_dtype, count_gpus, peak_flops
    from plmsae_cli.runtime.environment import cpu_count

    gpus = count_gpus(launch)
    if gpus == 0:
        return _CORE_FLOPS * cpu_count(), f"{cpu_count()} CPU cores"
    device = torch.device("cuda", 0)
    dtype = compute_dtype(compute, device)
    # Half types run alike on these; old cards without bfloat16 have no entry.
    peak = peak_flops(device, torch.bfloat16 if dtype is torch.float16 else dtype)
    name = f"{gpus} x {torch.cuda.get_device_name(device)}"
    return (None, name) if peak is None else (peak * _GPU_SHARE * gpus, f"{name} ({_GPU_SHARE:.0%} of the peak)")
