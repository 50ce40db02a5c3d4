"""One training step of a protein language model, the optimiser included: tokens a second, MFU, memory, shares of the time.

    python benchmarks/plm.py proteins.fasta.gz [--steps 30] [--results benchmarks/results.jsonl]
    torchrun --nproc-per-node 2 benchmarks/plm.py proteins.fasta.gz                      # the same micro-batches on each GPU
    python benchmarks/plm.py proteins.fasta.gz --layers 2 --hidden 64 --heads 2 --pack-tokens 2048 --steps 3   # on a CPU

The model of the speed runs by default: 24 layers of 768, 133,065,357 parameters, packs of 65,536 tokens. The proteins are
packed as `plmsae train` packs them, masked by its threads, and each step is its step. Milliseconds are wall time over all
timed steps; forward, backward and optimiser are medians of CUDA events over further steps. `--packs N` accumulates N
micro-batches a step, one update for all: its figure is named by that. `--learn N` trains N steps and prints the loss.
`--without block` leaves out the kernels of the UNet's blocks, `--without muon` those of Newton-Schulz.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import add, cpu, stamp

from plmsae_cli.config.training import Train
from plmsae_cli.plm import attention
from plmsae_cli.plm.alphabet import encode, wrap
from plmsae_cli.runtime.device import peak_flops, training_dtype
from plmsae_cli.runtime.dist import Gang, gang
from plmsae_cli.store.fasta import records
from plmsae_cli.training import plm_model
from plmsae_cli.training.optimizers import grouped_muon
from plmsae_cli.training.packs import Packs
from plmsae_cli.training.plm_objective import PLMObjective

PARTS = ("forward", "backward", "optimiser")


def training_packs(fasta: Path, pack_tokens: int, max_length: int) -> Packs:
    """All proteins of the file, those beyond `max_length` cut."""
    documents = [wrap(encode(sequence[:max_length])) for _, _, sequence in records(fasta) if sequence]
    return Packs([np.concatenate(documents)], pack_tokens, max_length + 2, seed=0)


def objective(options: argparse.Namespace, packs: Packs, device: torch.device, ranks: Gang) -> PLMObjective:
    plm: dict[str, Any] = {
        "architecture": options.architecture, "fasta": str(options.fasta), "num_layers": options.layers,
        "hidden_size": options.hidden, "num_attention_heads": options.heads, "max_length": options.max_length,
        "pack_tokens": options.pack_tokens, "objective": options.objective,
    }  # fmt: skip
    if options.architecture == "unet":
        plm |= {"attention_soft_cap": options.attention_soft_cap}
    train = {
        "kind": "plm", "plm": plm, "batch_tokens": options.pack_tokens * options.packs * ranks.world,
        "optimizer": options.optimizer, "betas": [0.8, 0.95], "eps": 1e-8, "grad_clip": None, "lr_warmup_steps": 0,
        "compute": options.compute,
    }  # fmt: skip
    parsed = Train.model_validate(train)
    compute = training_dtype(options.compute, device)
    total = max(options.learn, options.warm) + options.steps + 16
    return PLMObjective(parsed, packs, {}, total, ranks, device, compute)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Marks:
    """Moments on the device's own clock, between which nothing waits: the host stays ahead, as it is in training."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def __call__(self) -> None:
        if self._cuda:
            self._events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            self._events[-1].record()
        else:
            self._times.append(1e3 * time.perf_counter())

    def milliseconds(self) -> list[float]:
        """From each to the next."""
        if self._cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in pairwise(self._events)]
        return [b - a for a, b in pairwise(self._times)]


def parts(trained: PLMObjective, steps: range, device: torch.device) -> list[float]:
    """Milliseconds of `PARTS`, the median over steps of their sum over micro-batches."""
    marks, sizes = Marks(device), []
    for step in steps:
        packs, near = trained._load(step), trained._window(step)
        trained._compile(packs, near)
        trained._optimizer.zero_grad()
        sizes.append(len(packs))
        marks()
        for pack in packs:
            loss = trained._score(pack, near)[0] / max(1, pack.chosen)
            marks()
            loss.backward()  # type: ignore[no-untyped-call]
            marks()
        trained._optimizer.step(trained._schedule(step), None)
        marks()
    spent = iter(marks.milliseconds())
    found = []
    for size in sizes:
        halves = [next(spent) for _ in range(2 * size)]
        found.append((sum(halves[::2]), sum(halves[1::2]), next(spent)))
        next(spent, None)  # between two steps
    # The host may still be behind in the first.
    return [statistics.median(each) for each in zip(*found[1:], strict=True)]


