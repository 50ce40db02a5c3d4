"""What a GPU's training step compiles, as it is trained: inductor and our own attention against float32 without either.

Graphs here are small: each compiles in seconds.
"""

from __future__ import annotations

import pytest
import torch

from plmsae_cli.plm.attention import _attention_by_document, _flexible
from plmsae_cli.training import compiled_gradients
from plmsae_cli.training.plm_model import compiled_passes
from tests.compiled import assert_as_eager, gradients, zero
from tests.sae import test_compiled_sae as dictionaries
from tests.training.compiled_models import MODELS, drawn, first_pack, objective

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALF = torch.bfloat16
ERROR = 0.1
"""Of a gradient relative to its norm; eager bfloat16 on a CPU is within .02 of float32 here."""
OF_FACTORS = 0.3
"""Of the stream's and the values' two factors: their sums nearly cancel, which leaves a CPU's bfloat16 up to .07 of rounding."""


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(("kind", "heads"), [("esm2", 4), ("caps", 4), ("no_mask_embedding", 2)])
def test_a_compiled_language_model_has_the_gradients_of_float32(kind: str, heads: int) -> None:
    """With heads 64 and 128 wide, each with shapes of its own in `plm/flash.py`; float32 on the CPU, document by document."""
    plm = {**MODELS[kind], "hidden_size": 256, "num_attention_heads": heads}
    ours, theirs = drawn(objective("cuda", HALF, **plm)), drawn(objective("cpu", torch.float32, **plm))
    losses, found = [], []
    for one in (ours, theirs):
        trained = one._trained
        passes = compiled_passes(trained) if one is ours else trained.passes
        loss = trained.score(*first_pack(one), passes)[0]
        losses.append(float(loss))
        grads = gradients(loss, dict(one.model.named_parameters()))
        found.append({name: grad.cpu().double() for name, grad in grads.items()})
    assert zero(found[0]) == zero(found[1]) == []
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    errors = {name: float((found[0][name] - grad).norm() / grad.norm()) for name, grad in found[1].items()}
    most = {name: OF_FACTORS if grad.numel() <= 2 else ERROR for name, grad in found[1].items()}
    assert {name: error for name, error in errors.items() if not error <= most[name]} == {}


def test_a_training_on_a_gpu_looks_at_its_gradients_and_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_gradients, "FEW", 60)  # of the 256 tokens of a pack
    one = objective("cuda", HALF, **{**MODELS["all"], "hidden_size": 128})
    assert [float(one.step(step)["loss"]) for step in range(3)][2] > 0
    assert one._compiled


@pytest.mark.parametrize("kind", ["jumprelu_target", "jumprelu_tanh", "gated", "relu_l1_norm"])
def test_a_compiled_dictionary_has_eagers_gradients(kind: str) -> None:
    dictionaries.check(kind, "cuda", HALF, ERROR)


def test_a_dictionarys_step_on_a_gpu_looks_at_its_gradients_and_finds_nothing() -> None:
    one = dictionaries.plain("jumprelu", "cuda", HALF)
    assert one._unchecked
    one(dictionaries.rows(0).cuda(), 0, 1e-3)
    assert not one._unchecked


def test_flexible_attention_compiled_has_the_gradients_of_attention_by_document() -> None:
    lengths = (40, 1, 64, 151)
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    weights = torch.randn(256, 2, 64, device="cuda")
    inputs = {name: torch.nn.Parameter(torch.randn(256, 2, 64, device="cuda")) for name in "qkv"}

    def halved() -> list[torch.Tensor]:
        return [parameter.to(HALF) for parameter in inputs.values()]

    assert_as_eager(
        lambda: (torch.compile(_flexible, dynamic=False)(*halved(), edges, 20, 3.0).float() * weights).square().sum(),
        lambda: (_attention_by_document(*halved(), lengths, 20, 3.0).float() * weights).square().sum(),
        inputs,
        ERROR,
    )
