"""BatchTopK, plain and nested: loss and gradients against the dense formula, and its threshold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plmsae_cli.sae.batch_topk import BatchTopK
from plmsae_cli.sae.interface import Latents
from plmsae_cli.sae.matryoshka import MatryoshkaBatchTopK, MatryoshkaTopK
from plmsae_cli.sae.multi_topk import MultiTopK
from plmsae_cli.sae.sparse import Pairs, attach_encoder, sparse_decode
from plmsae_cli.sae.topk import TopK

D, N, B = 6, 32, 20


def example(model: TopK, device: torch.device | str = "cpu", rows: int = B) -> tuple[TopK, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.normalize_decoder()
    dead_N = torch.rand(N, generator=generator) < 0.3
    return model.to(device), torch.randn(rows, D, generator=generator).to(device), dead_N.to(device)


def formula(model: TopK, x_BD: Tensor, dead_N: Tensor, prefixes: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss as written, dense, in float64: the B k largest of ReLU(a), prefixes, AuxK on the full residual."""
    p = {name: t.detach().cpu().double().requires_grad_() for name, t in model.named_parameters()}
    x_BD, dead_N = x_BD.cpu().double(), dead_N.cpu()
    pre_BN = (x_BD - p["b_dec_D"]) @ p["w_enc_ND"].T + p["b_enc_N"]
    acts_BN = pre_BN.relu()
    threshold = acts_BN.detach().flatten().sort(descending=True).values[len(x_BD) * model.k - 1]
    z_BN = acts_BN * (acts_BN >= threshold)
    xhats = [(z_BN * (torch.arange(N) < m)) @ p["w_dec_ND"] + p["b_dec_D"] for m in prefixes]
    total = torch.stack([((x_BD - xhat) ** 2).sum() for xhat in xhats]).mean() / x_BD.numel()
    error_BD = (x_BD - xhats[-1]).detach()
    aux_BN = acts_BN * dead_N
    kept_BN = torch.zeros_like(aux_BN).scatter(1, aux_BN.detach().topk(model.k_aux, dim=1).indices, 1.0)
    ehat_BD = (aux_BN * kept_BN) @ p["w_dec_ND"]
    length, energy = (ehat_BD**2).sum().detach().clamp(min=1e-300), (error_BD**2).sum()
    factor = torch.maximum((ehat_BD * error_BD).sum().detach() / length, 0.1 * (energy / length).sqrt()).clamp(max=1.0)
    aux = ((factor * ehat_BD - error_BD) ** 2).sum() / (error_BD**2).sum() * min(int(dead_N.sum()) / model.k_aux, 1.0)
    total = total + model.aux_coefficient * aux
    total.backward()  # type: ignore[no-untyped-call]
    return total, {name: t.grad for name, t in p.items() if t.grad is not None}