def main() -> None:
    with gang() as ranks:
        measure(ranks)


def measure(ranks: Gang) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", type=Path)
    parser.add_argument("--architecture", choices=["unet", "esm2"], default="unet")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--max-length", type=int, default=1022)
    parser.add_argument("--pack-tokens", type=int, default=65_536)
    parser.add_argument("--packs", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--objective", choices=["mlm", "masked_diffusion"], default="mlm")
    parser.add_argument("--optimizer", choices=["muon", "adam"], default="muon")
    parser.add_argument("--attention-soft-cap", type=float)
    parser.add_argument("--compute", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--mode", help="of torch.compile, such as max-autotune-no-cudagraphs")
    parser.add_argument("--without", nargs="+", choices=["block", "muon"], default=[], help="kernels not to use")
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learn", type=int, default=0, help="train so many steps first and print losses")
    parser.add_argument("--profile", action="store_true", help="print the longest kernels of three steps")
    parser.add_argument("--results", type=Path, help="file to add the figures to")
    options = parser.parse_args()
    plm_model.COMPILE_MODE = options.mode
    attention.BLOCK_OPS, grouped_muon.KERNELS = "block" not in options.without, "muon" not in options.without
    device = torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    packs = training_packs(options.fasta, options.pack_tokens, options.max_length)
    trained = objective(options, packs, device, ranks)
    if not ranks.first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    print(
        f"{trained.config.num_parameters:,} parameters, {packs.num_tokens:,} tokens of {packs.num_documents:,} proteins"
    )

    begun = time.perf_counter()
    first = float(trained.step(0)["loss"])
    print(f"first step, compilation included: {time.perf_counter() - begun:.1f} s, loss {first:.3f}", flush=True)
    step = 1
    while step < max(options.warm, options.learn):
        figures = trained.step(step)
        step += 1
        if step % max(1, options.learn // 10) == 0 or step in (5, 10, 20):
            print(f"  step {step}: loss {float(figures['loss']):.4f}", flush=True)
    wait(device)
    waited, begun = trained.rates(0)["loader_wait"], time.perf_counter()
    for _ in range(options.steps):
        figures = trained.step(step)
        step += 1
    wait(device)
    seconds = (time.perf_counter() - begun) / options.steps
    waited = (trained.rates(0)["loader_wait"] - waited) / options.steps / seconds
    pace = trained.tokens_per_step / seconds
    peak = peak_flops(device, trained.compute)
    reached = trained.flops_per_step() / seconds / ranks.world
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    shares = parts(trained, range(step, step + 6), device)
    mfu = "" if peak is None else f", MFU {reached / peak:.1%}"
    print(
        f"{pace:,.0f} tok/s, {1e3 * seconds:.2f} ms a step, {reached / 1e12:.1f} TFLOP/s{mfu}, {memory:.1f} GiB, "
        f"waited for data {waited:.2%}, loss {float(figures['loss']):.4f}"
    )
    print("  " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in zip(PARTS, shares, strict=True)), flush=True)
    if options.profile:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for i in range(3):
                trained.step(step + 6 + i)
            wait(device)
        by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=by, row_limit=45, max_name_column_width=90))
    if options.results and ranks.first:
        name = torch.cuda.get_device_name() if device.type == "cuda" else cpu(torch.get_num_threads())
        command = " ".join(["python benchmarks/plm.py", *sys.argv[1:]])
        note = (
            f"{trained.config.num_parameters:,} parameters, {ranks.world} GPU(s), "
            f"{options.pack_tokens} tokens x {options.packs} a GPU, {options.optimizer}, {options.objective}, "
            f"{1e3 * seconds:.2f} ms{mfu}, {memory:.1f} GiB; "
            + ", ".join(f"{part} {ms:.1f} ms" for part, ms in zip(PARTS, shares, strict=True))
        )
        label = f"plm/{trained.config.num_parameters / 1e6:.0f}M"
        who = "plmsae" if ranks.world == 1 else f"plmsae, {ranks.world} GPUs"
        who += f", an update every {options.packs} micro-batches" if options.packs > 1 else ""
        line = {"name": label, "who": who, "value": round(pace), "unit": "tokens/s", "note": note}
        add(options.results, [{**line, **stamp("plm-step", name, command)}])


if __name__ == "__main__":
    main()
