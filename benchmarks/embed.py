"""ESM-2 activations, residues a second: ours beside fair-esm and transformers, in one run with random weights.

    python benchmarks/embed.py --fasta uniprot.fasta.gz --results benchmarks/results.jsonl
    python benchmarks/embed.py --fasta uniprot.fasta.gz --models 650M --budgets 16384 65536 --compile-modes eager default
    python benchmarks/embed.py --quick      a tiny model on a CPU, to see that it runs

For each model: the numerics gate at every layer in every dtype, the limits (matrix products, disk) of this machine, the
peers' forward passes over sorted batches, our forward pass over packs by budget and compile mode, half its depth, and the
stage `embed` from FASTA to local disk, warm. Lengths are the FASTA's, cut at 1022 residues. Exit code 1: a gate was missed.
"""

from __future__ import annotations

import argparse
import gc
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from embed_peers import GATES, errors, esm, fair_esm, own, rate, transformers_esm, wait
from record import add, cpu, stamp

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.pipeline import run_experiment
from plmsae_cli.plm.cost import forward_flops
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.plm.reader import Reader
from plmsae_cli.runtime.device import peak_flops
from plmsae_cli.runtime.embedding import Embedder, Typical
from plmsae_cli.runtime.embedding.batches import make_batch
from plmsae_cli.runtime.embedding.embedder import ANY_LENGTH
from plmsae_cli.runtime.embedding.packing import choose_shape, deal
from plmsae_cli.runtime.embedding.windows import pieces
from plmsae_cli.runtime.progress import PlainReporter
from plmsae_cli.store.fasta import records
from plmsae_cli.store.fs import Store
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import read_manifest
from plmsae_cli.store.weights import save_model

CUT = 1022
CONFIGS = {
    "tiny": ESM2Config(4, 64, 4),
    "8M": ESM2Config(6, 320, 20),
    "150M": ESM2Config(30, 640, 20),
    "650M": ESM2Config(33, 1280, 20),
    "3B": ESM2Config(36, 2560, 40),
}
KERNELS = {
    "own": "",
    "attention": ", own attention, the rest compiled",
    "torch": ", torch's attention, the rest compiled",
}
END_TO_END_S = 25.0
"""Seconds that the measured stage is made to last, by the number of proteins."""


