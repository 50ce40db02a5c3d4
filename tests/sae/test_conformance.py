"""Fourteen defects found in published frameworks, and the tests that would catch each here.

`TESTS` is the list; a test named in it that is not in this file lies beside it.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor

from plmsae_cli.sae.architectures import ARCHITECTURES
from plmsae_cli.sae.batch_topk import BatchTopK
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.gated import Gated
from plmsae_cli.sae.initialise import initialise
from plmsae_cli.sae.matryoshka import MatryoshkaBatchTopK, MatryoshkaTopK
from plmsae_cli.sae.multi_topk import MultiTopK
from plmsae_cli.sae.topk import TopK

TESTS: dict[str, list[str]] = {
    "1 AuxK's gradient reaches the encoder": ["test_conformance.test_1_aux_reaches_the_encoder"],
    "2 ranks equal one process": ["test_sae_ranks.test_ranks_train_what_one_process_trains"],
    "3 sparse equals dense, forward and gradients": [
        "test_sparse.test_decode_is_the_dense_product",
        "test_sparse.test_encoder_gradients_are_the_dense_ones",
        "test_sae_loss.test_topk",
        "test_batch_topk.test_loss_and_gradients_are_the_dense_ones",
        "test_switch.test_loss_and_gradients_are_the_formula",
    ],
    "4 decoder norms are of latents": [
        "test_dictionary.test_decoder_norms_are_of_latents",
        "test_conformance.test_4_rows_have_norm_1_on_the_axis_of_latents",
    ],
    "5 folded export equals unfolded": ["test_sae_export.test_folded_eats_raw_activations"],
    "6 JumpReLU's gradients": ["test_dense_losses.test_jumprelu_gradients_are_the_closed_form"],
    "7 theta is frozen outside training": ["test_conformance.test_7_theta_is_frozen_outside_training"],
    "8 Matryoshka's weights and cumulative gradient": [
        "test_sae_loss.test_matryoshka",
        "test_conformance.test_8_every_prefix_weighs_the_same",
    ],
    "9 no b_dec in AuxK's target": ["test_sae_loss.test_aux_target_has_no_decoder_bias"],
    "10 dead counters in global tokens": ["test_dead.test_counters_are_global_tokens_at_any_world_size"],
    "11 Gated's auxiliary decoder is detached": ["test_conformance.test_11_only_the_gate_learns_from_the_frozen_decoder"],
    "12 the geometric median is one": ["test_initialise.test_no_neighbour_is_nearer_to_all_rows"],
    "13 Switch's FLOPs and router loss": [
        "test_switch.test_encoder_flops_drop_by_the_number_of_experts",
        "test_switch.test_the_router_loss_is_in_the_total_and_least_where_even",
    ],
    "14 metrics invariant to world size and batches": [
        "test_sae_fidelity.test_batches_do_not_matter",
        "test_sae_fidelity.test_world_size_does_not_matter",
        "test_conformance.test_14_micro_batches_add_up",
    ],
}  # fmt: skip
D, N, K, B = 6, 32, 3, 24


def make(kind: str) -> Dictionary:
    model = ARCHITECTURES[kind]
    return model(D, N, **({"k": K} if "k" in inspect.signature(model).parameters else {}))


def example(model: Dictionary) -> tuple[Tensor, Tensor]:
    """A batch and dead latents; the model starts on the batch."""
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(B, D, generator=generator)
    initialise(model, 0, x_BD)
    return x_BD, torch.rand(N, generator=generator) < 0.4


def test_the_tests_named_exist() -> None:
    assert [int(defect.split()[0]) for defect in TESTS] == list(range(1, 15))
    for names in TESTS.values():
        for name in names:
            file, _, function = name.partition(".")
            tree = ast.parse(Path(__file__).with_name(f"{file}.py").read_text(encoding="utf-8"))
            assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, name


@pytest.mark.parametrize("kind", [TopK, MultiTopK, MatryoshkaTopK, BatchTopK, MatryoshkaBatchTopK])
def test_1_aux_reaches_the_encoder(kind: type[TopK]) -> None:
    model = kind(D, N, K)
    x_BD, dead_N = example(model)
    model.loss(x_BD, dead_N, B).aux.backward()  # type: ignore[no-untyped-call]
    for name in ("w_enc_ND", "b_enc_N", "w_dec_ND"):
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        moved_N = gradient.view(N, -1).abs().sum(1) > 0
        assert moved_N[dead_N].any(), name
        assert not moved_N[~dead_N].any(), name


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_4_rows_have_norm_1_on_the_axis_of_latents(kind: str) -> None:
    model = make(kind)
    x_BD, dead_N = example(model)
    model.loss(x_BD, dead_N, B).total.backward()  # type: ignore[no-untyped-call]
    gradient = model.w_dec_ND.grad
    assert gradient is not None
    before_ND = gradient.clone()
    model.project_gradients()
    with torch.no_grad():
        model.w_dec_ND.mul_(torch.linspace(0.5, 2, N).unsqueeze(1))
    scaled_ND = model.w_dec_ND.detach().clone()
    model.normalize_decoder()
    if model.unit_rows:
        torch.testing.assert_close(model.w_dec_ND.norm(dim=1), torch.ones(N))
        along_N = (gradient * model.w_dec_ND).sum(1)
        torch.testing.assert_close(along_N, torch.zeros(N), rtol=0, atol=1e-6)
    else:
        assert torch.equal(model.w_dec_ND, scaled_ND)
        assert torch.equal(gradient, before_ND)


@pytest.mark.parametrize("kind", [BatchTopK, MatryoshkaBatchTopK])
def test_7_theta_is_frozen_outside_training(kind: type[BatchTopK]) -> None:
    model = kind(D, N, K)
    x_BD, dead_N = example(model)
    model.loss(x_BD, dead_N, B)
    theta, steps = model.theta.clone(), int(model.theta_steps)
    assert theta > 0
    assert steps == 1
    model.encode(3 * x_BD)  # never, even before `eval`
    model.eval()
    model.encode(3 * x_BD)
    model(3 * x_BD)
    model.loss(3 * x_BD, dead_N, B)
    assert torch.equal(model.theta, theta)
    assert int(model.theta_steps) == steps
    model.train()
    model.loss(3 * x_BD, dead_N, B)
    assert not torch.equal(model.theta, theta)


@pytest.mark.parametrize("kind", [MatryoshkaTopK, MatryoshkaBatchTopK])
def test_8_every_prefix_weighs_the_same(kind: type[MatryoshkaTopK]) -> None:
    """Where no latent is active, each of G prefixes has the same error: their mean is that error, once."""
    plain = TopK(D, N, K, aux_coefficient=0.0)
    nested = kind(D, N, K, aux_coefficient=0.0, fractions=[0.25, 0.25, 0.5])
    for model in (plain, nested):
        x_BD, dead_N = example(model)
        with torch.no_grad():
            model.b_enc_N.fill_(-100)
    want = (x_BD - plain.b_dec_D).square().mean()
    for model in (plain, nested):
        losses = model.loss(x_BD, dead_N, B)
        torch.testing.assert_close(losses.total, want)
        losses.total.backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(model.b_dec_D.grad, 2 * (plain.b_dec_D - x_BD).sum(0).detach() / x_BD.numel())


def test_11_only_the_gate_learns_from_the_frozen_decoder() -> None:
    """With magnitudes switched off, the main reconstruction is b_dec: what else moves comes from the frozen one."""
    model = Gated(D, N, sparsity_coefficient=1e-6)
    x_BD, dead_N = example(model)
    with torch.no_grad():
        model.b_mag_N.fill_(-100)
    losses = model.loss(x_BD, dead_N, B)
    losses.total.backward()  # type: ignore[no-untyped-call]
    assert not losses.fired_N.any()
    assert model.w_dec_ND.grad is not None
    assert not model.w_dec_ND.grad.any()
    assert model.w_enc_ND.grad is not None
    assert model.w_enc_ND.grad.abs().max() > 1e-3
    assert model.b_enc_N.grad is not None
    # b_dec moves as the bias of the main reconstruction and in the encoder's input, not as the frozen one's bias.
    encoder_D = -model.b_enc_N.grad @ model.w_enc_ND
    main_D = 2 * (model.b_dec_D - x_BD).sum(0) / x_BD.numel()
    torch.testing.assert_close(model.b_dec_D.grad, (encoder_D + main_D).detach())


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if "batch" not in kind])
@pytest.mark.parametrize("parts", [2, 6])
def test_14_micro_batches_add_up(kind: str, parts: int) -> None:
    """Losses and gradients of parts of a batch, each told the size of the whole; what is over the batch is given."""
    model = make(kind)
    x_BD, dead_N = example(model)
    given: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        given.append(tensor.clone())
        return tensor

    whole = model.loss(x_BD, dead_N, B, record)
    whole.total.backward()  # type: ignore[no-untyped-call]
    want = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    found = []
    for part_BD in x_BD.chunk(parts):
        replies = iter(given)
        losses = model.loss(part_BD, dead_N, B, lambda _, replies=replies: next(replies))  # type: ignore[misc]
        losses.total.backward()  # type: ignore[no-untyped-call]
        found.append(losses)
    for name in ("total", "reconstruction", "aux"):
        torch.testing.assert_close(sum(getattr(part, name) for part in found), getattr(whole, name))
    assert torch.equal(torch.cat([part.active_B for part in found]), whole.active_B)
    assert torch.equal(torch.stack([part.fired_N for part in found]).any(0), whole.fired_N)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-6, msg=name)
