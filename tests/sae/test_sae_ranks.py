"""Every architecture's step on 2 and 4 real ranks is that of one process at the same global batch."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from plmsae_cli.store import checkpoint

SCRIPT = Path(__file__).with_name("rank_steps.py")
SPEC = importlib.util.spec_from_file_location("rank_steps", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
rank_steps = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(rank_steps)
KINDS = list(rank_steps.KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two and four ranks left."""
    path = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(path)], env=environment) for rank in range(4)
    ]
    assert [rank.wait() for rank in ranks] == [0] * 4
    return path


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[dict[str, torch.Tensor], list[dict[str, float]]]]:
    return {kind: rank_steps.steps(kind, rank_steps.Gang()) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_train_what_one_process_trains(folder: Path, alone: dict[str, Any], world: int, kind: str) -> None:
    want, want_figures = alone[kind]
    per_rank = [load_file(folder / f"{kind}-{rank}-of-{world}.safetensors") for rank in range(world)]
    for found in per_rank[1:]:
        assert all(torch.equal(found[name], per_rank[0][name]) for name in want), "ranks hold the same"
    assert per_rank[0].keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(per_rank[0][name], tensor, rtol=1e-4, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")
    (figures, *others) = (
        json.loads((folder / f"figures-{rank}-of-{world}.json").read_text())[kind] for rank in range(world)
    )
    assert all(other == figures for other in others)
    for ours, theirs in zip(figures, want_figures, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("world", [2, 4])
def test_spread_latents_repeat_bit_for_bit(folder: Path, world: int) -> None:
    for rank in range(world):
        first, again = (load_file(folder / f"{run}-{rank}-of-{world}.safetensors") for run in ("latents_topk", "again"))
        assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("world", [2, 4])
def test_what_ranks_saved_of_their_latents_is_the_whole(folder: Path, world: int) -> None:
    found = checkpoint.load_newest(folder / f"saved-by-{world}")
    assert found is not None
    for rank in range(world):
        want = load_file(folder / f"whole-{rank}-of-{world}.safetensors")
        assert found.tensors.keys() == want.keys()
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("world", [2, 4])
def test_the_error_of_a_sum_in_bfloat16_over_ranks(folder: Path, world: int) -> None:
    """Of sending and adding up, against the float32 sum of terms that were not rounded: docs/design.md has the figures."""
    terms_WN = torch.randn(world, 80_000, generator=torch.Generator().manual_seed(world)).double()
    exact_N = terms_WN.sum(0)
    parts = [load_file(folder / f"sum-{rank}-of-{world}.safetensors")["own_P"] for rank in range(world)]
    error = float((torch.cat(parts).double() - exact_N).norm() / exact_N.norm())
    assert error < {2: 0.0026, 4: 0.0033}[world]
    sent = float((rank_steps.sum_terms(world).double().sum(0) - exact_N).norm() / exact_N.norm())
    assert sent < error, "the sum is what is rounded"


def test_spread_latents_continue_at_another_number_of_ranks(folder: Path) -> None:
    """Saved by four; continued by two, spread or not, and by one: each what one process trains from the start."""
    alone = rank_steps.training(rank_steps.Gang(), "data")
    alone.start(torch.randn(200, rank_steps.D, generator=torch.Generator().manual_seed(99)))
    for step in range(3):
        alone.step(step)
    every = {f"{parallel}-{rank}": load_file(folder / f"resumed-{parallel}-{rank}.safetensors")
             for parallel in ("latents", "data") for rank in range(2)}  # fmt: skip
    every["alone"] = rank_steps.resume(rank_steps.Gang(), folder / "saved-by-4", "auto")
    for who, found in every.items():
        for name, parameter in alone.model.named_parameters():
            torch.testing.assert_close(
                found[name], parameter.detach(), rtol=1e-4, atol=1e-6, msg=lambda t, w=who: f"{w}: {t}"
            )
    assert all(torch.equal(every["latents-0"][name], tensor) for name, tensor in every["latents-1"].items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_compared_show_what_they_should(alone: dict[str, Any], kind: str) -> None:
    """All gradients are there, latents died and were looked after, L0 is as the architecture has it."""
    tensors, figures = alone[kind]
    assert all(tensor.any() for name, tensor in tensors.items() if name.startswith("grad."))
    if kind in ("topk", "batch_topk", "latents_topk"):
        assert figures[-1]["dead"] > 0
        assert figures[-1]["aux"] > 0
    l0 = [line["l0"] for line in figures]
    if kind.endswith("annealed"):
        assert l0 == [9, 7, 5]
    elif kind == "latents_wide":
        assert l0 == pytest.approx([20] * 3, abs=0.5)
    elif "topk" in kind:
        assert l0 == [3, 3, 3]
    if "batch" in kind:
        assert figures[-1]["l0_std"] > 0
        assert tensors["model.theta"] > 0
        assert int(tensors["model.theta_steps"]) == 3
