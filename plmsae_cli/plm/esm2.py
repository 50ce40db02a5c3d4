"""ESM-2 (Lin et al., Science 2023) over packed sequences.

Numerically the model of fair-esm 2.0.0, whose parameter names it keeps. Differences of form: documents are
packed into one stream instead of padded into a batch, the forward pass stops after the last layer wanted, and
layers can be read and replaced. Shape letters: T tokens of the pack, S documents, D residual width, H heads,
Dh width of a head, V vocabulary.

Layer k: 0 is the scaled embedding; k from 1 to N - 1 is the residual stream after block k, without LayerNorm;
N is the stream after the last block and the final LayerNorm. The same tensor as fair-esm's
`representations[k]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plmsae_cli.plm.alphabet import MASK, PAD, VOCAB_SIZE
from plmsae_cli.plm.attention import Documents, attention
from plmsae_cli.plm.passes import ESM2Output, Layers, Partway, Splice
from plmsae_cli.plm.rotary import Rotary, Tables, rotate

# Training masked 15 % of the tokens and zeroed 80 % of those, so embeddings are scaled to that share of
# zeros.
_KEPT_IN_TRAINING = 1 - 0.15 * 0.8


@dataclass(frozen=True)
class ESM2Config:
    """Shape of an ESM-2 model. Raises ValueError where the heads do not divide the width into even parts."""

    num_layers: int
    d: int
    """Width of the residual stream; the feed-forward layers are four times as wide."""
    num_heads: int
    token_dropout: bool = True
    """Zero the embedding of `<mask>` and rescale the others per sequence, as the published models do."""
    vocab: int = VOCAB_SIZE

    def __post_init__(self) -> None:
        if self.d % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"d {self.d} with num_heads {self.num_heads}: each head needs the same even width, "
                f"so d must be a multiple of {2 * self.num_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.d // self.num_heads

    @property
    def block_matrices(self) -> int:
        """Weights in the products of a block."""
        return 12 * self.d**2

    @property
    def num_parameters(self) -> int:
        """Trained numbers, the language-model head included (its output weight is the embedding's)."""
        d = self.d
        block = 12 * d * d + 13 * d
        head = d * d + 3 * d + self.vocab
        return self.vocab * d + self.num_layers * block + 2 * d + head


PUBLISHED: dict[str, ESM2Config] = {
    "esm2_t6_8M_UR50D": ESM2Config(6, 320, 20),
    "esm2_t12_35M_UR50D": ESM2Config(12, 480, 20),
    "esm2_t30_150M_UR50D": ESM2Config(30, 640, 20),
    "esm2_t33_650M_UR50D": ESM2Config(33, 1280, 20),
    "esm2_t36_3B_UR50D": ESM2Config(36, 2560, 40),
    "esm2_t48_15B_UR50D": ESM2Config(48, 5120, 40),
}


class SelfAttention(nn.Module):
    def __init__(self, d: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, d // num_heads
        self.q_proj = nn.Linear(d, d)
        self.k_proj = nn.Linear(d, d)
        self.v_proj = nn.Linear(d, d)
        self.out_proj = nn.Linear(d, d)

    def forward(self, x_TD: Tensor, rope: Tables, documents: Documents) -> Tensor:
        # One product for the three: 5 % of the whole model's speed on an H100 once compiled.
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat([p.weight for p in projections])
        bias = torch.cat([p.bias for p in projections])
        q, k, v = F.linear(x_TD, weight, bias).view(-1, 3, self.num_heads, self.head_dim).unbind(1)
        mixed_THD = attention(rotate(q, rope), rotate(k, rope), v, *documents)
        return self.out_proj(mixed_THD.flatten(1))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-LayerNorm transformer block; biases everywhere, erf GELU, feed-forward of four times the width."""

    def __init__(self, d: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(d)
        self.self_attn = SelfAttention(d, num_heads)
        self.final_layer_norm = nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, 4 * d)
        self.fc2 = nn.Linear(4 * d, d)

    def forward(self, x_TD: Tensor, rope: Tables, documents: Documents) -> Tensor:
        x_TD = x_TD + self.self_attn(self.self_attn_layer_norm(x_TD), rope, documents)
        return x_TD + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x_TD))))  # type: ignore[no-any-return]


class LMHead(nn.Module):
    """Dense, GELU, LayerNorm, then the embedding's own weight and a bias."""

    def __init__(self, d: int, vocab: int) -> None:
        super().__init__()
        self.dense = nn.Linear(d, d)
        self.layer_norm = nn.LayerNorm(d)
        self.bias = nn.Parameter(torch.zeros(vocab))

    def forward(self, x_TD: Tensor, embedding_VD: Tensor) -> Tensor:
        return F.linear(self.layer_norm(F.gelu(self.dense(x_TD))), embedding_VD, self.bias)


class ESM2(Layers):
    """The protein language model. Parameters are torch's defaults until loaded or `init_weights` is
    called."""

    def __init__(self, config: ESM2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.d, padding_idx=PAD)
        self.rotary = Rotary(config.head_dim)
        self.layers = nn.ModuleList(Block(config.d, config.num_heads) for _ in range(config.num_layers))
        self.emb_layer_norm_after = nn.LayerNorm(config.d)
        self.lm_head = LMHead(config.d, config.vocab)

    def forward(
        self,
        tokens_T: Tensor,
        documents: Documents,
        layers: Sequence[int] = (),
        splice: Mapping[int, Splice] | None = None,
        logits: bool = False,
        rope: Tables | None = None,
    ) -> ESM2Output:
        """Read layers, and optionally the logits, of a pack.

        `tokens_T` holds integers of any type, `documents` says where each sequence lies. `splice[k]` maps
        layer k [T, D] to what the layers above see in its place (it must not write into its argument). Only
        the blocks below the last layer wanted are run, unless the logits are asked for. Raises ValueError for
        a layer the model does not have, and if nothing is asked for. `rope`: the tokens' rotary tables, where they are
        known.
        """
        return self._read(tokens_T, documents, layers, splice, logits, rope=rope)

    def head(self, x_MD: Tensor) -> Tensor:
        return cast(Tensor, self.lm_head(x_MD, self.embed_tokens.weight))

    def _begin(
        self, tokens_T: Tensor, documents: Documents, rope: Tables | None = None, window: int | None = None
    ) -> Partway:
        assert window is None, "ESM-2 attends to whole documents"
        tokens_T, documents = tokens_T.long(), documents.tiled(tokens_T.shape[0])
        document_T, position_T = documents.locate(tokens_T.shape[0])
        x_TD = self.embed(tokens_T, documents, document_T)
        return Partway(0, x_TD, tokens_T, documents, self.rotary(position_T) if rope is None else rope)

    def _next(self, state: Partway) -> Partway:
        x_TD = self.layers[state.layer](state.x_TD, state.rope, state.documents)
        layer = state.layer + 1
        if layer == self.config.num_layers:
            x_TD = self.emb_layer_norm_after(x_TD)
        return state._replace(layer=layer, x_TD=x_TD)

    def embed(self, tokens_T: Tensor, documents: Documents, document_T: Tensor) -> Tensor:
        """Layer 0: embeddings with `<pad>` zeroed and, under token dropout, `<mask>` zeroed and the rest
        rescaled."""
        x_TD = self.embed_tokens(tokens_T)
        pad_T = tokens_T == PAD
        if not self.config.token_dropout:
            return x_TD.masked_fill(pad_T[:, None], 0.0)  # type: ignore[no-any-return]
        mask_T = tokens_T == MASK
        # Documents of padding alone would divide by zero.
        num_real_S = documents.per_document(~pad_T).clamp(min=1)
        share_masked_S = documents.per_document(mask_T).float() / num_real_S
        scale_T = (_KEPT_IN_TRAINING / (1 - share_masked_S))[document_T].masked_fill(pad_T | mask_T, 0.0)
        return (x_TD * scale_T[:, None]).to(x_TD.dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw weights to train from: normal, the same for a seed on any device and in any dtype.

        Projections have variance 1 / fan-in, those that write into the residual stream 1 / (2 N) of that
        (Radford et al., GPT-2, 2019); embeddings have deviation 0.02, so that the tied head starts near
        uniform; biases are 0.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(weight: Tensor, std: float) -> None:
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)

        draw(self.embed_tokens.weight, 0.02)
        self.embed_tokens.weight[PAD] = 0.0
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                depth = 2 * self.config.num_layers if name.endswith(("out_proj", "fc2")) else 1
                draw(module.weight, 1 / math.sqrt(module.in_features * depth))
                module.bias.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        self.lm_head.bias.zero_()
