"""What eight bits cost: the error they add to real activations, and to an SAE trained on them.

    python benchmarks/int8.py [--proteins 300] [--tokens 300000] [--record]

Rows of the bundled model on its own proteins, calibrated on the training proteins and measured on those held out. One SAE is
trained on float32, one on bfloat16 and one on int8 rows, alike but for that; all are scored on the same float32 held-out rows.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import plmsae_cli
from benchmarks.record import HERE, add, cpu, stamp
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.pipeline import run_experiment
from plmsae_cli.runtime.progress import PlainReporter
from plmsae_cli.runtime.saved import load_sae
from plmsae_cli.store.activations import ActivationShards, Statistics
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.quantise import Quantiser

DTYPES = ("float32", "bfloat16", "int8")
LAYERS = [1, 3, 5, 6]
TRAINED = 5


def experiment(root: str, fasta: Path, dtype: str, tokens: int) -> Experiment:
    """One of the three runs."""
    train = {"layer": TRAINED, "sae": {"expansion": 4, "k": 32}, "batch_tokens": 1024, "tokens": tokens}
    return Experiment.model_validate(
        {
            "name": dtype,
            "root": root,
            "embed": {"fasta": str(fasta), "layers": LAYERS, "holdout": 0.1, "dtype": dtype},
            "shuffle": {},
            "optimize": {},
            "train": train,
        }
    )


def share(error_RD: torch.Tensor, rows_RD: torch.Tensor, mean_D: torch.Tensor) -> float:
    """Squared error as a share of the variance, both summed over rows and dimensions."""
    return float(error_RD.double().square().sum() / (rows_RD - mean_D).double().square().sum())


def plain_int8(rows_RD: torch.Tensor) -> torch.Tensor:
    """The peer: one scale a row, nothing by dimension."""
    scale_R1 = (rows_RD.abs().amax(1, keepdim=True) / 127).half().float()
    return (rows_RD / scale_R1).round().clamp(-127, 127) * scale_R1


def errors(store: Store, plain: Lineage, coded: Lineage, layer: int) -> Mapping[str, float]:
    """Added error on held-out rows of a layer."""
    folder = plain.embed(layer).folder
    shards = ActivationShards(store, folder, heldout=True)
    rows_RD = shards.read(0, shards.stop)
    mean_D = Statistics.read(store, join(folder, "stats.safetensors")).mean_D.float()
    quantiser = Quantiser.read(store, join(coded.embed(layer).folder, "calibration.safetensors"))
    stored = {
        "bfloat16": rows_RD.bfloat16().float(),
        "int8": quantiser.decode(quantiser.encode(rows_RD)),
        "int8, a scale a row alone": plain_int8(rows_RD),
    }
    return {name: share(kept_RD - rows_RD, rows_RD, mean_D) for name, kept_RD in stored.items()}


@torch.inference_mode()
def fvu(store: Store, root: str, dtype: str, plain: Lineage) -> float:
    """Unexplained variance of float32 held-out rows by the SAE trained on `dtype`."""
    folder = plain.embed(TRAINED).folder
    shards = ActivationShards(store, folder, heldout=True)
    rows_RD = shards.read(0, shards.stop)
    mean_D = Statistics.read(store, join(folder, "stats.safetensors")).mean_D.float()
    return share(load_sae(f"{root}/{dtype}")(rows_RD) - rows_RD, rows_RD, mean_D)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proteins", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--record", action="store_true", help="add the figures to results.jsonl")
    options = parser.parse_args()
    store = Store()
    text = gzip.decompress((Path(plmsae_cli.__file__).parent / "data" / "proteins.fasta.gz").read_bytes()).decode()
    with tempfile.TemporaryDirectory() as root:
        fasta = Path(root) / "proteins.fasta"
        fasta.write_text("".join(f">{record}" for record in text.split(">")[1 : options.proteins + 1]))
        runs = {dtype: experiment(root, fasta, dtype, options.tokens) for dtype in DTYPES}
        for run in runs.values():
            run_experiment(run, run.stages(), PlainReporter())
        lineages = {dtype: Lineage(run, store) for dtype, run in runs.items()}
        found: dict[str, Any] = {
            f"data/int8-error-layer-{layer}": errors(store, lineages["float32"], lineages["int8"], layer)
            for layer in LAYERS
        }
        found["data/int8-fvu"] = {dtype: fvu(store, root, dtype, lineages["float32"]) for dtype in DTYPES}
    common = stamp("int8", cpu(torch.get_num_threads()), " ".join(["python", *sys.argv]))
    lines = [
        {
            "name": name,
            "who": {"int8": "plmsae int8"}.get(who, who),
            "value": float(f"{value:.4g}"),
            "unit": "FVU" if name.endswith("fvu") else "share of the variance",
            **common,
            "note": f"bundled model, {options.proteins} proteins"
            + (f", layer {TRAINED}, {options.tokens:,} tokens, scored on float32 rows" if name.endswith("fvu") else ""),
        }
        for name, values in found.items()
        for who, value in values.items()
    ]
    for line in lines:
        print(f"{line['name']:28} {line['who']:28} {line['value']:.4g}")
    if options.record:
        add(HERE / "results.jsonl", lines)


if __name__ == "__main__":
    main()
