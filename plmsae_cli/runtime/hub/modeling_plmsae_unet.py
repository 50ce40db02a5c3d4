"""The UNet transformer of plmsae for Hugging Face transformers: plain PyTorch, padded batches.

Nothing but torch and transformers is imported, so the file works wherever it is copied to. Shape letters: B sequences,
L tokens of the longest, D residual width, H heads, Dh width of a head, N learned keys and values, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput


class PlmsaeUNetConfig(PretrainedConfig):
    """Shape of the model."""

    model_type = "plmsae_unet"

    def __init__(
        self,
        vocab_size: int = 33,
        hidden_size: int = 192,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 6,
        intermediate_size: int = 512,
        soft_logit_cap: float = 32.0,
        attention_soft_cap: float | None = None,
        unet: bool = True,
        value_embeddings: bool = True,
        num_att_tokens: int | None = None,
        tied_output: bool = False,
        mask_embedding: bool = True,
        pad_token_id: int = 1,
        mask_token_id: int = 32,
        **others: Any,
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.intermediate_size, self.soft_logit_cap = intermediate_size, soft_logit_cap
        self.attention_soft_cap, self.unet, self.value_embeddings = attention_soft_cap, unet, value_embeddings
        self.num_att_tokens, self.tied_output = num_att_tokens, tied_output
        self.mask_embedding, self.mask_token_id = mask_embedding, mask_token_id
        super().__init__(**{"pad_token_id": pad_token_id, **others})


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=2.0**-23)


def rotate(x_BHLDh: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
    """Turn the pairs (i, i + Dh / 2) of each head by the position's angles, in fp32."""
    first, second = x_BHLDh.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos_LD - second * sin_LD, second * cos_LD + first * sin_LD), dim=-1)
    return turned.to(x_BHLDh.dtype)


class Matrices(nn.Module):
    def __init__(self, config: PlmsaeUNetConfig) -> None:
        super().__init__()
        self.qkv_3DD = nn.Parameter(torch.empty(3, config.hidden_size, config.hidden_size))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return F.linear(x_BLD, self.qkv_3DD.flatten(0, 1))


class LearnedTokens(nn.Module):
    """Each of q, k and v is softmax(W x · keys / sqrt(D)) values, over N learned keys and values."""

    def __init__(self, config: PlmsaeUNetConfig) -> None:
        super().__init__()
        assert config.num_att_tokens is not None
        d, number = config.hidden_size, config.num_att_tokens
        self.query_3DD = nn.Parameter(torch.empty(3, d, d))
        self.keys_3ND = nn.Parameter(torch.empty(3, number, d))
        self.values_3ND = nn.Parameter(torch.empty(3, number, d))

    def forward(self, x_BLD: Tensor) -> Tensor:
        parts = []
        for query_DD, keys_ND, values_ND in zip(self.query_3DD, self.keys_3ND, self.values_3ND, strict=True):
            scores_BLN = F.linear(F.linear(x_BLD, query_DD), keys_ND) / math.sqrt(x_BLD.shape[-1])
            parts.append(scores_BLN.float().softmax(-1).to(x_BLD.dtype) @ values_ND)
        return torch.cat(parts, dim=-1)


class Attention(nn.Module):
    def __init__(self, config: PlmsaeUNetConfig) -> None:
        super().__init__()
        self.num_heads, self.soft_cap = config.num_attention_heads, config.attention_soft_cap
        self.project = Matrices(config) if config.num_att_tokens is None else LearnedTokens(config)
        self.out_DD = nn.Parameter(torch.empty(config.hidden_size, config.hidden_size))
        self.value_mix_2 = nn.Parameter(torch.empty(2)) if config.value_embeddings else None

    def forward(
        self, x_BLD: Tensor, embedded_BLD: Tensor | None, rope: tuple[Tensor, Tensor], seen_B11L: Tensor
    ) -> Tensor:
        q_BLD, k_BLD, v_BLD = self.project(x_BLD).chunk(3, dim=-1)
        if self.value_mix_2 is not None:
            assert embedded_BLD is not None
            v_BLD = self.value_mix_2[0] * v_BLD + self.value_mix_2[1] * embedded_BLD
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q_BLD, k_BLD, v_BLD))
        q, k = rotate(rms_norm(q), *rope), rotate(rms_norm(k), *rope)
        if self.soft_cap is None:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_B11L)
        else:
            scores = self.soft_cap * torch.tanh((q @ k.mT).float() / math.sqrt(q.shape[-1]) / self.soft_cap)
            mixed = scores.masked_fill(~seen_B11L, -math.inf).softmax(-1).to(v.dtype) @ v
        return F.linear(mixed.transpose(1, 2).flatten(2), self.out_DD)


