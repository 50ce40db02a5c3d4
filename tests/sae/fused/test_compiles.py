"""Every kernel compiles for the GPUs that plmsae supports; this needs none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.offline_gpu import TARGET

PROGRAM = (
    TARGET
    + """
import torch

# Bytes a block may have; what is compiled for 8.0 is to run on 8.6 and 8.9 as well, which have the least.
most_shared = {80: 101_376, 90: 232_448}[capability]
run, names = JITFunction.run, set()


def compile_only(self, *args, grid, warmup, **kwargs):
    names.add(self.__name__)
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    assert kernel.metadata.shared <= most_shared, (self.__name__, kernel.metadata.shared)
    return kernel


JITFunction.run = compile_only

from plmsae_cli.sae.fused import dense, residual
from plmsae_cli.sae.fused.aux import keep_top_
from plmsae_cli.sae.fused.given import AdamOptions, Batch, Masters
from plmsae_cli.sae.fused.jump import FusedJumpStep
from plmsae_cli.sae.fused.latents import FusedLatentStep
from plmsae_cli.sae.fused.step import FusedStep
from plmsae_cli.sae.fused.switch import FusedSwitchStep
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.sae.batch_topk import BatchTopK
from plmsae_cli.sae.jumprelu import JumpReLU
from plmsae_cli.sae.matryoshka import MatryoshkaBatchTopK, MatryoshkaTopK
from plmsae_cli.sae.switch import Switch
from plmsae_cli.sae.topk import TopK
from plmsae_cli.training.shard import Shard

dense.has_descriptors = lambda *_: capability >= 90
residual.limits_registers = lambda *_: capability == 90

class Second:  # of two ranks, as far as kernels go
    rank, world = 1, 2
    def sum(self, tensor): return tensor
    def sum_later(self, tensor): return self
    def sum_rows_later(self, full, own): return self
    def gather_rows_later(self, own, full): return self
    def maximum(self, tensor): return tensor
    def wait(self): pass


for kind, d, n, k, moments, ranks, step_kind in (
    (TopK, 768, 4096, 32, torch.bfloat16, Gang(), FusedStep),
    (MatryoshkaTopK, 80, 320, 10, torch.float32, Gang(), FusedStep),
    (TopK, 768, 4096, 32, torch.float32, Second(), FusedStep),
    (MatryoshkaTopK, 80, 321, 10, torch.bfloat16, Second(), FusedStep),
    (TopK, 2560, 4096, 64, torch.float32, Second(), FusedLatentStep),
    (MatryoshkaTopK, 80, 320, 10, torch.bfloat16, Second(), FusedLatentStep),
    (BatchTopK, 2560, 4096, 64, torch.float32, Gang(), FusedStep),
    (MatryoshkaBatchTopK, 80, 70_000, 200, torch.bfloat16, Second(), FusedStep),
    (lambda d, n, k: JumpReLU(d, n), 1280, 4096, 0, torch.float32, Gang(), FusedJumpStep),
    (lambda d, n, k: Switch(d, n, k, 32), 768, 4096, 32, torch.bfloat16, Gang(), FusedSwitchStep),
):
    model = kind(d, n, k)
    state, masters = {}, Shard(model, ranks).parameters
    for name, p in masters.items():
        state |= {f"{name}.{what}": torch.zeros_like(p, dtype=moments) for what in ("exp_avg", "exp_avg_sq")}
        state[f"{name}.step"] = torch.zeros(())
    ages = torch.full((n // 2 if step_kind is FusedLatentStep else n,), 10**6)
    masters = {name: p.detach() for name, p in masters.items()}
    constants = (Batch(64, torch.zeros(d), 1.0, 1), AdamOptions((0.9, 0.999), 1e-8, 1.0))
    step = step_kind(model, Masters(masters, state, ages), *constants, ranks)
    step(torch.zeros(64, d, dtype=torch.bfloat16), 0, 1e-3)
    keep_top_(torch.zeros(64, 6000, dtype=torch.bfloat16), 40)
print(*sorted(names))
"""
)


@pytest.mark.parametrize("capability", [80, 90])
def test_all_kernels_compile(capability: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(capability)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = (
        "_add_rows _bound _centre _count _count_digit _count_listed _decode _decode_all _errors _expert_scores _fold "
        "_histogram _keep_top _latent_sums _list_reaching _maxima _near_sums _places _residual _residual_ragged _route "
        "_route_backward _select _slopes _slopes_of_all _spread _threshold _weights_of_all _write _write_listed collect "
        "columns finish gradients long permute update_flat update_rows"
    )
    assert done.stdout.split() == expected.split()
