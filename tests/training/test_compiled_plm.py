"""What a GPU's training step compiles, on a CPU: traced and differentiated by torch's compiler, with eager's gradients.

torch 2.11 dropped, without a word, all gradients below an autograd `Function` that ended in a conversion to the dtype that its
result had already; other releases do not. So every option that is part of a compiled graph is here.
"""

from __future__ import annotations

import pytest
import torch

from plmsae_cli.plm import attention as attention_module
from plmsae_cli.plm.attention import _attention_by_document, _flexible, constant
from plmsae_cli.plm.gradients import lookup, scaled, taken
from plmsae_cli.training.optimizers.grouped_muon import nesterov
from plmsae_cli.training.plm_model import compiled_passes
from plmsae_cli.training.plm_objective import PLMObjective
from tests.compiled import ERROR, assert_as_eager
from tests.training.compiled_models import MODELS, drawn, first_pack, objective

pytestmark = pytest.mark.usefixtures("traced")


def check(one: PLMObjective, compute: torch.dtype) -> None:
    pack, near = first_pack(drawn(one))
    trained, compiled = one._trained, compiled_passes(one._trained)
    assert_as_eager(
        lambda: trained.score(pack, near, compiled)[0],
        lambda: trained.score(pack, near, trained.passes)[0],
        dict(one.model.named_parameters()),
        ERROR[compute],
    )


@pytest.mark.parametrize("compute", ERROR)
@pytest.mark.parametrize("kind", MODELS)
def test_a_language_model_compiled_has_eagers_gradients(kind: str, compute: torch.dtype) -> None:
    check(objective("cpu", compute, **MODELS[kind]), compute)


@pytest.mark.parametrize("kind", ["esm2", "caps"])
def test_kernels_of_our_own_inside_what_is_compiled_pass_gradients_on(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where attention is one operation of the graph; here Triton's interpreter runs it."""
    pytest.importorskip("triton")
    from tests.sae.fused.interpreter import correct

    correct()
    monkeypatch.setattr(attention_module, "_backend_name", constant(lambda *_: "tiles"))
    check(objective("cpu", torch.float32, **MODELS[kind]), torch.float32)


@pytest.mark.parametrize(("window", "cap"), [(20, None), (None, 3.0), (20, 3.0)])
def test_flexible_attention_compiled_is_attention_by_document(window: int | None, cap: float | None) -> None:
    """Its results: torch has no gradients of it on a CPU; `test_compiled_gpu.py` has them."""
    lengths = (40, 1, 64, 23)
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    qkv = [torch.randn(128, 2, 16) for _ in range(3)]
    found = torch.compile(_flexible, dynamic=False)(*qkv, edges, window, cap)
    torch.testing.assert_close(found, _attention_by_document(*qkv, lengths, window, cap))


@pytest.mark.parametrize("compute", ERROR)
def test_operations_with_gradients_of_their_own_keep_them_when_compiled(compute: torch.dtype) -> None:
    """Each alone, and one after the other as in a model: what is dropped shows in the parameters below."""
    weights = {
        "table": torch.nn.Parameter(torch.randn(33, 16)),
        "matrix": torch.nn.Parameter(torch.randn(16, 16) / 4),
        "factor": torch.nn.Parameter(torch.tensor(0.7)),
    }
    tokens, places = torch.arange(40) % 33, torch.tensor([3, 0, 17, 39])

    def run() -> torch.Tensor:
        rows = lookup(weights["table"].to(compute), tokens)
        rows = scaled(rows @ weights["matrix"].to(compute), weights["factor"])
        return taken(rows, places).float().square().sum()

    assert_as_eager(torch.compile(run, dynamic=False), run, weights, ERROR[compute])


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("skip", [False, True])
def test_nesterov_compiled_is_nesterov(dtype: torch.dtype, skip: bool) -> None:
    g, m = torch.randn(3, 8, 16), torch.randn(3, 8, 16)
    ours, theirs = m.clone(), m.clone()
    arguments = (torch.tensor(0.9), torch.tensor(2.0), torch.tensor(skip), dtype)
    found = torch.compile(nesterov, dynamic=False)(g, ours, *arguments)
    expected = nesterov(g, theirs, *arguments)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(ours, m) == skip