@dataclass
class Bench:
    options: argparse.Namespace
    device: torch.device
    sequences: list[str]
    lines: list[dict[str, Any]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def say(self, name: str, who: str, value: float, unit: str = "residues/s", note: str = "") -> None:
        print(f"  {name:14} {who:44} {value:14,.1f} {unit}  {note}", flush=True)
        self.lines.append({"name": name, "who": who, "value": round(value, 3), "unit": unit, "note": note})

    @property
    def half(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> str:
    return f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""


@torch.inference_mode()
def product_rate(bench: Bench, d: int, rows: int) -> float:
    """FLOP/s of the best of the model's own matrix products in half precision."""
    x = torch.randn(rows, d, device=bench.device, dtype=bench.half)
    best = 0.0
    for wide in (3 * d, 4 * d):
        w = torch.randn(wide, d, device=bench.device, dtype=bench.half)
        count = 20 if bench.device.type == "cuda" else 2
        for repeat in (2, count):
            wait(bench.device)
            begun = time.perf_counter()
            for _ in range(repeat):
                torch.nn.functional.linear(x, w)
            wait(bench.device)
            seconds = time.perf_counter() - begun
        best = max(best, 2.0 * rows * d * wide * count / seconds)
    return best


def disk_rate(folder: Path, size: int) -> float:
    """Bytes a second of one large file through the store: hashed, written, synced."""
    piece = torch.randint(0, 255, (16 << 20,), dtype=torch.uint8).numpy().data
    begun = time.perf_counter()
    Store().write(str(folder / "rate.bin"), (piece for _ in range(size // len(piece))), size=size)
    seconds = time.perf_counter() - begun
    (folder / "rate.bin").unlink()
    return size / seconds


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """A reader made and used in here has those of `KERNELS`."""
    from plmsae_cli.plm import attention, reader

    before = attention._backend_name, reader._fused
    if choice == "torch":
        attention._backend_name = lambda *_: "varlen"
    if choice != "own":
        reader._fused = lambda _: None
    try:
        yield
    finally:
        attention._backend_name, reader._fused = before


def forward_alone(
    bench: Bench, reader: Reader, sequences: Sequence[str], budget: int, mode: str, depth: int, seconds: float
) -> tuple[float, float, float, str]:
    """Residues/s, FLOP/s of the model's own work, share of padding, note; packs lie on the device before the clock starts."""
    parts = pieces([len(s) for s in sequences])
    sizes = [p.stop + 2 for p in parts]
    compiled = mode != "eager"
    typical = Typical(sum(sizes), len(sizes), max(sizes), sum(sizes))
    shape = choose_shape(typical, budget, max(sizes)) if compiled else None
    packs = deal(sizes, budget, shape)
    chosen = packs.constant or packs.loose
    batches = []
    for pack in chosen[:: max(1, len(chosen) // 12)][:12]:
        batch = make_batch(sequences, [parts[i] for i in pack], shape, False)
        batches.append((batch, batch.to(bench.device)))
    torch_mode = None if mode in ("eager", "default", "any-length", "graph") else mode
    how: dict[str, Any] = {"compiled": compiled, "mode": torch_mode, "any_length": mode == "any-length"}

    def run(tensors: Any) -> Any:
        tokens_T, documents, kept_R = tensors
        for _, x_TD in reader.layers(tokens_T, documents, [depth], **how):
            rows_RD = x_TD.index_select(0, kept_R)
        return rows_RD

    begun = time.perf_counter()
    for _, tensors in batches[:2]:
        run(tensors)
    wait(bench.device)
    warm = time.perf_counter() - begun
    step: Callable[[Any], Any] = graphed(run, batches[0][1]) if mode == "graph" else run
    wait(bench.device)
    residues = squares = tokens = padding = 0
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds or not residues:
        for batch, tensors in batches:
            step(tensors)
            residues += batch.num_rows
            tokens += len(batch.tokens_T)
            padding += batch.num_padding
            squares += sum((p.stop + 2) ** 2 for p in batch.pieces)
        wait(bench.device)
    took = time.perf_counter() - begun
    real = tokens - padding
    flops = forward_flops(reader.config, depth, real, squares) / took
    note = f"{len(batches[0][0].tokens_T):,} tokens a pass, first two passes {warm:.1f} s, {peak_gib()}"
    return residues / took, flops, padding / tokens, note


def graphed(run: Callable[[Any], Any], example: Any) -> Callable[[Any], Any]:
    """The pass as one CUDA graph with its inputs at fixed places."""
    tokens_T, documents, kept_R = (example[0].clone(), example[1], example[2].clone())
    documents = documents._replace(cu_seqlens=documents.cu_seqlens.clone())
    fixed = (tokens_T, documents, kept_R)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        rows_RD = run(fixed)

    def step(tensors: Any) -> Any:
        tokens_T.copy_(tensors[0])
        documents.cu_seqlens.copy_(tensors[1].cu_seqlens)
        kept_R.copy_(tensors[2])
        graph.replay()
        return rows_RD

    return step


def sample(sequences: Sequence[str], residues: int) -> list[str]:
    """About so many residues: proteins in random order, then, where they do not suffice, the same ones turned by a residue,
    by two and so on, which have the same lengths and are other proteins."""
    chosen: list[str] = []
    turn = 0
    while True:
        for sequence in random.Random(turn).sample(sequences, len(sequences)):
            if residues <= 0:
                return chosen
            at = turn % len(sequence)
            chosen.append(sequence[at:] + sequence[:at])
            residues -= len(sequence)
        turn += 1


def end_to_end(
    bench: Bench, name: str, config: ESM2Config, layers: list[int], residues: int, folder: Path
) -> tuple[float, dict[str, Any], int]:
    """Residues/s of the stage `embed` on a sample of about so many residues, the manifest's speed, bytes a row."""
    weights, fasta = folder / "weights", folder / "sample.fasta"
    chosen = sample(bench.sequences, residues)
    model = ESM2(config) if bench.device.type == "cpu" else None
    if model is None:
        with bench.device:
            model = ESM2(config)
    state = {key: t.cpu() for key, t in model.to(bench.half).state_dict().items()}
    save_model(Store(), str(weights), state, asdict(config), {})
    del model, state
    free()

    def go(root: Path, sequences: Sequence[str]) -> tuple[float, dict[str, Any], int]:
        fasta.write_text("".join(f">p{i}\n{s}\n" for i, s in enumerate(sequences)))
        experiment = Experiment.model_validate(
            {
                "name": "bench",
                "root": str(root),
                "model": {"weights": str(weights)},
                "launch": {"gpus": 1 if bench.device.type == "cuda" else 0, "workers": 1},
                "embed": {
                    "fasta": str(fasta),
                    "layers": layers,
                    "shard": bench.options.shard,
                    "compile": bench.device.type == "cuda",
                    "batch_tokens": bench.options.stage_tokens,
                },
            }
        )
        done = run_experiment(experiment, ["embed"], PlainReporter())
        lineage = Lineage(experiment, Store())
        manifest = read_manifest(Store(), lineage.embed(layers[0]).folder)
        assert manifest is not None
        rows = manifest["rows"] + manifest["heldout_rows"]
        shutil.rmtree(root)
        return rows / done.stages["embed"], {**manifest["speed"], **manifest["kernel"]}, lineage.row_bytes

    # One shape for all packs is known from all proteins alone.
    go(folder / "cold", chosen[: max(64, len(chosen) // 8)] if ANY_LENGTH else chosen)
    result = go(folder / "warm", chosen)
    Embedder._shared.clear()
    free()
    return result


def bench_model(bench: Bench, name: str, folder: Path) -> None:
    options, config, cuda = bench.options, CONFIGS[name], bench.device.type == "cuda"
    title = f"embed/{name}"
    print(f"== {name}: {config.num_parameters / 1e6:,.0f} M parameters, {bench.device}", flush=True)

    # Gate first: a fast forward pass that is wrong is no result.
    spread = sorted(bench.sequences, key=len)
    few = ["M", "MKVXBUZO-.AC", *spread[:: max(1, len(spread) // options.gate_proteins)], spread[-1]]
    peer = own(config, bench.device) if esm is None else fair_esm(config, bench.device)
    if esm is None:
        print("  fair-esm is not installed: the gate is against our plain forward pass, and its line is left out")
    for dtype, shares in errors(peer, config, few, cuda, bench.device).items():
        who, worst = str(dtype).removeprefix("torch."), max(shares)
        print(
            f"  gate {who:9} worst layer {worst:.1e} of {GATES[dtype]:.0e}, last {shares[-1]:.1e}, {len(few)} proteins"
        )
        if not worst <= GATES[dtype]:
            bench.missed.append(f"{name} {who}: {worst:.2e} > {GATES[dtype]:.0e}")
    free()

    flops = product_rate(bench, config.d, min(options.budgets[-1], 65_536) if cuda else 512)
    limit = flops / (2 * config.num_parameters)
    bench.say(title, "limit (GEMM, 2 FLOP a parameter)", limit, note=f"{flops / 1e12:,.1f} TFLOP/s measured")
    rate_disk = disk_rate(folder, options.disk_bytes)
    row_bytes = 2 * config.d
    bench.say(title, "limit (disk)", rate_disk / row_bytes, note=f"{rate_disk / 1e9:.2f} GB/s, one file, synced")

    most = options.peer_batches
    if not options.skip_peers and esm is not None:
        last = [config.num_layers]
        forward = partial(peer.half() if cuda else peer, repr_layers=last)
        found = rate(forward, bench.sequences, options.peer_tokens, most, bench.device)
        del forward
        kind = "fp16" if cuda else "fp32"
        bench.say(
            title, f"fair-esm {kind}", found, note=f"sorted, {options.peer_tokens:,} padded tokens, forward alone"
        )
    del peer
    free()
    if not options.skip_peers:
        try:
            hf = transformers_esm(config, bench.device).to(bench.half)
        except ImportError as error:
            print(f"  transformers skipped: {error}")
        else:
            found = rate(
                lambda x: hf(x, attention_mask=(x != 1)), bench.sequences, options.peer_tokens, most, bench.device
            )
            note = f"SDPA, sorted, {options.peer_tokens:,} padded tokens, forward alone"
            bench.say(title, f"transformers {'bf16' if cuda else 'fp32'}", found, note=note)
            del hf
        free()

    with bench.device:
        model = ESM2(config).to(bench.half).eval()
    peak = peak_flops(bench.device, torch.bfloat16)
    best = 0.0
    tried = [
        (kernel, mode, budget)
        for kernel in options.kernels
        for mode in options.compile_modes
        for budget in options.budgets
    ]
    for kernel, mode, budget in tried:
        free()
        who = f"plmsae forward alone, {mode} {budget // 1024}k" + KERNELS[kernel]
        try:
            with kernels(kernel):
                reader = Reader(model)
                found, work, padding, note = forward_alone(
                    bench, reader, bench.sequences, budget, mode, config.num_layers, options.seconds
                )
        except Exception as error:
            print(f"  {who}: failed: {error!r:.300}", flush=True)
            continue
        mfu = f"MFU {work / peak:.1%}, " if peak else ""
        bench.say(title, who, found, note=f"{mfu}{work / 1e12:,.0f} TFLOP/s, padding {padding:.2%}, {note}")
        best = max(best, found)
        if (kernel, mode, budget) == tried[-1]:
            half, *_ = forward_alone(
                bench, reader, bench.sequences, budget, mode, config.num_layers // 2, options.seconds
            )
            bench.say(f"{title}-half", "plmsae forward alone", half, note=f"{half / found:.2f} times full depth")
    del reader, model
    free()

    wanted = int(best * options.stage_seconds)
    whole, speed, row_bytes = end_to_end(bench, name, config, [config.num_layers], wanted, folder)
    bound = min(best, rate_disk / row_bytes)
    note = (
        f"FASTA to local disk, {wanted:,} residues, warm; {whole / bound:.0%} of the smaller of forward alone and disk; "
        f"busy {speed['busy']:.1%}, waited {speed['waited']:.1%}, writing {speed['writing']:.0%}, "
        f"padding {speed['padding']:.2%}, {speed['residues_per_second']:,.0f} residues/s from first to last row, "
        f"{speed['batch_tokens']} tokens a pass"
    )
    bench.say(title, "plmsae", whole, note=note)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=None, help="default: 650M 3B")
    parser.add_argument("--fasta", type=Path, help="proteins whose lengths count; default: the package's own")
    parser.add_argument("--budgets", nargs="+", type=int, help="tokens of a pass; default 65536")
    parser.add_argument(
        "--compile-modes",
        nargs="+",
        help="default, any-length (both by default: kernels for one shape, and as the stage uses them), eager, "
        "max-autotune-no-cudagraphs, graph (the pass as one CUDA graph)",
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=["own"], help="all ours, or fewer")
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement of the forward pass")
    parser.add_argument("--stage-seconds", type=float, default=END_TO_END_S, help="of the measured stage, about")
    parser.add_argument("--stage-tokens", default="auto", help="embed.batch_tokens of the stage")
    parser.add_argument("--shard", default="1GB", help="embed.shard of the stage")
    parser.add_argument("--folder", type=Path, help="where the stage writes; default: a temporary folder")
    parser.add_argument("--results", type=Path, help="file to add the figures to")
    options = parser.parse_args()
    if options.stage_tokens != "auto":
        options.stage_tokens = int(options.stage_tokens)
    quick: dict[str, Any] = {"models": ["tiny"], "budgets": [1024], "compile_modes": options.compile_modes or ["eager"]}
    full: dict[str, Any] = {"models": options.models or ["650M", "3B"], "budgets": options.budgets or [65_536]}
    full["compile_modes"] = options.compile_modes or ["default", "any-length"]
    sizes = {"peer_tokens": 16_384, "peer_batches": 24, "gate_proteins": 8, "disk_bytes": 4 << 30}
    small = {"peer_tokens": 1024, "peer_batches": 2, "gate_proteins": 2, "disk_bytes": 16 << 20}
    for key, value in (
        {**quick, **small, "seconds": 0.5, "stage_seconds": 1.0} if options.quick else {**full, **sizes}
    ).items():
        setattr(options, key, value)
    options.budgets = sorted(options.budgets)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    fasta = options.fasta or Path(str(files("plmsae_cli") / "data" / "proteins.fasta.gz"))
    bench = Bench(options, device, [s[:CUT] for _, _, s in records(fasta) if s])
    about = torch.cuda.get_device_name() if device.type == "cuda" else cpu(torch.get_num_threads())
    common = stamp("embed", about, " ".join(["python benchmarks/embed.py", *sys.argv[1:]]))
    begun = time.perf_counter()
    for name in options.models:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            bench_model(bench, name, Path(folder))
        free()
    print(f"\n{'name':16}{'who':46}{'residues/s':>14}")
    for line in bench.lines:
        print(f"{line['name']:16}{line['who']:46}{line['value']:14,.0f}")
    print(f"{time.perf_counter() - begun:.0f} s in all; " + ("; ".join(bench.missed) or "every gate held"))
    if options.results:
        add(options.results, [{**line, **common} for line in bench.lines])
    return 1 if bench.missed else 0


if __name__ == "__main__":
    sys.exit(main())
