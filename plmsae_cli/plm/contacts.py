"""Contacts that ESM-2's attention shows: a logistic regression on all heads' attention maps (Rao et al., ICLR 2021).

p_ij = sigmoid(b + sum_h w_h APC(A_h + A_h^T)_ij), A_h without the rows and columns of `<cls>` and `<eos>`.
Shape letters: L residues of one document, H heads of one block, M = blocks x heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor

from plmsae_cli.plm.attention import Documents
from plmsae_cli.plm.esm2 import ESM2, Block
from plmsae_cli.plm.passes import Splice
from plmsae_cli.plm.rotary import rotate


def apc(score_XLL: Tensor) -> Tensor:
    """Average product correction (Dunn et al. 2008): S_ij - S_i. S_.j / S_.., over the last two axes; 0 stays 0."""
    row, column = score_XLL.sum(-1, keepdim=True), score_XLL.sum(-2, keepdim=True)
    total = row.sum(-2, keepdim=True)
    return score_XLL - row * column / torch.where(total == 0, 1.0, total)


@torch.no_grad()
def attention_contacts(
    plm: ESM2, tokens_T: Tensor, weight_M: Tensor, bias: Tensor, splice: Mapping[int, Splice] | None = None
) -> Tensor:
    """Probability [L, L], float32, that residues touch, for one document `<cls>` residues `<eos>` [L + 2].

    `weight_M` has a number a head, blocks first. A splice of the last layer changes nothing: no attention reads it.
    """
    length = tokens_T.shape[0]
    documents = Documents(torch.tensor([0, length], dtype=torch.int32, device=tokens_T.device), length, (length,))
    seen: dict[int, Tensor] = {}

    def record(layer: int, before: Splice | None) -> Callable[[Tensor], Tensor]:
        def keep(x_TD: Tensor) -> Tensor:
            seen[layer] = x_TD if before is None else before(x_TD)
            return seen[layer]

        return keep

    blocks = plm.config.num_layers
    splice = splice or {}
    plm(tokens_T, documents, [blocks - 1], {k: record(k, splice.get(k)) for k in range(blocks)})
    rope = plm.rotary(torch.arange(length, device=tokens_T.device))
    weight_NH = weight_M.float().view(blocks, plm.config.num_heads)
    total_LL = torch.zeros(length - 2, length - 2, device=tokens_T.device)
    for k in range(blocks):
        block = cast(Block, plm.layers[k])
        x_TD = block.self_attn_layer_norm(seen.pop(k))
        q, k_THD = (
            rotate(project(x_TD).view(length, plm.config.num_heads, plm.config.head_dim), rope)
            for project in (block.self_attn.q_proj, block.self_attn.k_proj)
        )
        score_HTT = torch.einsum("ihd,jhd->hij", q.float(), k_THD.float()) * plm.config.head_dim**-0.5
        map_HLL = score_HTT.softmax(-1)[:, 1:-1, 1:-1]
        corrected_HLL = apc(map_HLL + map_HLL.transpose(1, 2))
        total_LL += torch.einsum("h,hij->ij", weight_NH[k], corrected_HLL)
    return torch.sigmoid(total_LL + bias.float())
