"""Switch: the formula, the experts' products, the FLOPs, the router's balance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from plmsae_cli.sae.initialise import initialise
from plmsae_cli.sae.switch import Switch, _by_loop, _by_tiles
from plmsae_cli.sae.topk import TopK

D, N, E, K, B = 6, 32, 4, 2, 30


def example(balance: float = 0.7, device: torch.device | str = "cpu") -> tuple[Switch, Tensor]:
    model = Switch(D, N, K, E, balance)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.normalize_decoder()
    return model.to(device), torch.randn(B, D, generator=generator).to(device)


def formula(p: dict[str, Tensor], x_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token: xhat, E sum f P, z."""
    probabilities_BE = ((x_BD - p["b_router_D"]) @ p["w_router_ED"].T).softmax(1)
    z_rows = []
    for x_D, probability_E in zip(x_BD, probabilities_BE, strict=True):
        expert = int(probability_E.argmax())
        own = slice(expert * N // E, (expert + 1) * N // E)
        pre = p["w_enc_ND"][own] @ (x_D - p["b_dec_D"]) + p["b_enc_N"][own]
        top = pre.topk(K)
        z = torch.zeros(N, dtype=x_BD.dtype).index_put(
            (top.indices + expert * N // E,), top.values.relu() * probability_E[expert]
        )
        z_rows.append(z)
    z_BN = torch.stack(z_rows)
    f_E = torch.bincount(probabilities_BE.argmax(1), minlength=E) / len(x_BD)
    return z_BN @ p["w_dec_ND"] + p["b_dec_D"], E * (f_E * probabilities_BE.mean(0)).sum(), z_BN


def test_loss_and_gradients_are_the_formula(device: torch.device) -> None:
    model, x_BD = example(device=device)
    losses = model.loss(x_BD, torch.zeros(N, dtype=torch.bool, device=device), B)
    losses.total.backward()  # type: ignore[no-untyped-call]
    p = {name: t.detach().cpu().double().requires_grad_() for name, t in model.named_parameters()}
    xhat_BD, balance, z_BN = formula(p, x_BD.cpu().double())
    total = ((xhat_BD - x_BD.cpu().double()) ** 2).mean() + 0.7 * balance
    total.backward()  # type: ignore[no-untyped-call]
    assert len(z_BN.detach().view(B, E, -1).sum(2).argmax(1).unique()) > 1, "several experts are chosen"
    torch.testing.assert_close(losses.total.detach().cpu().double(), total.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.aux.detach().cpu().double(), balance.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        grad = p[name].grad
        assert grad is not None
        torch.testing.assert_close(parameter.grad.cpu().double(), grad, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(model.encode_dense(x_BD).cpu().double(), z_BN.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(x_BD).cpu().double(), xhat_BD.detach(), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 5), st.sampled_from([1, 3, 16]), st.integers(0, 2**32))
def test_tiles_give_what_the_loop_gives(rows: int, experts: int, tile: int, seed: int) -> None:
    """Small integers: products are exact in any order, and tie often."""
    generator = torch.Generator().manual_seed(seed)
    x_BD = torch.randint(-3, 4, (rows, 5), generator=generator).float()
    w_END = torch.randint(-3, 4, (experts, 12, 5), generator=generator).float()
    b_EN = torch.randint(-3, 4, (experts, 12), generator=generator).float()
    chosen_B = torch.randint(0, data_experts(experts, seed), (rows,), generator=generator)
    ours = _by_tiles(x_BD, chosen_B, w_END, b_EN, 3, tile)
    loop = _by_loop(x_BD, chosen_B, w_END, b_EN, 3)
    assert torch.equal(ours.acts_BK, loop.acts_BK)
    assert torch.equal(ours.indices_BK, loop.indices_BK)
    scores_BN = torch.stack([w_END[e] @ x + b_EN[e] for x, e in zip(x_BD, chosen_B, strict=True)])
    want = scores_BN.relu().sort(dim=1, descending=True, stable=True)
    assert torch.equal(ours.acts_BK, want.values[:, :3])
    assert torch.equal(ours.indices_BK, want.indices[:, :3])


def data_experts(experts: int, seed: int) -> int:
    """Experts that get tokens at all: often not every one."""
    return 1 + seed % experts


def flops(work: object) -> int:
    with FlopCounterMode(display=False) as counter:
        work()  # type: ignore[operator]
    return int(counter.get_total_flops())


@pytest.mark.parametrize("experts", [1, 4, 8])
def test_encoder_flops_drop_by_the_number_of_experts(experts: int) -> None:
    d, num_latents, rows = 32, 1024, 256
    model, full = Switch(d, num_latents, 4, experts), TopK(d, num_latents, 4, aux_coefficient=0.0)
    x_BD = torch.randn(rows, d, generator=torch.Generator().manual_seed(0))
    for each in (model, full):
        initialise(each, 0, x_BD)
    dead_N = torch.zeros(num_latents, dtype=torch.bool)
    encoder = 2 * rows * d * num_latents
    assert flops(lambda: full.loss(x_BD, dead_N, rows)) == encoder
    assert flops(lambda: model.loss(x_BD, dead_N, rows)) == encoder // experts + 2 * rows * d * experts
    # The backward, too, touches active pairs only, and the router.
    backward = flops(lambda: model.loss(x_BD, dead_N, rows).total.backward())  # type: ignore[no-untyped-call]
    small = 4 * 2 * rows * d * experts + 2 * num_latents * d
    assert backward <= encoder // experts + small
    chosen_B = torch.randint(0, experts, (rows,), generator=torch.Generator().manual_seed(1))
    views = model.w_enc_ND.view(experts, -1, d), model.b_enc_N.view(experts, -1)
    tiles = flops(lambda: _by_tiles(x_BD, chosen_B, *views, 4, 16))
    assert tiles == (rows // 16 + experts) * 16 * 2 * d * num_latents // experts


def test_the_router_loss_is_in_the_total_and_least_where_even() -> None:
    model, x_BD = example(balance=0.0)
    dead_N = torch.zeros(N, dtype=torch.bool)
    without = model.loss(x_BD, dead_N, B)
    model.balance_coefficient = 0.7
    losses = model.loss(x_BD, dead_N, B)
    torch.testing.assert_close(losses.total - without.total, 0.7 * losses.aux)
    assert losses.aux.item() > 1
    with torch.no_grad():
        model.w_router_ED.mul_(0)
        model.w_router_ED[:, :E] += 50 * torch.eye(E)
        model.b_router_D.zero_()
    even_BD = torch.eye(E, D).repeat(7, 1)
    assert model.loss(even_BD, dead_N, 28).aux.item() == pytest.approx(1.0)


def test_the_router_starts_at_random_by_seed() -> None:
    models = [Switch(8, 64, 2, 4) for _ in range(3)]
    sample = torch.randn(50, 8) + 3
    for model, seed in zip(models, (1, 1, 2), strict=True):
        initialise(model, seed, sample)
    assert torch.equal(models[0].w_router_ED, models[1].w_router_ED)
    assert not torch.equal(models[0].w_router_ED, models[2].w_router_ED)
    assert torch.equal(models[0].b_router_D, models[0].b_dec_D)
    assert 0 < models[0].w_router_ED.abs().max() <= 8**-0.5


def test_settings_that_cannot_work_are_named() -> None:
    with pytest.raises(ValueError, match="choose a multiple of num_experts, such as 34"):
        Switch(4, 33, 2, 2)
    with pytest.raises(ValueError, match="choose k from 1 to 8"):
        Switch(4, 32, 9, 4)
