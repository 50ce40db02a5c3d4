"""Switch's fused step against its formulas in float64 and against the plain path's update."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from plmsae_cli.runtime.dist import Gang
from plmsae_cli.sae.fused import experts
from plmsae_cli.sae.fused.experts import ExpertEncoder
from plmsae_cli.sae.fused.given import AdamOptions, Batch, Masters
from plmsae_cli.sae.fused.switch import FusedSwitchStep
from plmsae_cli.sae.selection import top_k
from plmsae_cli.sae.switch import Switch
from plmsae_cli.training.optimizers import Group
from plmsae_cli.training.optimizers.rounded_adam import RoundedAdam

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N, D, K, E, ROWS = 48, 32, 4, 3, 20


def switch(generator: torch.Generator) -> Switch:
    model = Switch(D, N, K, E, 0.7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    model.normalize_decoder()
    return model


def formulas(step: FusedSwitchStep, before: dict[str, Tensor], inputs_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, balance, error; gradients are left in `before`. Experts and latents are those that the kernels chose."""
    p = before
    logits_BE = (inputs_BD - p["b_router_D"]) @ p["w_router_ED"].T
    probabilities_BE = logits_BE.softmax(1)
    expert_B = (step._encode._bases_B.long() // (N // E)).cpu()
    assert torch.equal(expert_B, probabilities_BE.argmax(1)), "each token has its likeliest expert"
    assert len(expert_B.unique()) > 1
    pre_BN = (inputs_BD - p["b_dec_D"]) @ p["w_enc_ND"].T + p["b_enc_N"]
    indices_BK = step._encode.pairs.indices_P.view(ROWS, K).long().cpu()
    assert (indices_BK // (N // E) == expert_B[:, None]).all(), "latents are their expert's"
    chosen_BN = torch.zeros(ROWS, N, dtype=torch.float64).scatter(1, indices_BK, 1.0)
    z_BN = pre_BN.relu() * chosen_BN * probabilities_BE.gather(1, expert_B[:, None])
    error_BD = z_BN @ p["w_dec_ND"] + p["b_dec_D"] - inputs_BD
    share_E = torch.bincount(expert_B, minlength=E) / ROWS
    balance = E * (share_E * probabilities_BE.mean(0)).sum()
    total = error_BD.square().sum() / inputs_BD.numel() + 0.7 * balance
    total.backward()  # type: ignore[no-untyped-call]
    return total.detach(), balance.detach(), error_BD.detach()


def test_a_step_is_the_formulas_and_the_plain_update(
    monkeypatch: pytest.MonkeyPatch,
    steps_as_plain: Callable[..., None],
    infinity_changes_nothing: Callable[..., None],
) -> None:
    monkeypatch.setattr(experts, "ROUTED", 16)  # two blocks
    monkeypatch.setattr(experts, "TILE", 16)
    generator = torch.Generator().manual_seed(1)
    model, plain = switch(generator).to(DEVICE), Switch(D, N, K, E).to(DEVICE)
    plain.load_state_dict(model.state_dict())
    optimizer = RoundedAdam([Group("sae", dict(plain.named_parameters()))], (0.9, 0.999), 6.25e-10)
    state = {name.removeprefix("sae."): tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    raw_BD = torch.randn(ROWS, D, generator=generator).to(DEVICE) * 2
    batch = Batch(ROWS, torch.zeros(D, device=DEVICE), 0.5, 10**9)
    masters = {name: p.detach() for name, p in model.named_parameters()}
    half = {"w_enc_ND", "w_dec_ND", "b_enc_N"}
    seen = {name: (p.bfloat16() if name in half else p).double().cpu().requires_grad_() for name, p in masters.items()}
    ages_N = torch.zeros(N, dtype=torch.int64, device=DEVICE)
    step = FusedSwitchStep(
        model, Masters(masters, state, ages_N), batch, AdamOptions((0.9, 0.999), 6.25e-10, 0.01), Gang()
    )
    figures = step(raw_BD, 0, 1e-2)
    inputs_BD = (raw_BD * 0.5).double().cpu()
    total, balance, error_BD = formulas(step, seen, inputs_BD)
    assert float(figures["loss"]) == pytest.approx(float(total), rel=0.01)
    assert float(figures["aux"]) == pytest.approx(float(balance), rel=1e-3)
    assert float(figures["fvu"]) == pytest.approx(float(error_BD.square().sum() / inputs_BD.square().sum()), rel=0.01)
    steps_as_plain(step, figures, {name: p.grad for name, p in seen.items()}, plain, optimizer, (masters, state))
    for name, tensor in optimizer.state_tensors().items():
        if "router" in name:  # rounded by the same hash
            assert float((state[name.removeprefix("sae.")] == tensor).float().mean()) > 0.95, name

    infinity_changes_nothing(step, raw_BD, (masters, state))


def test_experts_score_what_one_product_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small integers: products are exact, and tie often; one expert has no token."""
    monkeypatch.setattr(experts, "ROUTED", 16)
    monkeypatch.setattr(experts, "TILE", 16)
    generator = torch.Generator().manual_seed(0)
    rows, part = 37, 20
    x_BD, w_ND, b_N = (
        torch.randint(-3, 4, shape, generator=generator).bfloat16().to(DEVICE)
        for shape in ((rows, 16), (60, 16), (60,))
    )
    router_ED = torch.randn(3, 16, generator=generator).to(DEVICE)
    router_ED[1] = 0
    encoder = ExpertEncoder(rows, 60, 4, 3, DEVICE)
    encoder.route(x_BD, router_ED, torch.zeros(16, device=DEVICE))
    encoder(x_BD, w_ND, b_N)
    probabilities_BE = (x_BD.float() @ router_ED.T).softmax(1)
    torch.testing.assert_close(encoder.mean_E, probabilities_BE.mean(0))
    expert_B = probabilities_BE.argmax(1)
    assert encoder.tokens_E.tolist() == torch.bincount(expert_B, minlength=3).tolist()
    scores_BN = x_BD.float() @ w_ND.float().T + b_N.float()
    own_BN = scores_BN.view(rows, 3, part)[torch.arange(rows, device=DEVICE), expert_B]
    want = top_k(own_BN, 4)
    indices_BK, order_BK = want.indices_BK.sort(dim=1)
    acts_BK = (want.acts_BK * probabilities_BE.gather(1, expert_B[:, None])).gather(1, order_BK)
    assert torch.equal(encoder.pairs.indices_P.view(rows, 4).long(), indices_BK + part * expert_B[:, None])
    torch.testing.assert_close(encoder.pairs.acts_P.view(rows, 4), acts_BK, rtol=0.01, atol=0.0)