@pytest.mark.parametrize(
    ("model", "prefixes"),
    [
        (BatchTopK(D, N, 3, k_aux=4), [N]),
        (MatryoshkaBatchTopK(D, N, 3, k_aux=4, fractions=[0.25, 0.25, 0.5]), [8, 16, 32]),
    ],
)
def test_loss_and_gradients_are_the_dense_ones(model: TopK, prefixes: list[int], device: torch.device) -> None:
    model, x_BD, dead_N = example(model, device)
    losses = model.loss(x_BD, dead_N, B)
    losses.total.backward()  # type: ignore[no-untyped-call]
    total, gradients = formula(model, x_BD, dead_N, prefixes)
    torch.testing.assert_close(losses.total.detach().cpu().double(), total.detach(), rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        ours = model.get_parameter(name).grad
        assert ours is not None
        torch.testing.assert_close(ours.cpu().double(), gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert int(losses.active_B.sum()) == 3 * B
    assert len(losses.active_B.unique()) > 2, "the number a token varies"


def test_theta_is_the_corrected_average_of_the_smallest_kept() -> None:
    model, x_BD, dead_N = example(BatchTopK(D, N, 3))
    assert isinstance(model, BatchTopK)
    smallest = []
    for factor in (1.0, 3.0, 0.0, 2.0):
        rows_BD = model.b_dec_D.detach() + factor * (x_BD - model.b_dec_D.detach())
        if factor == 0:  # nothing fires: theta and its count stand still
            before = model.theta.clone()
            with torch.no_grad():
                model.b_enc_N.sub_(1000)
            losses = model.loss(rows_BD, dead_N, B)
            with torch.no_grad():
                model.b_enc_N.add_(1000)
            assert not losses.fired_N.any()
            assert torch.equal(model.theta, before)
            continue
        pre_BN = (rows_BD - model.b_dec_D) @ model.w_enc_ND.T + model.b_enc_N
        smallest.append(float(pre_BN.detach().relu().flatten().sort(descending=True).values[3 * B - 1]))
        model.loss(rows_BD, dead_N, B)
    for broken in (torch.inf, torch.nan):  # of a step that no optimiser takes
        model.follow(torch.tensor(broken))
    weights = [0.999**age for age in (2, 1, 0)]
    want = sum(w * s for w, s in zip(weights, smallest, strict=True)) / sum(weights)
    assert float(model.theta) == pytest.approx(want, rel=1e-5)
    assert int(model.theta_steps) == 3


def test_theta_is_averaged_over_no_more_than_a_twentieth_of_the_run() -> None:
    model = BatchTopK(D, N, 3)
    for steps, window in ((1, 1), (20, 1), (400, 20), (20_000, 1000), (10**6, 1000)):
        model.schedule(0, steps)
        assert model.theta_decay == pytest.approx(1 - 1 / window)
    model.schedule(0, 20)  # the last step alone
    for factor in (1.0, 3.0):
        example_, x_BD, dead_N = example(model)
        example_.loss(factor * x_BD, dead_N, B)
    pre_BN = (3 * x_BD - model.b_dec_D) @ model.w_enc_ND.T + model.b_enc_N
    torch.testing.assert_close(model.theta, pre_BN.detach().flatten().sort(descending=True).values[3 * B - 1])


def test_inference_is_a_jump_at_theta_whatever_the_batch() -> None:
    model, x_BD, _ = example(BatchTopK(D, N, 3))
    model.theta.fill_(1.3)
    latents = model.encode(x_BD)
    pre_BN = (x_BD - model.b_dec_D) @ model.w_enc_ND.T + model.b_enc_N
    want_BN = torch.where(pre_BN > 1.3, pre_BN, 0.0)
    z_BN = torch.zeros_like(want_BN).scatter(1, latents.indices_BK, latents.acts_BK)
    torch.testing.assert_close(z_BN, want_BN)
    counts_B = (want_BN > 0).sum(1)
    assert latents.acts_BK.shape == (B, int(counts_B.max()))
    assert len(counts_B.unique()) > 2
    torch.testing.assert_close(model.encode_dense(x_BD[:1]), want_BN[:1])
    (gradient,) = torch.autograd.grad(model(x_BD.requires_grad_()).sum(), x_BD)
    want_BD = ((pre_BN > 1.3).float() * model.w_dec_ND.sum(1)) @ model.w_enc_ND
    torch.testing.assert_close(gradient, want_BD, rtol=1e-4, atol=1e-5)


def test_no_latent_above_theta_still_decodes() -> None:
    model, x_BD, _ = example(BatchTopK(D, N, 3))
    model.theta.fill_(1e6)
    assert model.encode(x_BD).acts_BK.tolist() == [[0.0]] * B
    torch.testing.assert_close(model(x_BD), model.b_dec_D.expand(B, D))


def test_local_selection_is_each_ranks_own() -> None:
    model, x_BD, dead_N = example(BatchTopK(D, N, 3, selection="local"))
    assert isinstance(model, BatchTopK)
    halves = x_BD.split(B // 2)
    losses = [model.loss(half, dead_N, B) for half in halves]
    assert [int(part.active_B.sum()) for part in losses] == [3 * B // 2] * 2
    other, _, _ = example(BatchTopK(D, N, 3))
    together = other.loss(x_BD, dead_N, B)
    assert not torch.equal(torch.cat([part.active_B for part in losses]), together.active_B)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**32))
def test_pairs_of_a_mask_are_the_dense_maps(rows: int, num_latents: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask_BN = torch.rand(rows, num_latents, generator=generator) < 0.4
    acts_BN = torch.rand(rows, num_latents, dtype=torch.float64, generator=generator)
    w_ND = torch.randn(num_latents, 3, dtype=torch.float64, generator=generator)
    pairs = Pairs.of_mask(mask_BN, rows * num_latents)
    dense_BN = acts_BN * mask_BN
    torch.testing.assert_close(sparse_decode(pairs.read(acts_BN), w_ND, pairs), dense_BN @ w_ND)
    assert torch.equal(pairs.active(pairs.read(acts_BN)), mask_BN.sum(1))
    assert torch.equal(pairs.fired(pairs.read(acts_BN)), mask_BN.any(0))


@pytest.mark.parametrize("fillers", [0, 1, 7, 30])
def test_fillers_change_nothing(fillers: int) -> None:
    """As a GPU lays pairs out, which is not told how many there are."""
    generator = torch.Generator().manual_seed(0)
    rows = 4
    mask_BN = torch.rand(rows, N, generator=generator) < 0.2
    exact = Pairs.of_mask(mask_BN, 0)
    count = exact.indices_P.numel()
    place = torch.arange(count, count + fillers)
    a_bag = -(-(count + fillers) // rows)
    ends = (count + a_bag * torch.arange(1, rows + 1)).clamp(max=count + fillers)
    padded = Pairs(
        torch.cat([exact.indices_P, place % N]), torch.cat([exact.bags_P, place % rows]),
        torch.cat([exact.offsets_R1, ends]), N, rows,
    )  # fmt: skip
    found = []
    for pairs in (exact, padded):
        inputs = [torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in ((rows, D), (N, D), (N,), (D,))]
        for tensor in inputs:
            tensor.requires_grad_()
        x_BD, w_ND, b_N, b_D = inputs
        acts_BN = (x_BD - b_D) @ w_ND.T + b_N
        acts_P = attach_encoder(pairs.read(acts_BN.detach().abs()), x_BD, w_ND, b_N, b_D, pairs)
        whole_BD = sparse_decode(acts_P, w_ND, pairs)
        groups = pairs.split((pairs.indices_P >= N // 2).long(), 2)
        halves_BGD = sparse_decode(acts_P, w_ND, groups).view(rows, 2, D)
        torch.testing.assert_close(halves_BGD.sum(1), whole_BD)
        loss = whole_BD.square().sum() + halves_BGD[:, 0].square().sum()
        found.append([whole_BD, *torch.autograd.grad(loss, inputs), pairs.fired(acts_P), pairs.active(acts_P)])
    for ours, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, want)


def test_multi_topk_is_the_sum_of_both_losses() -> None:
    model, x_BD, _ = example(MultiTopK(D, N, 3, aux_coefficient=0.0))
    losses = model.loss(x_BD, torch.zeros(N, dtype=torch.bool), B)
    losses.total.backward()  # type: ignore[no-untyped-call]
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts = []
    for k, weight in ((3, 1.0), (12, 1 / 8)):
        single, _, _ = example(TopK(D, N, k, aux_coefficient=0.0))
        part = single.loss(x_BD, torch.zeros(N, dtype=torch.bool), B)
        (weight * part.total).backward()  # type: ignore[no-untyped-call]
        parts.append((weight, part, single))
    torch.testing.assert_close(losses.total, sum(weight * part.total for weight, part, _ in parts))
    torch.testing.assert_close(losses.reconstruction, parts[0][1].total)
    assert int(losses.active_B.max()) <= 3
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, sum(single.get_parameter(name).grad for _, _, single in parts))
    assert model.encode(x_BD).acts_BK.shape == (B, 3)


@pytest.mark.parametrize("kind", [TopK, MultiTopK, BatchTopK, MatryoshkaTopK, MatryoshkaBatchTopK])
def test_k_goes_from_its_start_to_its_end(kind: type[TopK]) -> None:
    model, x_BD, dead_N = example(kind(D, N, 2, k_start=8, k_anneal=0.5), rows=B)
    with torch.no_grad():
        model.b_enc_N.add_(3)  # enough above 0
    found = []
    for step in range(0, 20, 3):
        model.schedule(step, 20)
        found.append(int(model.loss(x_BD, dead_N, B).active_B.sum()) / B)
    assert found == [round(8 - 6 * min(1, step / 10)) for step in range(0, 20, 3)]
    if not isinstance(model, BatchTopK):
        model.schedule(0, 20)
        latents: Latents = model.encode(x_BD)
        assert latents.acts_BK.shape[1] == 2, "k_start is of training alone"
