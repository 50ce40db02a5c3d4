"""Four SAEs on one stream against the same four alone: seconds of `train`, and bytes read from the dataset.

    plmsae optimize blocks.yaml --with-inputs     # bundled model and proteins, layer 5, holdout 0.01
    python benchmarks/shared_stream_cpu.py --data runs/data/optimize-<key> [--read-mb-s 20]

Both ways are real runs of one epoch, checkpoints and export included, in turn, twice; the shorter of the two counts. What
they leave is compared: every exported file must be the same to the byte. `--read-mb-s` holds all reads together to that
rate, as a network disk would.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from record import add, cpu, stamp

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.pipeline import run_experiment
from plmsae_cli.runtime.progress import PlainReporter
from plmsae_cli.runtime.run_folder import read_json
from plmsae_cli.stages.sweep import trials
from plmsae_cli.store.blocks import Blocks

SAES: list[dict[str, Any]] = [{"k": 8}, {"k": 16}, {"k": 32}, {"k": 16, "architecture": "matryoshka_topk"}]
BATCH, LATENTS, THREADS, TURNS = 2048, 512, 2, 2
HERE = Path(__file__).parent


class Meter:
    """Counts what `Blocks.read_into` reads, and holds it to a rate."""

    def __init__(self, bytes_per_second: float | None) -> None:
        self.bytes = 0
        self._rate, self._free, self._lock = bytes_per_second, 0.0, threading.Lock()
        real = Blocks.read_into

        def read_into(blocks: Blocks, row_start: int, out_RD: torch.Tensor) -> None:
            real(blocks, row_start, out_RD)
            with self._lock:
                self.bytes += out_RD.nbytes
                if self._rate is None:
                    return
                self._free = max(self._free, time.monotonic()) + out_RD.nbytes / self._rate
                wait = self._free - time.monotonic()
            time.sleep(max(0.0, wait))

        Blocks.read_into = read_into  # type: ignore[method-assign]


def experiment(data: str, root: Path, **train: Any) -> Experiment:
    sae = {"num_latents": LATENTS, **train.pop("sae", {})}
    body = {"data": data, "batch_tokens": BATCH, "sae": sae, **train}
    return Experiment.model_validate({"name": "many", "root": str(root), "launch": {"gpus": 0}, "train": body})


def together(data: str, root: Path) -> tuple[float, list[Path]]:
    many = experiment(data, root, saes=SAES)
    run_experiment(many, ["sweep"], PlainReporter())
    runs = [trial.run for trial in trials(many)]
    return read_json(runs[0] / "status.json")["stage_seconds"]["train"], runs


def alone(data: str, root: Path) -> tuple[float, list[Path]]:
    runs = []
    for number, sae in enumerate(SAES):
        done = run_experiment(experiment(data, root / str(number), sae=sae), ["train"], PlainReporter())
        runs.append(done.run.path)
    return sum(read_json(run / "status.json")["stage_seconds"]["train"] for run in runs), runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of an optimized dataset")
    parser.add_argument("--read-mb-s", type=float, help="limit of all reads together, in MB/s")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="file to add the figures to")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    load = os.getloadavg()[0]
    meter = Meter(None if options.read_mb_s is None else options.read_mb_s * 1e6)
    seconds: dict[str, list[float]] = {}
    read: dict[str, int] = {}
    for _ in range(TURNS):
        with tempfile.TemporaryDirectory() as folder:
            found = {}
            for name, way in (("plmsae", together), ("plmsae (4 lone runs)", alone)):
                meter.bytes = 0
                took, found[name] = way(options.data, Path(folder) / way.__name__)
                seconds.setdefault(name, []).append(took)
                read[name] = meter.bytes
            for ours, theirs in zip(*found.values(), strict=True):
                assert (ours / "sae/sae.safetensors").read_bytes() == (theirs / "sae/sae.safetensors").read_bytes()
    limited = "" if options.read_mb_s is None else f"-{options.read_mb_s:g}MBs"
    given = "" if options.read_mb_s is None else f" --read-mb-s {options.read_mb_s:g}"
    command = f"python benchmarks/{Path(__file__).name} --data {options.data}{given}"
    common = stamp(f"shared-stream{limited}", cpu(THREADS), command)
    name, lines = f"sae-many/cpu-4x{LATENTS}{limited}", list[dict[str, Any]]()
    for who, times in seconds.items():
        note = f"train of 4 SAEs ({LATENTS} latents), one epoch; turns {', '.join(f'{t:.1f}' for t in times)} s, load {load:.1f}"
        lines.append({"name": name, "who": who, "value": round(min(times), 2), "unit": "s", **common, "note": note})
        line = {"name": f"{name}-read", "who": who, "value": round(read[who] / 1e6, 1), "unit": "MB", **common}
        lines.append({**line, "note": "rows read: start, training with what was read ahead, export"})
    print(*map(json.dumps, lines), sep="\n")
    add(options.results, lines)


if __name__ == "__main__":
    main()
