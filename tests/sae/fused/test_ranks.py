"""The fused step on two real ranks is that of one process at the same global batch, AuxK and clipping included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("rank_steps.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    places = [(0, 1), (0, 2), (1, 2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(world), str(path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, world in places
    ]
    errors = [rank.communicate()[1] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(errors)[-3000:]
    return path


@pytest.mark.parametrize("shared", ["data", "latents"])
def test_what_two_ranks_saved_is_what_they_export_and_continues_on_one(
    shared: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from rank_steps import Gang, checkpoint, sae_kernels, training

    found = checkpoint.load_newest(folder / f"saved-{shared}")
    assert found is not None
    for rank in range(2):
        exported = load_file(folder / f"trained-{shared}-{rank}-of-2.safetensors")
        assert all(torch.equal(found.tensors[f"model.{name}"], tensor) for name, tensor in exported.items())
    monkeypatch.setattr(sae_kernels, "why_plain", sae_kernels.why_plain)  # restored after `training`
    resumed = training(Gang(), "auto")
    resumed.load(found.tensors)
    resumed.step(found.step)
    want = load_file(folder / "trained-data-0-of-1.safetensors")
    for name, parameter in resumed.model.named_parameters():
        # Moments are rounded at random, to either side where sums differ in their last bit.
        torch.testing.assert_close(
            parameter.detach(), want[name], rtol=0.02, atol=5e-4, msg=lambda t, n=name: f"{n}: {t}"
        )


def test_two_ranks_save_all_that_training_changes(folder: Path) -> None:
    """BatchTopK's theta and its count of steps, which no rank holds a part of, come back too."""
    from plmsae_cli.store import checkpoint

    found = checkpoint.load_newest(folder / "saved-batch-topk")
    assert found is not None
    trained = load_file(folder / "trained-batch-topk-0.safetensors")
    assert trained["theta"] > 0
    assert trained["theta_steps"] == 1
    for name, tensor in trained.items():
        assert torch.equal(found.tensors[f"model.{name}"], tensor), name


@pytest.mark.parametrize(
    ("shared", "kind"),
    [
        ("data", "TopK"),
        ("data", "MatryoshkaTopK"),
        ("data", "BatchTopK"),
        ("latents", "TopK"),
        ("latents", "MatryoshkaTopK"),
    ],
)
def test_two_ranks_are_one_process(kind: str, shared: str, folder: Path) -> None:
    first, second = (load_file(folder / f"{shared}-{kind}-{rank}-of-2.safetensors") for rank in range(2))
    alone = "data" if kind == "MatryoshkaTopK" else shared
    one = load_file(folder / f"{alone}-{kind}-0-of-1.safetensors")
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"the ranks differ in {name}"
    assert one["figure.0.aux"] > 0
    assert torch.equal(one["ages_N"], first["ages_N"])
    for name, tensor in one.items():
        # Each rank's gradient is rounded to bfloat16 before it is sent.
        torch.testing.assert_close(first[name], tensor, rtol=0.01, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")
