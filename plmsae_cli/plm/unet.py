"""The UNet transformer of the protein speed runs, over packed sequences.

x = rms_norm(embedding); each block: x = l0 x + l1 x0; x += attention(rms_norm(x)); x += mlp(rms_norm(x)), where l0 and l1
are learned numbers and x0 is the embedding. Block i of the second half first adds w_i times what the block that mirrors
it gave. After Jordan et al., modded-nanogpt (2024), as SpeedrunningPLMs (Synthyra, 2024) applied it to proteins.

Shape letters: T tokens of the pack, M chosen tokens, D residual width, F feed-forward width, H heads, Dh width of a head,
N learned keys and values, V vocabulary. Layer 0 is x0; layer k the residual stream after block k, without a norm, the
last one too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from plmsae_cli.plm.alphabet import MASK
from plmsae_cli.plm.attention import Documents, attention, has_block_ops
from plmsae_cli.plm.gradients import lookup, rms_norm, scaled
from plmsae_cli.plm.passes import ESM2Output, Layers, Partway, Splice
from plmsae_cli.plm.rotary import Rotary, Tables, rotate
from plmsae_cli.plm.unet_config import UNetConfig


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


class Matrices(nn.Module):
    """q, k and v by one product."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.qkv_3DD = Parameter(torch.empty(3, config.d, config.d))

    def forward(self, x_TD: Tensor) -> Tensor:
        return _linear(x_TD, self.qkv_3DD.flatten(0, 1))


