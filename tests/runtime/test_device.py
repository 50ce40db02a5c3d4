"""Which device a process takes: what the launch wants, of what there is."""

from __future__ import annotations

import pytest
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.launching import Launch
from plmsae_cli.runtime import device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Those that were made the current one, in turn."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv(device.ALLOWED, raising=False)
    return current


def test_the_device_of_a_rank_is_its_current_one(two_gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else Triton launches on the first GPU what lies on the second."""
    monkeypatch.setenv(device.ALLOWED, "1")
    assert device.pick_device() == torch.device("cuda", 1)
    assert two_gpus == [1]


@pytest.mark.usefixtures("two_gpus")
def test_a_launch_without_gpus_computes_on_the_cpu_beside_idle_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.pick_device(1) == torch.device("cuda", 1)
    assert device.pick_device(2) == torch.device("cpu")
    for allowed, expected in (("", "cpu"), ("0", "cuda:0"), ("0,1", "cuda:0"), ("1", "cuda:1"), ("2", "cpu")):
        monkeypatch.setenv(device.ALLOWED, allowed)
        assert device.pick_device(0) == torch.device(expected)
    monkeypatch.setenv(device.ALLOWED, "1")
    assert device.pick_device(1) == torch.device("cpu")
    device.allow_gpus([1, 0])
    assert [device.pick_device(rank).index for rank in (0, 1)] == [1, 0]


@pytest.mark.usefixtures("two_gpus")
def test_gpus_are_counted_and_more_than_there_are_refused() -> None:
    assert [device.count_gpus(Launch(gpus=wanted)) for wanted in ("auto", 0, 1, 2, [1])] == [2, 0, 1, 2, 1]
    assert device.chosen_gpus(Launch(gpus=[1])) == [1]
    assert device.chosen_gpus(Launch(gpus=1)) == [0]
    with pytest.raises(UserError, match="asks for 3 GPUs, 2 are visible"):
        device.count_gpus(Launch(gpus=3))
    with pytest.raises(UserError, match="names GPU 2, 2 are visible"):
        device.count_gpus(Launch(gpus=[0, 2]))


def test_a_gpu_that_torch_cannot_use_is_never_passed_over_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "installed_gpus", lambda: 1)
    with pytest.raises(UserError, match="cannot use them") as caught:
        device.count_gpus(Launch())
    assert "--torch-index" in str(caught.value.hint)
    assert device.count_gpus(Launch(gpus=0)) == 0


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756.0, 51.2),
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA A10G", None, None),
        ("NVIDIA L40S", 362.0, 91.6),
        ("NVIDIA L4", 121.0, 30.3),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("Tesla V100-SXM2-16GB", None, 15.7),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
    ],
)
def test_peaks_are_of_the_gpu_that_is_named(
    name: str, bfloat16: float | None, float32: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda", 0)
    for compute, tera in ((torch.bfloat16, bfloat16), (torch.float32, float32)):
        assert device.peak_flops(cuda, compute) == (None if tera is None else pytest.approx(tera * 1e12))
    assert device.peak_flops(torch.device("cpu"), torch.float32) is None
