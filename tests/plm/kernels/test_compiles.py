"""The kernels of training compile within the memory and registers of the GPUs they are for; this needs none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.offline_gpu import TARGET

PROGRAM = (
    TARGET
    + """
import re, subprocess, tempfile
from pathlib import Path
import torch, triton

tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
run, most_shared, found = JITFunction.run, 0, {}


def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    assert kernel.metadata.shared <= most_shared, (self.__name__, kernel.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    stack = int(re.search(r"STACK:(\\d+)", usage.stdout + usage.stderr)[1])
    found[self.__name__] = max(stack, found.get(self.__name__, 0))
    return kernel


JITFunction.run = compile_only

from plmsae_cli.plm import flash, products
from plmsae_cli.training.optimizers import newton_schulz

half = dict(dtype=torch.bfloat16)
tiles = torch.zeros(4, 3, dtype=torch.int32)
heads = 2
for width, window, cap in ((32, 5, 0.0), (64, 5, 0.0), (64, 0, 0.0), (128, 5, 1.0), (128, 0, 0.0)):
    qkv = torch.zeros(256, 3, heads, width, **half)
    q, k, v = qkv.unbind(1)
    lse, angles = torch.zeros(heads, 256), torch.zeros(256, 1, width // 2)
    turned = flash.Turned(torch.zeros(256, 2 * heads), torch.zeros(256), angles, angles)
    grads = list(torch.zeros_like(qkv).unbind(1))
    # What GPUs for desks have; described ones, and heads of 128, are for the others.
    most_shared = flash._SHARED_BYTES if width == 128 else 99 << 10
    flash.forward(q, k, v, tiles, window, cap)
    flash.backward(q, q, k, v, q, lse, tiles, window, cap, grads)
    if capability == 90:
        most_shared = 227 << 10
        flash.forward(q, k, v, tiles, window, cap, True, True)
        flash.backward(q.contiguous(), q, k, v, q, lse, tiles, window, cap, grads, turned, True)
if capability == 90:
    x, squares, angles = torch.zeros(256, 768, **half), torch.zeros(256, 1), torch.zeros(256, 1, 64)
    up = torch.zeros(2048, 768, **half)
    squared = products.up(x, squares, up)
    products.slopes(x, up.mT.contiguous(), squared, squares)
    products.added(x, squared, up.mT.contiguous())
    number = torch.zeros(256, dtype=torch.int32)
    table, weight = torch.zeros(33, 768, **half), torch.zeros(3, 768, 768, **half)
    products.queries(x, squares, weight, table, number.long(), number, angles, angles, 6)
    newton_schulz.iterated(torch.zeros(2, 768, 2048, **half))
for name, stack in sorted(found.items()):
    most = int(sys.argv[2]) if name == "forward_tiles" or "backward" in name else 0
    assert stack <= most, (name, stack)
print(found)
"""
)


@pytest.mark.parametrize(("capability", "spilled"), [(80, 320), (90, 288)])
def test_kernels_compile_within_what_a_multiprocessor_has(capability: int, spilled: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, str(capability), str(spilled)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
