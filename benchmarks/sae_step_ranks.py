"""The TopK step on one GPU and shared among several, by tokens (`data`) and by latents: time, speed-up, waits, memory.

    python benchmarks/sae_step_ranks.py
    torchrun --nproc-per-node 2 benchmarks/sae_step_ranks.py [--shapes S1 S2] [--parallel data latents] [--dead 5]

Of several ranks, the first also takes the step alone, while the others rest. `same batch`: the ranks share the batch of
the one GPU; `same a GPU`: each has as many tokens as the one. Speed-up is of tokens a second. `waiting` is the share of
the step in which a GPU waits for a collective, from CUDA events around each wait. Memory is the peak of the first GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from record import add, stamp
from sae_step_gpu import SHAPES, Batches, Shape, synthetic

from plmsae_cli.config.sae import SAE
from plmsae_cli.config.training import Train
from plmsae_cli.runtime.dist import Gang, gang
from plmsae_cli.training.sae_objective import SAEObjective

STEPS, TURNS = 30, 4


class Timed:
    """A gang that notes how long the GPU waits for each collective."""

    def __init__(self, inner: Gang) -> None:
        self._inner = inner
        self.rank, self.world, self.first, self.local_rank = inner.rank, inner.world, inner.first, inner.local_rank
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._waited(lambda: self._inner.sum(tensor))

    def maximum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._waited(lambda: self._inner.maximum(tensor))

    def sum_later(self, tensor: torch.Tensor) -> Later:
        return Later(self, self._inner.sum_later(tensor))

    def sum_rows_later(self, full: torch.Tensor, own: torch.Tensor) -> Later:
        return Later(self, self._inner.sum_rows_later(full, own))

    def gather_rows_later(self, own: torch.Tensor, full: torch.Tensor) -> Later:
        return Later(self, self._inner.gather_rows_later(own, full))

    def seconds(self) -> float:
        """Waited since the last call; waits for the GPU."""
        torch.cuda.synchronize()
        total = sum(before.elapsed_time(after) for before, after in self.events) / 1e3
        self.events.clear()
        return total

    def _waited(self, call: Any) -> Any:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        out = call()
        after.record()
        self.events.append((before, after))
        return out


class Later:
    def __init__(self, gang: Timed, pending: Any) -> None:
        self._gang, self._pending = gang, pending

    def wait(self) -> None:
        self._gang._waited(self._pending.wait)


class Share(Batches):
    """Of the batches of `rows` tokens, a rank's share of each."""

    def __init__(self, rows_RD: torch.Tensor, rows: int, rank: int, world: int) -> None:
        super().__init__(rows_RD, rows // world)
        self._rank, self._world = rank, world

    def rows(self, step: int) -> torch.Tensor:
        return self.batches[(step * self._world + self._rank) % len(self.batches)]


class Found(NamedTuple):
    seconds: float
    waiting: float
    """Share of a step."""
    gibibytes: float


def measure(shape: Shape, rows_RD: torch.Tensor, batch: int, parallel: str, dead: float, ranks: Gang) -> Found:
    data = Share(rows_RD, batch, ranks.rank, ranks.world)
    timed = Timed(ranks)
    train = Train.model_validate(
        {
            "sae": SAE(num_latents=shape.latents, k=shape.k),
            "batch_tokens": batch,
            "kernels": "fused",
            "lr": 1e-4,
            "parallel": parallel,
        }
    )
    device = torch.device("cuda", ranks.local_rank)
    objective = SAEObjective(train, data, data.mean_D, data.scale, 10**6, timed, device, torch.bfloat16)  # type: ignore[arg-type]
    objective.start(rows_RD[: 4 * 8192])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # of steps: the start is over once
    ages_N = objective._dead.tokens_since_fired_N
    mask_N = torch.rand(len(ages_N), device=device, generator=torch.Generator(device).manual_seed(1)) < dead
    best, waiting = float("inf"), 0.0
    for turn in range(TURNS):
        timed.seconds()
        ranks.barrier()
        begin = time.perf_counter()
        for step in range(STEPS):
            if dead:
                ages_N.masked_fill_(mask_N, 10**12)
            objective.step(turn * STEPS + step)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - begin) / STEPS
        waited = timed.seconds() / STEPS
        if turn and seconds < best:
            best, waiting = seconds, waited / seconds
    gibibytes = torch.cuda.max_memory_allocated() / 2**30
    objective.release()
    return Found(best, waiting, gibibytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[shape.name for shape in SHAPES])
    parser.add_argument("--parallel", nargs="+", default=["data", "latents"])
    parser.add_argument("--dead", type=float, default=0.0, help="percent of the latents called dead before every step")
    parser.add_argument("--results", type=Path, help="file to add the figures to")
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    table = [f"{'':28} {'ms':>8} {'tok/s':>12} {'speed-up':>8} {'waiting':>8} {'GiB':>6}"]
    with gang() as ranks:
        torch.cuda.set_device(ranks.local_rank)
        command = " ".join(["benchmarks/sae_step_ranks.py", *sys.argv[1:]])
        common = stamp("sae-step-ranks", torch.cuda.get_device_name(), command)

        def say(shape: Shape, what: str, batch: int, found: Found, alone: float) -> None:
            pace = batch / found.seconds
            head = f"{shape.name} {what}"
            table.append(f"{head:28} {found.seconds * 1e3:8.3f} {pace:12,.0f} {pace / alone:8.2f}")
            table[-1] += f" {found.waiting:8.1%} {found.gibibytes:6.2f}"
            print(table[-1], flush=True)
            note = f"{batch} tokens a step, {found.seconds * 1e3:.3f} ms, best of {TURNS - 1} turns of {STEPS} steps, "
            note += f"{found.waiting:.1%} waiting for collectives, {found.gibibytes:.2f} GiB, {options.dead:g} % dead"
            who = f"plmsae, {what}"
            line = {"name": f"sae-step/{shape.name}-gpus", "who": who, "value": round(pace), "unit": "tokens/s"}
            lines.append(line | common | {"note": note})

        for shape in (shape for shape in SHAPES if shape.name in options.shapes):
            rows_RD = synthetic(shape).to(torch.device("cuda", ranks.local_rank))
            dead, alone = options.dead / 100, 1.0
            if ranks.first:
                found = measure(shape, rows_RD, shape.rows, "auto", dead, Gang(local_rank=ranks.local_rank))
                alone = shape.rows / found.seconds
                say(shape, "1 GPU", shape.rows, found, alone)
            ranks.barrier()
            for parallel in options.parallel if ranks.world > 1 else []:
                for name, batch in (("same batch", shape.rows), ("same a GPU", shape.rows * ranks.world)):
                    found = measure(shape, rows_RD, batch, parallel, dead, ranks)
                    if ranks.first:
                        say(shape, f"{ranks.world} GPUs {parallel}, {name}", batch, found, alone)
            del rows_RD
        if ranks.first:
            print("\n" + "\n".join(table), flush=True)
            if options.results:
                add(options.results, lines)


if __name__ == "__main__":
    main()