class LearnedTokens(nn.Module):
    """`p_attention`: each of q, k and v is softmax(W x · keys / sqrt(D)) values, over N learned keys and values."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        assert config.num_att_tokens is not None
        self.query_3DD = Parameter(torch.empty(3, config.d, config.d))
        self.keys_3ND = Parameter(torch.empty(3, config.num_att_tokens, config.d))
        self.values_3ND = Parameter(torch.empty(3, config.num_att_tokens, config.d))

    def forward(self, x_TD: Tensor) -> Tensor:
        parts = []
        for query_DD, keys_ND, values_ND in zip(self.query_3DD, self.keys_3ND, self.values_3ND, strict=True):
            scores_TN = _linear(_linear(x_TD, query_DD), keys_ND) / math.sqrt(x_TD.shape[1])
            parts.append(scores_TN.float().softmax(-1).to(x_TD.dtype) @ values_ND.to(x_TD.dtype))
        return torch.cat(parts, dim=1)


class Attention(nn.Module):
    """Rotary attention of normed q and k within documents; values are mixed with those of the token's embedding."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.num_heads, self.soft_cap = config.num_heads, config.attention_soft_cap
        self.project = Matrices(config) if config.num_att_tokens is None else LearnedTokens(config)
        self.out_DD = Parameter(torch.empty(config.d, config.d))
        self.value_mix_2 = Parameter(torch.empty(2)) if config.mixes_values else None

    def queries(self, x_TD: Tensor, embedded_TD: Tensor | None, rope: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """q and k, normed and turned, and v, each [T, H, Dh]."""
        qkv = self.project(x_TD).view(len(x_TD), 3, self.num_heads, -1)
        q, k, v = qkv.unbind(1)
        if self.value_mix_2 is not None:
            assert embedded_TD is not None
            l0, l1 = self.value_mix_2.unbind()
            v = (scaled(v.flatten(1), l0) + scaled(embedded_TD, l1)).view_as(v)
        return rotate(rms_norm(q), rope), rotate(rms_norm(k), rope), v


class Block(nn.Module):
    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.up_FD = Parameter(torch.empty(config.hidden, config.d))
        self.down_DF = Parameter(torch.empty(config.d, config.hidden))
        self.residual_mix_2 = Parameter(torch.empty(2)) if config.unet else None

    def before(
        self, x_TD: Tensor, x0_TD: Tensor, embedded_TD: Tensor | None, rope: Tables
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The stream with x0 mixed in, and what attention takes."""
        if self.residual_mix_2 is not None:
            l0, l1 = self.residual_mix_2.unbind()
            x_TD = scaled(x_TD, l0) + scaled(x0_TD, l1)
        return (x_TD, *self.attention.queries(rms_norm(x_TD), embedded_TD, rope))

    def after(self, x_TD: Tensor, mixed_THD: Tensor) -> Tensor:
        """The stream after the block, from what attention gave."""
        x_TD = x_TD + _linear(mixed_THD.flatten(1), self.attention.out_DD)
        return x_TD + _linear(F.relu(_linear(rms_norm(x_TD), self.up_FD)).square(), self.down_DF)

    def by_kernels(self, x_TD: Tensor, x0_TD: Tensor, table_VD: Tensor | None, state: Partway) -> Tensor:
        """As `forward`, by operations that store less between products."""
        from plmsae_cli.plm.block_ops import attend, feed

        if self.residual_mix_2 is not None:
            l0, l1 = self.residual_mix_2.unbind()
            x_TD = scaled(x_TD, l0) + scaled(x0_TD, l1)
        own, documents, window, dtype = self.attention, state.documents, state.window, x_TD.dtype
        assert isinstance(own.project, Matrices)
        assert state.position_T is not None
        assert documents.tiles is not None
        weight_3DD: Tensor = own.project.qkv_3DD
        if own.value_mix_2 is not None:
            assert table_VD is not None
            # Values are mixed in float32 weights: a smaller tensor, and rounded once.
            l0, l1 = own.value_mix_2.unbind()
            weight_3DD = torch.cat([weight_3DD[:2], weight_3DD[2:] * l0])
            table_VD = (table_VD * l1).to(dtype)
        near = 0 if window is None or window >= documents.max_len else window
        x_TD, squares_TP = attend(
            x_TD, weight_3DD.to(dtype), own.out_DD.to(dtype), table_VD, state.tokens_T, state.position_T, state.rope,
            documents.tiles, own.num_heads, near, own.soft_cap or 0.0,
        )  # fmt: skip
        return feed(x_TD, squares_TP, self.up_FD.to(dtype), self.down_DF.to(dtype))

    def forward(
        self,
        x_TD: Tensor,
        x0_TD: Tensor,
        embedded_TD: Tensor | None,
        rope: Tables,
        documents: Documents,
        window: int | None,
    ) -> Tensor:
        x_TD, q, k, v = self.before(x_TD, x0_TD, embedded_TD, rope)
        return self.after(x_TD, attention(q, k, v, *documents, window=window, soft_cap=self.attention.soft_cap))


class Head(nn.Module):
    """Norm, norm, dense, GELU, the vocabulary with a bias, cap tanh(z / cap)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.cap = config.soft_logit_cap
        self.dense_DD = Parameter(torch.empty(config.d, config.d))
        self.decoder_VD = None if config.tie_embeddings else Parameter(torch.empty(config.vocab, config.d))
        self.bias_V = Parameter(torch.empty(config.vocab))

    def forward(self, x_MD: Tensor, embedding_VD: Tensor) -> Tensor:
        """Logits [M, V] in float32 of the last layer's rows."""
        decoder_VD = embedding_VD if self.decoder_VD is None else self.decoder_VD
        # The second norm changes nothing but the gradient of a stream near 0, which is what the first steps have at <mask>
        # without an embedding: 1 / eps for 1 / sqrt(eps), as in the published runs.
        x_MD = rms_norm(rms_norm(x_MD))
        z_MV = _linear(F.gelu(_linear(x_MD, self.dense_DD)), decoder_VD).float() + self.bias_V.float()
        return self.cap * torch.tanh(z_MV / self.cap)


class UNet(Layers):
    """The protein language model. Weights are undefined until loaded or `init_weights` is called.

    Arithmetic is in the dtype of `compute`, by default that of the parameters, which may stay float32 masters.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.compute: torch.dtype | None = None
        self.embedding_VD = Parameter(torch.empty(config.vocab, config.d))
        tables = config.num_layers // 2 if config.mixes_values else 0
        self.value_tables = nn.ParameterList(torch.empty(config.vocab, config.d) for _ in range(tables))
        self.rotary = Rotary(config.head_dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.skip_weights = Parameter(torch.empty(config.num_layers // 2)) if config.unet else None
        self.lm_head = Head(config)

    def forward(
        self,
        tokens_T: Tensor,
        documents: Documents,
        layers: Sequence[int] = (),
        splice: Mapping[int, Splice] | None = None,
        logits: bool = False,
        window: int | None = None,
    ) -> ESM2Output:
        """Read layers, and optionally the logits, of a pack; as `ESM2.forward`.

        What `splice[k]` gives is what all layers above see, through skips too. `window`: as in `attention`.
        """
        return self._read(tokens_T, documents, layers, splice, logits, window=window)

    def trunk(self, tokens_T: Tensor, documents: Documents, rope: Tables, window: int | None) -> Tensor:
        """The last layer [T, D]: what a training step compiles. `rope`: the tokens' tables, which a compiler would compute
        again in every kernel that turns by them."""
        state = self._begin(tokens_T, documents, rope, window)
        return self.above(state, state.x_TD)

    def embedded(self, tokens_T: Tensor, dtype: torch.dtype) -> Tensor:
        """Layer 0, [T, D], of int64 tokens."""
        x_TD = rms_norm(lookup(self.embedding_VD.to(dtype), tokens_T))
        return x_TD if self.config.mask_embedding else x_TD.masked_fill((tokens_T == MASK)[:, None], 0)

    def head(self, x_MD: Tensor) -> Tensor:
        """Logits [M, V], float32, of rows of the last layer."""
        return cast(Tensor, self.lm_head(x_MD, self.embedding_VD))

    def _begin(
        self, tokens_T: Tensor, documents: Documents, rope: Tables | None = None, window: int | None = None
    ) -> Partway:
        tokens_T, documents = tokens_T.long(), documents.tiled(tokens_T.shape[0])
        dtype = self.compute or self.embedding_VD.dtype
        if self._trains_by_kernels(tokens_T.device, dtype) and documents.tiles is not None:
            position_T = documents.locate(tokens_T.shape[0])[1].int()
            rope = self.rotary(torch.arange(documents.max_len, device=tokens_T.device))
            x0_TD = self.embedded(tokens_T, dtype)
            return Partway(
                0, x0_TD, tokens_T, documents, rope, window, tables=tuple(self.value_tables), position_T=position_T
            )
        if rope is None:
            rope = self.rotary(documents.locate(tokens_T.shape[0])[1])
        tables = tuple(table.to(dtype) for table in self.value_tables)
        return Partway(0, self.embedded(tokens_T, dtype), tokens_T, documents, rope, window, tables=tables)

    def _trains_by_kernels(self, device: torch.device, dtype: torch.dtype) -> bool:
        config = self.config
        return (
            torch.is_grad_enabled()
            and config.num_att_tokens is None
            and has_block_ops(device.type, device.index, dtype == torch.bfloat16, config.num_heads, config.head_dim)
        )

    def _next(self, state: Partway) -> Partway:
        i, x_TD, kept = state.layer, state.x_TD, state.kept
        half = self.config.num_layers // 2
        if i == 0 or (i <= half and self.skip_weights is not None):
            kept = (*kept, x_TD)  # layer 0 is x0, the others are skips, the highest last
        x0_TD = kept[0]
        if self.skip_weights is not None and i >= half:
            kept, skip_TD = kept[:-1], kept[-1]
            x_TD = x_TD + scaled(skip_TD, self.skip_weights[i - half])
        if state.position_T is not None:
            table_VD = state.tables[min(i, 2 * half - 1 - i)] if state.tables else None
            x_TD = cast(Block, self.layers[i]).by_kernels(x_TD, x0_TD, table_VD, state)
            return state._replace(layer=i + 1, x_TD=x_TD, kept=kept)
        # Looked up in each block: that costs nothing inside the kernel that mixes it in, a stored one memory.
        embedded_TD = lookup(state.tables[min(i, 2 * half - 1 - i)], state.tokens_T) if state.tables else None
        x_TD = self.layers[i](x_TD, x0_TD, embedded_TD, state.rope, state.documents, state.window)
        return state._replace(layer=i + 1, x_TD=x_TD, kept=kept)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw weights to train from, the same for a seed on any device and in any dtype.

        Embeddings, learned keys and values are normal; a tied embedding has deviation 1 / sqrt(D), since it is the output
        too. Matrices are uniform within 1 / sqrt(fan-in), those that write into the stream zero.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            kind = name.rpartition(".")[2]
            shape = parameter.shape
            if kind in ("out_DD", "down_DF", "bias_V"):
                parameter.zero_()
            elif kind == "residual_mix_2":
                parameter.copy_(torch.tensor([1.0, 0.0]))
            elif kind == "value_mix_2":
                parameter.fill_(0.5)
            elif kind == "skip_weights":
                parameter.fill_(1.0)
            elif kind == "embedding_VD" or "value_tables" in name or kind in ("keys_3ND", "values_3ND"):
                tied = kind == "embedding_VD" and self.config.tie_embeddings
                scale = 1 / math.sqrt(self.config.d) if tied else 1.0
                parameter.copy_(torch.randn(shape, generator=generator) * scale)
            else:
                bound = 1 / math.sqrt(shape[-1])
                parameter.copy_((2 * torch.rand(shape, generator=generator) - 1) * bound)
