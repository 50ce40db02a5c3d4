"""Losses and gradients of TopK and Matryoshka against the formulas as written, dense and in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.interface import Losses, one_process
from plmsae_cli.sae.matryoshka import MatryoshkaTopK
from plmsae_cli.sae.topk import TopK

QUICK = settings(deadline=None, max_examples=60)
PARAMETERS = ("w_enc_ND", "b_enc_N", "w_dec_ND", "b_dec_D")


@dataclasses.dataclass
class Naive:
    total: torch.Tensor
    reconstruction: torch.Tensor
    aux: torch.Tensor
    xhat_BD: torch.Tensor
    gradients: dict[str, torch.Tensor]
    margin: float
    """How far the closest choice is from going the other way."""


def naive(model: TopK, x_BD: torch.Tensor, dead_N: torch.Tensor, prefixes: list[int]) -> Naive:
    p = {name: getattr(model, name).detach().cpu().double().requires_grad_() for name in PARAMETERS}
    x_BD, dead_N = x_BD.cpu().double(), dead_N.cpu()
    margins = [1.0]

    def top(scores_BN: torch.Tensor, k: int) -> torch.Tensor:
        values, indices = scores_BN.detach().sort(dim=1, descending=True, stable=True)
        if k < values.shape[1] and values[:, k].isfinite().all():
            margins.append(float((values[:, k - 1] - values[:, k]).min()))
        margins.append(float(values[values.isfinite()].abs().min()))
        return torch.zeros_like(scores_BN).scatter(1, indices[:, :k], 1.0)

    pre_BN = (x_BD - p["b_dec_D"]) @ p["w_enc_ND"].T + p["b_enc_N"]
    z_BN = pre_BN.relu() * top(pre_BN, model.k)
    latents_N = torch.arange(model.num_latents)
    xhats = [(z_BN * (latents_N < prefix)) @ p["w_dec_ND"] + p["b_dec_D"] for prefix in prefixes]
    reconstruction = torch.stack([((x_BD - xhat) ** 2).sum() for xhat in xhats]).mean() / x_BD.numel()
    aux = torch.zeros(())
    num_dead = int(dead_N.sum())
    error_BD = (x_BD - xhats[-1]).detach()
    if num_dead:
        dead_pre_BN = pre_BN.masked_fill(~dead_N, -torch.inf)
        z_aux_BN = dead_pre_BN.relu() * top(dead_pre_BN, min(model.k_aux, num_dead))
        ehat_BD = z_aux_BN @ p["w_dec_ND"]
        length, energy = (ehat_BD**2).sum().detach().clamp(min=1e-300), (error_BD**2).sum()
        factor = torch.maximum((ehat_BD * error_BD).sum().detach() / length, 0.1 * (energy / length).sqrt()).clamp(
            max=1.0
        )
        aux = ((factor * ehat_BD - error_BD) ** 2).sum() / (error_BD**2).sum() * min(num_dead / model.k_aux, 1.0)
    total = reconstruction + model.aux_coefficient * aux
    total.backward()
    gradients = {name: tensor.grad for name, tensor in p.items() if tensor.grad is not None}
    return Naive(total, reconstruction, aux, xhats[-1], gradients, min(margins))


def randomise(model: Dictionary, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in PARAMETERS:
            tensor = getattr(model, name)
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    model.normalize_decoder()


def agree(model: TopK, losses: Losses, want: Naive) -> None:
    losses.total.backward()
    for name in ("total", "reconstruction", "aux", "xhat_BD"):
        ours, theirs = getattr(losses, name).detach().cpu(), getattr(want, name).detach().float()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name in PARAMETERS:
        gradient = getattr(model, name).grad.cpu()
        scale = float(want.gradients[name].abs().max()) + 1e-30
        torch.testing.assert_close(gradient / scale, (want.gradients[name] / scale).float(), rtol=1e-5, atol=1e-5)


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, int, int, int, int, float]:
    rows, d = draw(st.integers(1, 8)), draw(st.integers(2, 8))
    num_latents = draw(st.sampled_from([8, 13, 32, 48]))
    k, k_aux = draw(st.integers(1, 6)), draw(st.integers(1, 10))
    return (
        rows,
        d,
        num_latents,
        k,
        k_aux,
        draw(st.integers(0, 2**32)),
        draw(st.sampled_from([0.0, 0.2, 0.5, 1.0])),
    )


@QUICK
@given(problems(), st.sampled_from([1 / 32, 1.0]))
def test_topk(
    device: torch.device, problem: tuple[int, int, int, int, int, int, float], aux_coefficient: float
) -> None:
    rows, d, num_latents, k, k_aux, seed, share = problem
    model = TopK(d, num_latents, k, k_aux, aux_coefficient).to(device)
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x_BD = torch.randn(rows, d, generator=generator).to(device)
    dead_N = (torch.rand(num_latents, generator=generator) < share).to(device)
    want = naive(model, x_BD, dead_N, [num_latents])
    assume(want.margin > 1e-5)
    agree(model, model.loss(x_BD, dead_N, rows), want)


@QUICK
@given(problems(), st.sampled_from([None, (0.25, 0.75), (0.3, 0.3, 0.4)]))
def test_matryoshka(
    device: torch.device,
    problem: tuple[int, int, int, int, int, int, float],
    fractions: tuple[float, ...] | None,
) -> None:
    rows, d, num_latents, k, k_aux, seed, share = problem
    num_latents = max(num_latents, 16)  # the default's smallest group is a sixteenth
    options = {} if fractions is None else {"fractions": fractions}
    model = MatryoshkaTopK(d, num_latents, k, k_aux, **options).to(device)
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x_BD = torch.randn(rows, d, generator=generator).to(device)
    dead_N = (torch.rand(num_latents, generator=generator) < share).to(device)
    shares = torch.tensor(fractions or (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2), dtype=torch.float64)
    prefixes = (shares.cumsum(0) * num_latents).round().int().tolist()
    want = naive(model, x_BD, dead_N, prefixes)
    assume(want.margin > 1e-5)
    agree(model, model.loss(x_BD, dead_N, rows), want)


def example(kind: type[TopK] = TopK, device: str | torch.device = "cpu") -> tuple[TopK, torch.Tensor, torch.Tensor]:
    model = kind(6, 32, 4, k_aux=3).to(device)
    randomise(model, 0)
    generator = torch.Generator().manual_seed(1)
    x_BD = torch.randn(16, 6, generator=generator).to(device)
    return model, x_BD, (torch.rand(32, generator=generator) < 0.4).to(device)


def gradients(model: Dictionary) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_a_single_group_is_topk() -> None:
    model, x_BD, dead_N = example()
    nested = MatryoshkaTopK(6, 32, 4, k_aux=3, fractions=[1.0])
    nested.load_state_dict(model.state_dict())
    losses = [m.loss(x_BD, dead_N, 16) for m in (model, nested)]
    for loss in losses:
        loss.total.backward()
    torch.testing.assert_close(losses[0].total, losses[1].total)
    torch.testing.assert_close(gradients(model), gradients(nested))


def test_aux_reaches_the_encoder_of_dead_latents(device: torch.device) -> None:
    model, x_BD, dead_N = example(device=device)
    model.loss(x_BD, dead_N, 16).aux.backward()
    # The decoder's bias is in the encoder's input, so AuxK moves it too; its own term is in neither e nor ehat.
    for name in ("w_enc_ND", "b_enc_N", "w_dec_ND"):
        moved_N = getattr(model, name).grad.view(32, -1).abs().sum(1) > 0
        assert moved_N[dead_N].any(), name
        assert not moved_N[~dead_N].any(), name


def test_without_dead_latents_aux_is_nothing(device: torch.device) -> None:
    model, x_BD, dead_N = example(device=device)
    losses = model.loss(x_BD, torch.zeros_like(dead_N), 16)
    assert losses.aux.item() == 0.0
    assert torch.equal(losses.total, losses.reconstruction)
    losses.total.backward()
    with_aux = gradients(model)
    model.aux_coefficient = 0.0
    model.loss(x_BD, dead_N, 16).total.backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, with_aux[name]), name


def test_aux_target_has_no_decoder_bias(device: torch.device) -> None:
    """A dead latent along the error explains all of it; with b_dec in the target it could not."""
    model = TopK(2, 3, k=1, k_aux=1).to(device)
    with torch.no_grad():
        model.w_dec_ND.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
        model.w_enc_ND.copy_(model.w_dec_ND)
        model.b_dec_D.copy_(torch.tensor([5.0, -7.0]))
        model.b_enc_N.copy_(torch.tensor([0.0, 0.0, -9.0]))
    x_BD = torch.tensor([[8.0, -5.0]], device=device)  # b_dec + (3, 2): latent 0 takes the 3, the error is (0, 2)
    losses = model.loss(x_BD, torch.tensor([False, True, False], device=device), 1)
    assert losses.reconstruction.item() == 2.0
    assert losses.aux.item() == 0.0


def test_aux_of_a_perfect_reconstruction_is_zero(device: torch.device) -> None:
    model = TopK(2, 3, k=2, k_aux=1).to(device)
    with torch.no_grad():
        model.w_dec_ND.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))
        model.w_enc_ND.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.5]]))
    losses = model.loss(torch.tensor([[3.0, 2.0]], device=device), torch.tensor([False, False, True]).to(device), 1)
    losses.total.backward()
    assert losses.total.item() == 0.0
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(model).values())


@pytest.mark.parametrize("kind", [TopK, MatryoshkaTopK])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_add_up_to_one_process(kind: type[TopK], world: int, device: torch.device) -> None:
    model, x_BD, dead_N = example(kind, device)
    whole = model.loss(x_BD, dead_N, 16)
    whole.total.backward()
    want = gradients(model)
    own: list[torch.Tensor] = []

    def record(share: torch.Tensor) -> torch.Tensor:
        own.append(share)
        return share

    for part_BD in x_BD.chunk(world):
        model.loss(part_BD, dead_N, 16, record)
    assert len(own) == world
    shares = [model.loss(part_BD, dead_N, 16, lambda _: torch.stack(own).sum(0)) for part_BD in x_BD.chunk(world)]
    for share in shares:
        share.total.backward()
    for name in ("total", "reconstruction", "aux"):
        torch.testing.assert_close(sum(getattr(share, name) for share in shares), getattr(whole, name))
    torch.testing.assert_close(gradients(model), want, rtol=1e-5, atol=1e-6)


def test_reduce_gets_this_ranks_error(device: torch.device) -> None:
    model, x_BD, dead_N = example(device=device)
    seen: list[torch.Tensor] = []

    def reduce(share: torch.Tensor) -> torch.Tensor:
        seen.append(share)
        return one_process(share)

    losses = model.loss(x_BD[:4], dead_N, 16, reduce)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0][0], (x_BD[:4] - losses.xhat_BD).square().sum())


@pytest.mark.parametrize("kind", [TopK, MatryoshkaTopK])
def test_encode_decode_and_forward_agree(kind: type[TopK], device: torch.device) -> None:
    model, x_BD, dead_N = example(kind, device)
    z_BN = model.encode_dense(x_BD)
    want_BD = z_BN @ model.w_dec_ND + model.b_dec_D
    xhats: list[Callable[[], torch.Tensor]] = [
        lambda: model(x_BD),
        lambda: model.decode(model.encode(x_BD)),
        lambda: model.loss(x_BD, dead_N, 16).xhat_BD,
    ]
    for xhat in xhats:
        torch.testing.assert_close(xhat(), want_BD, rtol=1e-5, atol=1e-5)
    pre_BN = (x_BD - model.b_dec_D) @ model.w_enc_ND.T + model.b_enc_N
    torch.testing.assert_close(z_BN, torch.where(pre_BN >= pre_BN.topk(4).values[:, 3:], pre_BN, 0.0).relu())


def test_forward_is_differentiable_in_its_input() -> None:
    model, x_BD, _ = example()
    x_BD.requires_grad_()
    (ours,) = torch.autograd.grad(model(x_BD).square().sum(), x_BD)
    pre_BN = (x_BD - model.b_dec_D) @ model.w_enc_ND.T + model.b_enc_N
    z_BN = torch.where(pre_BN >= pre_BN.topk(4).values[:, 3:], pre_BN, 0.0).relu()
    (want,) = torch.autograd.grad((z_BN @ model.w_dec_ND + model.b_dec_D).square().sum(), x_BD)
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: TopK(4, 8, k=9), "choose k from 1 to 8"),
        (lambda: TopK(4, 8, k=0), "choose k from 1 to 8"),
        (lambda: TopK(4, 8, k=2, k_aux=0), "k_aux"),
        (lambda: MatryoshkaTopK(4, 8, k=2, fractions=[0.5, 0.4]), "sum to 0.9000"),
        (lambda: MatryoshkaTopK(4, 8, k=2), "leave a group empty"),
    ],
)
def test_settings_that_cannot_work_are_named(make: Callable[[], TopK], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        make()
