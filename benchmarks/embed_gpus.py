"""The stage `embed` on one GPU and on several, as much work for each: residues a second, and whether the rows are equal.

    python benchmarks/embed_gpus.py --fasta uniprot.fasta.gz --gpus 1 2 --folder /dev/shm --results benchmarks/results.jsonl

ESM-2 650M with random weights. A share of the proteins is embedded by one GPU and by all, whose rows must be the same; then all
proteins, as many for each GPU, by all. The rate is that from each process's first row to its last, summed; the note has the
time of the whole stage too, in which several processes first begin, import and read the weights.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from embed import CONFIGS, CUT
from record import add, stamp

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.pipeline import run_experiment
from plmsae_cli.plm.esm2 import ESM2
from plmsae_cli.runtime.progress import PlainReporter
from plmsae_cli.store.fasta import records
from plmsae_cli.store.fs import Store
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import read_manifest
from plmsae_cli.store.weights import save_model


def embed(folder: Path, sequences: list[str], gpus: int) -> tuple[float, dict[str, Any]]:
    """Seconds of the stage, and its manifest."""
    fasta, root = folder / "sample.fasta", folder / "runs"
    fasta.write_text("".join(f">p{i}\n{s}\n" for i, s in enumerate(sequences)))
    experiment = Experiment.model_validate(
        {
            "name": "bench",
            "root": str(root),
            "model": {"weights": str(folder / "weights")},
            "launch": {"gpus": gpus, "workers": gpus},
            "embed": {"fasta": str(fasta), "layers": [33], "shard": "256MB"},
        }
    )
    done = run_experiment(experiment, ["embed"], PlainReporter())
    manifest = read_manifest(Store(), Lineage(experiment, Store()).embed(33).folder)
    assert manifest is not None
    shutil.rmtree(root)
    return done.stages["embed"], manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, required=True)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, torch.cuda.device_count()])
    parser.add_argument("--folder", type=Path, help="where the stage writes; default: a temporary folder")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    most = max(options.gpus)
    sequences = [s[:CUT] for _, _, s in records(options.fasta) if s]
    share = sequences[::most]
    lines: list[dict[str, Any]] = []
    sums = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        with torch.device("cuda"):
            model = ESM2(CONFIGS["650M"]).half()
        state = {key: tensor.cpu() for key, tensor in model.state_dict().items()}
        save_model(Store(), str(folder / "weights"), state, asdict(model.config), {})
        del model, state
        embed(folder, share[:500], most)  # kernels made
        base = 0.0
        for gpus in options.gpus:
            seconds, manifest = embed(folder, share, gpus)
            sums[gpus] = manifest["row_sum"]
            if gpus > 1:
                seconds, manifest = embed(folder, sequences, gpus)
            rows = manifest["rows"] + manifest["heldout_rows"]
            value = manifest["speed"]["residues_per_second"] * gpus
            base = base or value / gpus
            note = f"{rows:,} residues, {seconds:.1f} s with all starts and files; {value / base:.2f} times one GPU's"
            if gpus > 1:
                note += (
                    "; rows those of one GPU, by their sum" if sums[gpus] == sums[1] else "; OTHER ROWS THAN ONE GPU'S"
                )
            who = f"plmsae, {gpus} GPU" + "s" * (gpus > 1)
            lines.append(
                {"name": "embed/650M-gpus", "who": who, "value": round(value), "unit": "residues/s", "note": note}
            )
            print(lines[-1], flush=True)
    if options.results:
        name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {len(os.sched_getaffinity(0))} CPU cores"
        common = stamp("embed-gpus", name, " ".join(["python benchmarks/embed_gpus.py", *sys.argv[1:]]))
        add(options.results, [{**line, **common} for line in lines])


if __name__ == "__main__":
    main()
