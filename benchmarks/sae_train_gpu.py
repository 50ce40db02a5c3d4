"""Training from a dataset in the page cache beside the step alone on batches that lie on the GPU, and beside its prediction.

    python benchmarks/sae_train_gpu.py --shapes S2 [--rows 1_000_000] [--seconds 30] [--folder /fast/disk]
    python benchmarks/sae_train_gpu.py --shapes SAEFold --kind matryoshka --seconds 120
    python benchmarks/sae_train_gpu.py --shapes S3 --kind switch --s3     # the published shape of Switch, from a server
    python benchmarks/sae_train_gpu.py --shapes S3 --memory-gb 16

Blocks of synthetic rows are written as a dataset; `plmsae train` then reads them as it reads any other: checksums, the ring
of pinned buffers, checkpoints, metrics. Its rate is the median of metrics.jsonl without the first fifth. `--s3`: through
ranges from the server of `data_stream.py`, a process that sends files from the page cache.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data_stream import BUCKET, process, serve_files
from record import add, stamp
from sae_step_gpu import OTHERS, SHAPES, Batches, Dead, Shape, measure, plmsae, synthetic

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.pipeline import run_experiment
from plmsae_cli.runtime.device import known_gpu
from plmsae_cli.runtime.progress import PlainReporter
from plmsae_cli.store.activations import Statistics
from plmsae_cli.store.blocks import chunk_name, write_chunk, write_index
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.lineage import FORMATS
from plmsae_cli.store.manifest import write_manifest
from plmsae_cli.training.prediction import StepShape, step_seconds

CHUNK_ROWS = 65_536
SAEFOLD = Shape("SAEFold", 16_384, 2560, 20_480, 32)
"""That of experiments/examples/saefold-3b-l36-matryoshka.yaml."""
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("fused", {}),
    "matryoshka": (
        "fused",
        {"architecture": "matryoshka_topk", "fractions": [0.0273, 0.0427, 0.0759, 0.1708, 0.6833]},
    ),
    "switch": OTHERS["plmsae Switch 32"],
}
"""Kernels and options."""


def dataset(folder: Path, rows_RD: torch.Tensor, rows: int) -> None:
    """`rows` rows, those of `rows_RD` again and again, as an artifact of `optimize`."""
    store, d = Store(), rows_RD.shape[1]
    seen = Statistics(d, rows_RD.device)
    seen.update(rows_RD)
    files = [seen.write(store, join(str(folder), "stats.safetensors"))]
    chunk_RD = rows_RD.repeat(-(-CHUNK_ROWS // len(rows_RD)), 1)[:CHUNK_ROWS].cpu()
    names = [chunk_name(index) for index in range(-(-rows // CHUNK_ROWS))]
    sizes = [min(CHUNK_ROWS, rows - index * CHUNK_ROWS) for index in range(len(names))]
    for name, size in zip(names, sizes, strict=True):
        files.append(write_chunk(store, join(str(folder), name), chunk_RD[:size]))
    files.append(write_index(store, str(folder), names, sizes, d, rows_RD.dtype))
    facts = {
        "stage": "optimize", "key": "synthetic", "format": FORMATS["optimize"], "config": {}, "inputs": {}, "created": "",
        "rows": rows, "heldout_rows": 0, "d": d, "chunk_rows": CHUNK_ROWS, "dtype": "bfloat16", "layer": 1, "num_layers": 2,
        "weights": {"name": "synthetic", "sha256": ""}, "fasta": {"name": "synthetic", "sha256": ""}, "counts": {},
        "files": [{"name": Path(f.name).name, "size": f.size, "xxh3": f.xxh3} for f in files],
    }  # fmt: skip
    write_manifest(store, str(folder), facts)


def train(
    folder: Path, shape: Shape, sae: dict[str, Any], tokens: int, endpoint: str | None
) -> tuple[float, float, float]:
    """Tokens a second, share of the time in which the loader was waited for, seconds of the stage."""
    data = str(folder / "data") if endpoint is None else f"s3://{BUCKET}/data"
    body = {"data": data, "batch_tokens": shape.rows, "tokens": tokens, "sae": sae, "log_every": 20}
    experiment = {
        "name": shape.name.lower(),
        "root": str(folder / "runs"),
        "launch": {"gpus": min(1, torch.cuda.device_count())},
        "train": body,
    }
    if endpoint is not None:
        experiment["storage"] = {"endpoint_url": endpoint, "allow_http": True, "anonymous": True}
    try:
        run_experiment(Experiment.model_validate(experiment), ["train"], PlainReporter())
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":  # only the report, which follows, wants it
            raise
    run = folder / "runs" / shape.name.lower()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "tokens_per_second" in line]
    settled = lines[len(lines) // 5 :]
    rate = statistics.median(line["tokens_per_second"] for line in settled)
    status = json.loads((run / "status.json").read_text())
    return rate, statistics.mean(line["loader_share"] for line in settled), status["stage_seconds"]["train"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["S2"])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=30.0, help="of training, about")
    parser.add_argument("--kind", choices=list(KINDS), default="topk")
    parser.add_argument("--s3", action="store_true", help="read from a server")
    parser.add_argument("--memory-gb", type=float, help="GPU memory that torch may take")
    parser.add_argument("--folder", type=Path, help="where the dataset lies meanwhile; default: the temporary folder")
    parser.add_argument("--results", type=Path, help="file to add the figures to")
    options = parser.parse_args()
    command = " ".join(["python benchmarks/sae_train_gpu.py", *sys.argv[1:]])
    name = torch.cuda.get_device_name()
    common = stamp("sae-train-gpu", name, command)
    if options.memory_gb is not None:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.memory_gb * 1e9 / whole)
    for shape in (shape for shape in (*SHAPES, SAEFOLD) if shape.name in options.shapes):
        kernels, kind = KINDS[options.kind]
        rows_RD = synthetic(shape)
        data = Batches(rows_RD, shape.rows)
        dead = Dead(torch.zeros(shape.latents, dtype=torch.bool, device="cuda"), False)
        times, peak, _ = measure(partial(plmsae, shape, data, dead, "float32", kernels, kind), 0)
        alone = shape.rows / times[0] * 1e3
        del data
        tokens = int(alone * options.seconds) // shape.rows * shape.rows
        with tempfile.TemporaryDirectory(dir=options.folder) as name_of_folder:
            folder = Path(name_of_folder)
            dataset(folder / "data", rows_RD, options.rows)
            del rows_RD
            gc.collect()
            sae = {"num_latents": shape.latents, "k": shape.k, **kind}
            with process(serve_files, folder) if options.s3 else nullcontext() as endpoint:
                rate, share, seconds = train(folder, shape, sae, tokens, endpoint)
        gpu = known_gpu(name)
        guess = step_seconds(StepShape(shape.rows, shape.d, shape.latents, shape.k, 8), gpu, 1) if gpu else None
        predicted = shape.rows / guess if guess and options.kind != "switch" else None
        print(
            f"{shape.name} {options.kind}: alone {alone:,.0f} tok/s, from the {'server' if options.s3 else 'page cache'} "
            f"{rate:,.0f} ({rate / alone:.1%}), loader {share:.2%}, stage {seconds:.1f} s for {tokens:,} tokens, "
            f"{3e8 / rate / 60:.1f} min for 300 M; peak of a step {peak:.2f} GiB"
            + (f"; predicted {predicted:,.0f}" if predicted else ""),
            flush=True,
        )
        if options.results:
            cap = "" if options.memory_gb is None else f"; torch held to {options.memory_gb:g} GB"
            note = f"B {shape.rows}, d {shape.d}, n {shape.latents}, k {shape.k}, {tokens:,} tokens in {seconds:.1f} s{cap}"
            which = "" if options.kind == "topk" else f"-{options.kind}"
            label = f"sae-train/{shape.name}-{'s3' if options.s3 else 'cache'}{which}"
            if options.s3 and options.kind == "switch":
                label = "sae-train/switch-s3"
            waited = f"loader {share:.2%} of the time; 300 M tokens would take {3e8 / rate / 60:.1f} min"
            lines = [("plmsae", rate, f"{note}; {waited}"), ("limit (step alone)", alone, note)]
            lines += [("plmsae (predicted by --dry-run)", predicted, note)] if predicted else []
            add(
                options.results,
                [
                    {"name": label, "who": who, "value": round(value), "unit": "tokens/s", **common, "note": text}
                    for who, value, text in lines
                ],
            )


if __name__ == "__main__":
    main()
