"""The UNet transformer by its formulas, a document at a time, in plain operations that autograd differentiates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plmsae_cli.plm.alphabet import MASK
from plmsae_cli.plm.unet_config import UNetConfig


def written_out(
    c: UNetConfig, w: dict[str, Tensor], tokens: Tensor, window: int | None = None
) -> tuple[list[Tensor], Tensor]:
    """Layers and logits of one document, with loops over heads and pairs of places as the formulas have them."""
    length, dh, half = len(tokens), c.head_dim, c.num_layers // 2

    def norm(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    angles = torch.outer(torch.arange(length).double(), 1e4 ** (-torch.arange(0, dh, 2).double() / dh))

    def turned(x: Tensor) -> Tensor:
        z = torch.complex(x[:, : dh // 2], x[:, dh // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([z.real, z.imag], dim=1)

    apart = (torch.arange(length)[:, None] - torch.arange(length)).abs()
    x0 = norm(w["embedding_VD"][tokens])
    if not c.mask_embedding:
        x0 = torch.where((tokens == MASK)[:, None], 0.0, x0)
    x = x0
    layers, skips = [x], []
    for i in range(c.num_layers):
        name = f"layers.{i}."
        if c.unet:
            if i >= half:
                x = x + w["skip_weights"][i - half] * skips.pop()
            x = w[name + "residual_mix_2"][0] * x + w[name + "residual_mix_2"][1] * x0
        y = norm(x)
        if c.num_att_tokens is None:
            qkv = [y @ each.T for each in w[name + "attention.project.qkv_3DD"]]
        else:
            p = name + "attention.project."
            scores = [
                y @ a.T @ k.T / math.sqrt(c.d) for a, k in zip(w[p + "query_3DD"], w[p + "keys_3ND"], strict=True)
            ]
            qkv = [s.softmax(-1) @ v for s, v in zip(scores, w[p + "values_3ND"], strict=True)]
        q, k, v = qkv
        if c.mixes_values:
            l0, l1 = w[name + "attention.value_mix_2"]
            v = l0 * v + l1 * w[f"value_tables.{min(i, c.num_layers - 1 - i)}"][tokens]
        heads = []
        for h in range(c.num_heads):
            part = slice(h * dh, (h + 1) * dh)
            s = turned(norm(q[:, part])) @ turned(norm(k[:, part])).T / math.sqrt(dh)
            if c.attention_soft_cap is not None:
                s = c.attention_soft_cap * torch.tanh(s / c.attention_soft_cap)
            if window is not None:
                s = s.masked_fill(apart >= window, -math.inf)
            heads.append(s.softmax(-1) @ v[:, part])
        x = x + torch.cat(heads, 1) @ w[name + "attention.out_DD"].T
        x = x + (norm(x) @ w[name + "up_FD"].T).relu().square() @ w[name + "down_DF"].T
        layers.append(x)
        if i < half:
            skips.append(x)
    decoder = w["embedding_VD"] if c.tie_embeddings else w["lm_head.decoder_VD"]
    z = torch.nn.functional.gelu(norm(norm(x)) @ w["lm_head.dense_DD"].T) @ decoder.T + w["lm_head.bias_V"]
    return layers, c.soft_logit_cap * torch.tanh(z / c.soft_logit_cap)
