"""One fused step against the formulas in float64, and against the plain path's projection, Adam and ages."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from plmsae_cli.runtime.dist import Gang
from plmsae_cli.sae.batch_topk import BatchTopK
from plmsae_cli.sae.dead import DeadLatents
from plmsae_cli.sae.fused import gradients
from plmsae_cli.sae.fused.given import AdamOptions, Batch, Masters
from plmsae_cli.sae.fused.step import FusedStep
from plmsae_cli.sae.matryoshka import MatryoshkaBatchTopK, MatryoshkaTopK
from plmsae_cli.sae.topk import TopK

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N, D, K, ROWS = 32, 32, 4, 10
NEVER = 10**9


@dataclass
class Setup:
    model: TopK
    state: dict[str, Tensor]
    ages_N: Tensor
    raw_BD: Tensor
    batch: Batch
    adam: AdamOptions

    def step(self) -> FusedStep:
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        masters = Masters(parameters, self.state, self.ages_N)
        return FusedStep(self.model, masters, self.batch, self.adam, Gang())


def setup(kind: type[TopK] = TopK, window: int = NEVER, moments: torch.dtype = torch.float32, k_aux: int = 5) -> Setup:
    generator = torch.Generator().manual_seed(1)
    model = kind(D, N, K, k_aux=k_aux)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        model.b_enc_N[7] = 8.0  # fires on nearly every token
    model.normalize_decoder()
    model = model.to(DEVICE)
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for what in ("exp_avg", "exp_avg_sq"):
            state[f"{name}.{what}"] = torch.zeros_like(parameter, dtype=moments)
        state[f"{name}.step"] = torch.zeros((), device=DEVICE)
    mean_D = torch.randn(D, generator=generator).to(DEVICE)
    raw_BD = (torch.randn(ROWS, D, generator=generator) * 2).to(DEVICE) + mean_D
    ages_N = torch.zeros(N, dtype=torch.int64, device=DEVICE)
    return Setup(
        model, state, ages_N, raw_BD, Batch(ROWS, mean_D, 0.5, window), AdamOptions((0.9, 0.999), 6.25e-10, 0.01)
    )


@dataclass
class Formulas:
    total: Tensor
    aux: Tensor
    fvu: Tensor
    gradients: dict[str, Tensor]


def formulas(s: Setup, fused: FusedStep, before: dict[str, Tensor], dead_N: Tensor) -> Formulas:
    """Loss and gradients in float64, with the weights in bfloat16 as the kernels see them and their choice of latents."""
    exact = {name: p.double().cpu() for name, p in before.items()}
    half = {name: p.bfloat16().double().cpu() for name, p in before.items()}
    p = {name: (half if name != "b_dec_D" else exact)[name].requires_grad_() for name in before}
    inputs_BD = ((s.raw_BD - s.batch.mean_D) * s.batch.scale).double().cpu()
    pre_BN = (inputs_BD - p["b_dec_D"]) @ p["w_enc_ND"].T + p["b_enc_N"]
    chosen_BN = torch.zeros(ROWS, N, dtype=torch.float64)
    pairs = fused._encode.pairs
    token_P = torch.arange(len(pairs.acts_P)) // K if pairs.token_P is None else pairs.token_P.long().cpu()
    active_P = pairs.sort_keys_P.long().cpu() + pairs.shift < N
    chosen_BN[token_P[active_P], pairs.indices_P.long().cpu()[active_P]] = 1.0
    z_BN = pre_BN.relu() * chosen_BN
    prefixes = s.model.prefixes_G.tolist() if isinstance(s.model, MatryoshkaTopK | MatryoshkaBatchTopK) else [N]
    xhats = [(z_BN * (torch.arange(N) < m)) @ p["w_dec_ND"] + p["b_dec_D"] for m in prefixes]
    total = torch.stack([(inputs_BD - xhat).square().sum() for xhat in xhats]).mean() / inputs_BD.numel()
    error_BD = (inputs_BD - xhats[-1]).detach()
    aux = torch.zeros((), dtype=torch.float64)
    if dead_N.any():
        a_BN = pre_BN.relu() * dead_N
        kept_BN = torch.zeros_like(a_BN).scatter(
            1, a_BN.detach().topk(min(s.model.k_aux, int(dead_N.sum()))).indices, 1.0
        )
        ehat_BD = (a_BN * kept_BN) @ p["w_dec_ND"]
        length, energy = ehat_BD.square().sum().detach(), error_BD.square().sum()
        factor = torch.maximum((ehat_BD * error_BD).sum().detach() / length, 0.1 * (energy / length).sqrt()).clamp(
            max=1
        )
        misfit = (factor * ehat_BD - error_BD).square().sum() / error_BD.square().sum()
        aux = misfit * min(1.0, int(dead_N.sum()) / s.model.k_aux)
    (total + s.model.aux_coefficient * aux).backward()
    fvu = error_BD.square().sum() / inputs_BD.square().sum()
    found = {name: tensor.grad for name, tensor in p.items() if tensor.grad is not None}
    return Formulas(total + s.model.aux_coefficient * aux, aux, fvu, found)


def difference(ours: Tensor, want: Tensor) -> float:
    return float((ours.double().cpu() - want).norm() / want.norm())


@pytest.mark.parametrize(
    ("kind", "dead", "chunk"),
    [
        pytest.param(kind, dead, chunk, id=f"{kind.__name__}-{'dead' if dead else 'alive'}-{chunk}")
        for kind, dead, chunk in (
            (TopK, False, 256),
            (TopK, True, 8),
            (MatryoshkaTopK, False, 8),
            (MatryoshkaTopK, True, 256),
            (BatchTopK, True, 256),
            (MatryoshkaBatchTopK, False, 8),
        )
    ],
)
def test_loss_and_gradients_are_the_formulas(
    kind: type[TopK], dead: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "CHUNK", chunk)
    s = setup(kind, window=100 if dead else NEVER)
    dead_N = torch.zeros(N, dtype=torch.bool)
    if dead:
        dead_N[3::5] = True
        s.ages_N[dead_N.to(DEVICE)] = 10**6
    before = {name: p.detach().clone() for name, p in s.model.named_parameters()}
    fused = s.step()
    figures = fused(s.raw_BD, 0, 1e-3)
    want = formulas(s, fused, before, dead_N)

    assert float(figures["loss"]) == pytest.approx(float(want.total), rel=0.01)
    assert float(figures["fvu"]) == pytest.approx(float(want.fvu), rel=0.01)
    assert float(figures["aux"]) == pytest.approx(float(want.aux), rel=0.02)
    assert float(figures["dead"]) == pytest.approx(float(dead_N.float().mean()))
    if isinstance(s.model, BatchTopK):
        pairs = fused._encode.pairs
        assert pairs.offsets_B1 is not None
        assert float(figures["l0"]) == K
        assert float(figures["l0_std"]) == pytest.approx(float(pairs.offsets_B1.diff().double().std(correction=0)))
        assert float(s.model.theta) == float(pairs.acts_P.min()), "the first step's theta is its smallest activation"
    g = fused._gradients
    silent_N1 = (g.touched_N == 0).unsqueeze(1)
    assert difference(g.grad_enc_ND.masked_fill(silent_N1, 0), want.gradients["w_enc_ND"]) < 0.02
    assert difference(g.grad_dec_ND.masked_fill(silent_N1, 0), want.gradients["w_dec_ND"]) < 0.02
    assert difference(g.grad_b_N, want.gradients["b_enc_N"]) < 0.02
    assert difference(g.grad_b_SD.sum(0), want.gradients["b_dec_D"]) < 0.02
    if dead:  # it reaches the encoder of latents that did not fire
        revived_N = (g.counts_N == 0).cpu() & dead_N
        assert float(g.grad_enc_ND[revived_N.to(DEVICE)].float().norm()) > 0


@pytest.mark.parametrize(
    ("moments", "max_norm"),
    [(torch.float32, 0.01), (torch.bfloat16, None)],
    ids=["float32-clipped", "bfloat16-free"],
)
def test_the_update_is_the_plain_one(moments: torch.dtype, max_norm: float | None) -> None:
    from plmsae_cli.training.optimizers import Adam, Group
    from plmsae_cli.training.optimizers.rounded_adam import RoundedAdam

    s = setup(moments=moments)
    s.adam = replace(s.adam, max_norm=max_norm)
    plain = TopK(D, N, K).to(DEVICE)
    plain.load_state_dict(s.model.state_dict())
    optimizer = (Adam if moments == torch.float32 else RoundedAdam)(
        [Group("sae", dict(plain.named_parameters()))], (0.9, 0.999), 6.25e-10
    )
    ages = DeadLatents(N, DEVICE)
    fused, rate = s.step(), 1e-2
    for step in range(3):
        figures = fused(s.raw_BD * (step + 1), step, rate)
        g = fused._gradients
        silent_N1 = (g.touched_N == 0).unsqueeze(1)
        plain.w_enc_ND.grad = g.grad_enc_ND.float().masked_fill(silent_N1, 0)
        plain.w_dec_ND.grad = g.grad_dec_ND.float().masked_fill(silent_N1, 0)
        plain.b_enc_N.grad = g.grad_b_N.clone()
        plain.b_dec_D.grad = g.grad_b_SD.sum(0)
        plain.project_gradients()
        norm = optimizer.step(rate, max_norm)
        plain.normalize_decoder()
        ages.update(g.counts_N, ROWS)
        assert float(figures["grad_norm"]) == pytest.approx(D * float(norm), rel=0.02)
        tolerance = 1e-4 if max_norm is None else 1e-3  # the norm's projection comes from products in bfloat16
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(s.model.get_parameter(name), parameter, rtol=tolerance, atol=tolerance)
        assert torch.equal(s.ages_N, ages.tokens_since_fired_N)
        for name, tensor in optimizer.state_tensors().items():
            ours = s.state[name.removeprefix("sae.")]
            assert ours.dtype == tensor.dtype
            # Rounded moments may fall on either side where sums differ in their last bit.
            torch.testing.assert_close(ours.float(), tensor.float(), rtol=0.02, atol=1e-7)
            if moments == torch.bfloat16 and max_norm is None and "step" not in name:
                assert float((ours == tensor).float().mean()) > 0.98


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    s = setup()
    before = {name: tensor.clone() for name, tensor in {**s.state, **dict(s.model.named_parameters())}.items()}
    s.raw_BD[3, 3] = torch.inf
    figures = s.step()(s.raw_BD, 0, 1e-3)
    assert not figures["loss"].isfinite()
    after = {**s.state, **dict(s.model.named_parameters())}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
