"""Models without values, and what making them leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from plmsae_cli.plm.esm2 import ESM2Config
from plmsae_cli.plm.unet_config import UNetConfig
from plmsae_cli.runtime.models import build_model, load_plm, shapes_alone

CONFIGS = [ESM2Config(num_layers=2, d=32, num_heads=2), UNetConfig(4, 32, 2), UNetConfig(2, 32, 2, num_att_tokens=16)]
STEPS = """
import sys, torch
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.training.optimizers.adam import Adam
from plmsae_cli.training.optimizers.base import Group
model = load_plm("bundled")
weight = torch.nn.Parameter(torch.ones(3))
weight.grad = torch.ones(3)
Adam([Group("all", {"w": weight})], (0.9, 0.999), 1e-8).step(0.5)
assert torch.allclose(weight, torch.full((3,), 0.5)), weight
sys.exit(" ".join({"torch._dynamo", "torch._inductor", "sympy", "triton"} & set(sys.modules)) or 0)
"""


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_shapes_are_those_of_the_model_and_hold_no_memory(config: ESM2Config | UNetConfig) -> None:
    with shapes_alone():
        bare = build_model(config)
    real = build_model(config)
    assert {n: p.shape for n, p in bare.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta for p in bare.parameters())
    assert torch.empty(1).device.type == "cpu", "nothing is left of it outside"


def test_loaded_models_have_all_their_values() -> None:
    model = load_plm("bundled")
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_reading_a_model_and_a_step_of_adam_on_a_cpu_need_no_compiler() -> None:
    """Importing it takes as long as importing torch, in every worker and every rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", STEPS], check=True, env=environment)
