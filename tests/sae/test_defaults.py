"""What an architecture is where nothing is said: the numbers of the papers, which the help of `train.sae` gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plmsae_cli.sae.architectures import ARCHITECTURES
from plmsae_cli.sae.initialise import initialise

D, N = 400, 64
TOPK = {"k_aux": 200, "aux_coefficient": 1 / 32, "k_start": None, "k_anneal": 0.1}
L0 = {"sparsity_coefficient": 6e-4, "sparsity_warmup": 0.05, "bandwidth": 0.02, "theta_start": 0.02}
TANH = {"sparsity_coefficient": 5.0, "sparsity_warmup": 1.0, "bandwidth": 2.0, "theta_start": 0.1}
HALVES = {"fractions": [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]}


@pytest.mark.parametrize(
    ("kind", "given", "want"),
    [
        ("topk", {"k": 3}, TOPK),
        ("multi_topk", {"k": 3}, TOPK),
        ("matryoshka_topk", {"k": 3}, TOPK | HALVES),
        ("batch_topk", {"k": 3}, TOPK | {"selection": "global"}),
        ("matryoshka_batch_topk", {"k": 3}, TOPK | HALVES | {"selection": "global"}),
        ("jumprelu", {}, L0),
        ("jumprelu", {"target_l0": 3}, L0 | {"sparsity_coefficient": 1.0}),
        ("jumprelu", {"penalty": "tanh"}, TANH | {"tanh_scale": 4.0, "pre_act_coefficient": 3e-6}),
        ("gated", {}, {"sparsity_coefficient": 5.0, "sparsity_warmup": 0.05}),
        ("relu_l1", {}, {"sparsity_coefficient": 5.0, "sparsity_warmup": 0.05, "unit_rows": False, "error": "squared"}),
        ("relu_l1", {"error": "norm"}, {"sparsity_coefficient": 0.08, "unit_rows": False}),
        ("switch", {"k": 3}, {"num_experts": 8, "balance_coefficient": 3.0}),
    ],
)
def test_defaults(kind: str, given: dict[str, Any], want: dict[str, Any]) -> None:
    settings = ARCHITECTURES[kind](D, N, **given).settings()
    assert {name: settings[name] for name in want} == want


@pytest.mark.parametrize(("kind", "norm"), [("relu_l1", 0.1), ("gated", 1.0)])
def test_rows_start_at_norm_1_or_free_at_a_tenth(kind: str, norm: float) -> None:
    model = ARCHITECTURES[kind](D, N)
    initialise(model, 0, torch.randn(10, D, generator=torch.Generator().manual_seed(0)))
    for rows_ND in (model.w_enc_ND, model.w_dec_ND):
        torch.testing.assert_close(rows_ND.norm(dim=1), torch.full((N,), norm))
