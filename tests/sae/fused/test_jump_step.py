"""JumpReLU's fused step, over pairs and over all latents, against the closed form in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from plmsae_cli.runtime.dist import Gang
from plmsae_cli.sae.fused import dense, jump, threshold
from plmsae_cli.sae.fused.given import AdamOptions, Batch, Masters
from plmsae_cli.sae.fused.jump import FusedJumpStep
from plmsae_cli.sae.fused.threshold import ThresholdEncoder
from plmsae_cli.sae.jumprelu import JumpReLU
from plmsae_cli.training.optimizers import Adam, Group

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N, D, ROWS, BANDWIDTH = 40, 32, 20, 0.4


def jumprelu(generator: torch.Generator, target: float | None) -> JumpReLU:
    model = JumpReLU(D, N, 0.2, target_l0=target, bandwidth=BANDWIDTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.normalize_decoder()
    return model


def closed_form(
    step: FusedJumpStep, p: dict[str, Tensor], inputs_BD: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, L0 and gradients, by hand; which pairs are active and near is by the kernels' scores."""
    scores_BN = step._encode.scores_BN.double().cpu()
    theta_N = p["log_theta_N"].exp()
    active_BN = (scores_BN > step._encode.theta_N.double().cpu()).double()
    near_BN = ((scores_BN - step._encode.theta_N.double().cpu()).abs() < BANDWIDTH / 2).double()
    assert (near_BN * active_BN).any()
    assert (near_BN * (1 - active_BN)).any()
    z_BN = ((inputs_BD - p["b_dec_D"]) @ p["w_enc_ND"].T + p["b_enc_N"]) * active_BN
    error_BD = z_BN @ p["w_dec_ND"] + p["b_dec_D"] - inputs_BD
    l0, target = active_BN.sum() / ROWS, step._jump.target_l0
    penalty = l0 if target is None else (l0 / target - 1) ** 2
    per_active = 0.2 / ROWS if target is None else 0.2 * 2 * (l0 / target - 1) / target / ROWS
    d_z = 2 * error_BD @ p["w_dec_ND"].T / inputs_BD.numel()
    d_a = d_z * active_BN
    d_theta = -((d_z * theta_N + per_active) * near_BN).sum(0) / BANDWIDTH
    gradients = {
        "w_enc_ND": d_a.T @ (inputs_BD - p["b_dec_D"]),
        "b_enc_N": d_a.sum(0),
        "w_dec_ND": z_BN.T @ error_BD * (2 / inputs_BD.numel()),
        "b_dec_D": 2 * error_BD.sum(0) / inputs_BD.numel() - d_a.sum(0) @ p["w_enc_ND"],
        "log_theta_N": d_theta * theta_N,
    }
    return error_BD.square().sum() / inputs_BD.numel() + 0.2 * penalty, l0, gradients


