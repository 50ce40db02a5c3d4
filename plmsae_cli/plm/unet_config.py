"""The shape of the UNet transformer, and what a model of that shape holds and costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plmsae_cli.plm.alphabet import VOCAB_SIZE

_WIDTHS = 256
"""Feed-forward layers are a multiple of this wide."""


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet transformer. Raises ValueError where heads or halves do not come out even."""

    num_layers: int
    d: int
    """Width of the residual stream."""
    num_heads: int
    expansion_ratio: float = 8 / 3
    """Width of the feed-forward layers over d, before rounding up."""
    soft_logit_cap: float = 32.0
    attention_soft_cap: float | None = None
    tie_embeddings: bool = False
    unet: bool = True
    """Skips from the first half to the second, and the embedding mixed into every block; without, a plain transformer."""
    value_embeddings: bool = True
    mask_embedding: bool = True
    """`<mask>` has an embedding like any token; without, the stream and x0 begin at 0 there."""
    num_att_tokens: int | None = None
    """Learned keys and values that make q, k and v (`p_attention`); None: matrices do."""
    vocab: int = VOCAB_SIZE
    architecture: Literal["unet"] = "unet"

    def __post_init__(self) -> None:
        if self.architecture != "unet":
            raise ValueError(f"architecture {self.architecture!r} is not unet")
        if self.d % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"d {self.d} with num_heads {self.num_heads}: each head needs the same even width, "
                f"so d must be a multiple of {2 * self.num_heads}"
            )
        if self.unet and self.num_layers % 2:
            raise ValueError(f"num_layers {self.num_layers} is odd, and a UNet has two halves")

    @property
    def head_dim(self) -> int:
        return self.d // self.num_heads

    @property
    def hidden(self) -> int:
        """Width of the feed-forward layers."""
        return int(self.expansion_ratio * self.d + _WIDTHS - 1) // _WIDTHS * _WIDTHS

    @property
    def mixes_values(self) -> bool:
        return self.unet and self.value_embeddings

    @property
    def block_matrices(self) -> int:
        """Weights in the products of a block."""
        tokens = self.num_att_tokens
        projection = self.d**2 if tokens is None else self.d**2 + 2 * tokens * self.d
        return 3 * projection + self.d**2 + 2 * self.d * self.hidden

    @property
    def num_parameters(self) -> int:
        """Trained numbers, each counted once."""
        d, layers = self.d, self.num_layers
        table = self.vocab * d
        tables = 1 + (layers // 2 if self.mixes_values else 0) + (0 if self.tie_embeddings else 1)
        scalars = (2 * layers + layers // 2 if self.unet else 0) + (2 * layers if self.mixes_values else 0)
        return tables * table + layers * self.block_matrices + d * d + self.vocab + scalars

    def train_flops(self, context: float, predicted: float) -> float:
        """Floating-point operations a token of a forward and a backward pass: 6 a weight of a product, 12 d a layer and
        token attended to. `context`: how many those are; `predicted`: the share of tokens that the head reads."""
        head = self.d**2 + self.vocab * self.d
        return 6 * (self.num_layers * self.block_matrices + predicted * head) + 12 * self.num_layers * self.d * context
