"""What a forward pass costs, from the model's shape alone."""

from __future__ import annotations

from plmsae_cli.plm.esm2 import ESM2Config
from plmsae_cli.plm.unet_config import UNetConfig

Config = ESM2Config | UNetConfig


def matrix_flops(config: Config, depth: int) -> int:
    """Floating-point operations of the matrix products of a token's pass through `depth` blocks: 2 a weight."""
    return 2 * config.block_matrices * depth


def forward_flops(config: Config, depth: int, tokens: float, squared_tokens: float) -> float:
    """Operations of documents that have `tokens` tokens, and `squared_tokens` as the sum of their squares.

    Products with weights, and the two of attention, 4 d L² a document of L tokens and block.
    """
    return matrix_flops(config, depth) * tokens + 4.0 * config.d * depth * squared_tokens


def peak_activations(depth_outputs: int) -> int:
    """Numbers of width d that a token occupies at the widest point of a pass that hands out so many layers.

    Residual stream 2, LayerNorm 1, feed-forward 4 before and 4 after GELU, its output 1, q, k, v and the rotated pair 5,
    and for each layer handed out its gathered rows, some of them still on their way to the host.
    """
    return 17 + 3 * depth_outputs