class Block(nn.Module):
    def __init__(self, config: PlmsaeUNetConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.up_FD = nn.Parameter(torch.empty(config.intermediate_size, config.hidden_size))
        self.down_DF = nn.Parameter(torch.empty(config.hidden_size, config.intermediate_size))
        self.residual_mix_2 = nn.Parameter(torch.empty(2)) if config.unet else None

    def forward(
        self, x: Tensor, x0: Tensor, embedded: Tensor | None, rope: tuple[Tensor, Tensor], seen_B11L: Tensor
    ) -> Tensor:
        if self.residual_mix_2 is not None:
            x = self.residual_mix_2[0] * x + self.residual_mix_2[1] * x0
        x = x + self.attention(rms_norm(x), embedded, rope, seen_B11L)
        return x + F.linear(F.relu(F.linear(rms_norm(x), self.up_FD)).square(), self.down_DF)


class Rotary(nn.Module):
    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.empty(head_dim // 2))


class PlmsaeUNetPreTrainedModel(PreTrainedModel):
    config_class = PlmsaeUNetConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from a file; transformers asks nevertheless."""


class PlmsaeUNetModel(PlmsaeUNetPreTrainedModel):
    """The layers. `hidden_states[k]` is layer k: 0 the normed embedding, then the stream after each block, without a norm."""

    def __init__(self, config: PlmsaeUNetConfig) -> None:
        super().__init__(config)
        d, layers = config.hidden_size, config.num_hidden_layers
        self.embedding_VD = nn.Parameter(torch.empty(config.vocab_size, d))
        tables = layers // 2 if config.value_embeddings else 0
        self.value_tables = nn.ParameterList(torch.empty(config.vocab_size, d) for _ in range(tables))
        self.rotary = Rotary(d // config.num_attention_heads)
        self.layers = nn.ModuleList(Block(config) for _ in range(layers))
        self.skip_weights = nn.Parameter(torch.empty(layers // 2)) if config.unet else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> Any:
        """Padding goes behind a sequence; without `attention_mask` it is where `<pad>` is."""
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        seen_B11L = attention_mask.bool()[:, None, None]
        place_L = torch.arange(input_ids.shape[1], device=input_ids.device, dtype=torch.float32)
        angles_LD = place_L[:, None] * self.rotary.inv_freq.float()
        rope = angles_LD.cos(), angles_LD.sin()
        half = len(self.layers) // 2
        x0 = rms_norm(self.embedding_VD[input_ids])
        if not self.config.mask_embedding:
            x0 = x0.masked_fill((input_ids == self.config.mask_token_id)[..., None], 0)
        x = x0
        hidden: list[Tensor] = [x]
        skips: list[Tensor] = []
        for i, block in enumerate(self.layers):
            if self.skip_weights is not None and i >= half:
                x = x + self.skip_weights[i - half] * skips.pop()
            embedded = self.value_tables[min(i, 2 * half - 1 - i)][input_ids] if len(self.value_tables) else None
            x = block(x, x0, embedded, rope, seen_B11L)
            hidden.append(x)
            if i < half:
                skips.append(x)
        found = BaseModelOutput(last_hidden_state=x, hidden_states=tuple(hidden) if output_hidden_states else None)
        return found.to_tuple() if return_dict is False else found


class Head(nn.Module):
    def __init__(self, config: PlmsaeUNetConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.cap = config.soft_logit_cap
        self.dense_DD = nn.Parameter(torch.empty(d, d))
        self.decoder_VD = None if config.tied_output else nn.Parameter(torch.empty(config.vocab_size, d))
        self.bias_V = nn.Parameter(torch.empty(config.vocab_size))

    def forward(self, x_BLD: Tensor, embedding_VD: Tensor) -> Tensor:
        decoder_VD = embedding_VD if self.decoder_VD is None else self.decoder_VD
        x_BLD = rms_norm(rms_norm(x_BLD))
        z_BLV = F.linear(F.gelu(F.linear(x_BLD, self.dense_DD)), decoder_VD).float() + self.bias_V.float()
        return self.cap * torch.tanh(z_BLV / self.cap)


class PlmsaeUNetForMaskedLM(PlmsaeUNetPreTrainedModel):
    """The layers and the language-model head."""

    def __init__(self, config: PlmsaeUNetConfig) -> None:
        super().__init__(config)
        self.model = PlmsaeUNetModel(config)
        self.lm_head = Head(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> Any:
        """`labels`: tokens to predict, -100 elsewhere; the loss is their mean cross-entropy, nats."""
        found = self.model(input_ids, attention_mask, output_hidden_states)
        logits = self.lm_head(found.last_hidden_state, self.model.embedding_VD)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        result = MaskedLMOutput(loss=loss, logits=logits, hidden_states=found.hidden_states)
        return result.to_tuple() if return_dict is False else result
