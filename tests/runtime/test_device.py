"""Which device a process takes: what the launch wants, of what there is."""

from __future__ import annotations

import pytest
import torch

from plmsae_cli.config.data import Launch
from plmsae_cli.config.errors import UserError
from plmsae_cli.runtime import device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv(device.ALLOWED, raising=False)


@pytest.mark.usefixtures("two_gpus")
def test_a_launch_without_gpus_computes_on_the_cpu_beside_idle_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.pick_device(1) == torch.device("cuda", 1)
    assert device.pick_device(2) == torch.device("cpu")
    for allowed, expected in (("0", "cpu"), ("1", "cuda:0"), ("2", "cuda:0")):
        monkeypatch.setenv(device.ALLOWED, allowed)
        assert device.pick_device(0) == torch.device(expected)
    monkeypatch.setenv(device.ALLOWED, "1")
    assert device.pick_device(1) == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
def test_gpus_are_counted_and_more_than_there_are_refused() -> None:
    assert [device.count_gpus(Launch(gpus=wanted)) for wanted in ("auto", 0, 1, 2)] == [2, 0, 1, 2]
    with pytest.raises(UserError, match="asks for 3 GPUs, 2 are visible"):
        device.count_gpus(Launch(gpus=3))


def test_a_gpu_that_torch_cannot_use_is_never_passed_over_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "installed_gpus", lambda: 1)
    with pytest.raises(UserError, match="cannot use them") as caught:
        device.count_gpus(Launch())
    assert "--torch-index" in str(caught.value.hint)
    assert device.count_gpus(Launch(gpus=0)) == 0