@pytest.mark.parametrize(
    ("places", "target", "described"),
    [(N, None, True), (2, 3.0, True), (2, 3.0, False)],
    ids=["pairs", "all-latents", "all-latents-by-pointers"],
)
def test_a_step_is_the_closed_form_and_the_plain_update(
    places: int,
    target: float | None,
    described: bool,
    monkeypatch: pytest.MonkeyPatch,
    steps_as_plain: Callable[..., None],
    infinity_changes_nothing: Callable[..., None],
) -> None:
    monkeypatch.setattr(jump, "capacity", lambda _: places)
    may = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
    monkeypatch.setattr(dense, "has_descriptors", lambda *_: described and may)
    if DEVICE.type == "cpu":  # several tiles; on a GPU those of training
        for name, size in (("TILE", 32), ("WIDE", 16), ("STEP", 16)):
            monkeypatch.setattr(dense, name, size)
    generator = torch.Generator().manual_seed(1)
    model, plain = jumprelu(generator, target).to(DEVICE), JumpReLU(D, N, bandwidth=BANDWIDTH).to(DEVICE)
    plain.load_state_dict(model.state_dict())
    optimizer = Adam([Group("sae", dict(plain.named_parameters()))], (0.0, 0.999), 6.25e-10)
    state = {name.removeprefix("sae."): tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    raw_BD = torch.randn(ROWS, D, generator=generator).to(DEVICE)
    masters = {name: p.detach() for name, p in model.named_parameters()}
    half = {"w_enc_ND", "w_dec_ND", "b_enc_N"}
    seen = {name: (p.bfloat16() if name in half else p).double().cpu() for name, p in masters.items()}
    ages_N = torch.zeros(N, dtype=torch.int64, device=DEVICE)
    batch = Batch(ROWS, torch.zeros(D, device=DEVICE), 1.0, 10**9)
    step = FusedJumpStep(
        model, Masters(masters, state, ages_N), batch, AdamOptions((0.0, 0.999), 6.25e-10, 0.01), Gang()
    )
    scores: list[Tensor] = []
    select = step._encode.select

    def keep_scores() -> None:
        scores.append(step._encode.scores_BN.clone())
        select()

    monkeypatch.setattr(step._encode, "select", keep_scores)
    figures = step(raw_BD, 0, 1e-2)
    assert int(step._encode.dense) == int(places < N)
    step._encode.scores_BN.copy_(scores[0])
    total, l0, want = closed_form(step, seen, raw_BD.double().cpu())
    assert float(figures["loss"]) == pytest.approx(float(total), rel=0.01)
    assert float(figures["l0"]) == float(l0)
    assert float(figures["l0_std"]) > 0
    steps_as_plain(step, figures, want, plain, optimizer, (masters, state))
    fired_N = (scores[0].float() > step._encode.theta_N).any(0)
    assert torch.equal(ages_N == 0, fired_N)

    infinity_changes_nothing(step, raw_BD, (masters, state))


@pytest.mark.parametrize("spare", [0, -1], ids=["just-fits", "one-too-many"])
def test_pairs_are_listed_if_all_have_a_place(spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":  # several tiles
        monkeypatch.setattr(threshold, "SCORES_A_TILE", 128)
    generator = torch.Generator().manual_seed(0)
    rows, n, bandwidth = 6, 701, 0.5
    scores_BN = torch.randn(rows, n, generator=generator).bfloat16()
    scores_BN[2] = -1.0
    log_theta_N = torch.randn(n, generator=generator) * 0.3 + 0.3
    theta_N = log_theta_N.exp()
    active_BN = scores_BN.float() > theta_N
    listed_BN = active_BN | ((scores_BN.float() - theta_N).abs() < bandwidth / 2)
    token_P, latent_P = listed_BN.nonzero(as_tuple=True)
    encoder = ThresholdEncoder(rows, n, bandwidth, log_theta_N.to(DEVICE), len(token_P) + spare)
    encoder.scores_BN.copy_(scores_BN)
    encoder.select()
    pairs = encoder.pairs
    assert pairs.offsets_B1 is not None
    assert pairs.token_P is not None
    assert torch.equal(encoder.active_B.cpu().long(), active_BN.sum(1))
    if spare < 0:
        assert int(encoder.dense) == 1
        assert not pairs.offsets_B1.any()
        assert (pairs.sort_keys_P.cpu().long() + pairs.shift == n).all()
        return
    assert int(encoder.dense) == 0
    assert pairs.offsets_B1.cpu().tolist() == [0, *listed_BN.sum(1).cumsum(0).tolist()]
    assert torch.equal(pairs.token_P.cpu().long(), token_P)
    assert torch.equal(pairs.indices_P.cpu().long(), latent_P)
    assert torch.equal(pairs.sort_keys_P.cpu().long() + pairs.shift, latent_P)
    assert torch.equal(pairs.acts_P.cpu(), torch.where(active_BN, scores_BN.float(), 0.0)[listed_BN])
