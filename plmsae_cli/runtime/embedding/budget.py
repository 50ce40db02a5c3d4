"""How many tokens a pass takes, and whether compiling it pays."""

from __future__ import annotations

import torch

from plmsae_cli.plm.cost import Config, matrix_flops, peak_activations

CPU_TOKENS = 4096
MOST_TOKENS = 65_536
"""More gains nothing on an H100: its matrix products are full."""
_LEAST_TOKENS = 2048
_SHARE = 0.6
"""Of the free memory: the rest is for fragments, compilation and what the next pass already holds."""
_REPAYS_FLOPS = 2e16
"""Operations of a job that compiling speeds up by more than it takes: about a minute of an H100."""


def auto_tokens(config: Config, device: torch.device, dtype: torch.dtype, num_layers: int) -> int:
    """Tokens of one pass that hands out `num_layers` layers: what fits the device's free memory, within bounds."""
    if device.type == "cpu":
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    # What torch has reserved and nobody uses is free for the next pass too.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return tokens_in(int(free * _SHARE), config.d, dtype.itemsize, num_layers)


def tokens_in(memory: int, d: int, itemsize: int, num_layers: int) -> int:
    """Tokens whose activations fit `memory` bytes; between 2,048 and 65,536, so that even a full GPU tries.

    In whole steps of 2,048: a little more or less free memory gives the same packs, and so the same bytes.
    """
    fitting = memory // (peak_activations(num_layers) * d * itemsize)
    return min(MOST_TOKENS, max(_LEAST_TOKENS, fitting // _LEAST_TOKENS * _LEAST_TOKENS))


def compiling_pays(wanted: str | bool, config: Config, device: torch.device, depth: int, tokens: float) -> bool:
    """Whether to compile a job of so many tokens through `depth` blocks: as wanted; `auto`: on CUDA, if it is long."""
    if isinstance(wanted, bool):
        return wanted
    return device.type == "cuda" and matrix_flops(config, depth) * tokens > _REPAYS_FLOPS
