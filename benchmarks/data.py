"""The data plane on this disk: shuffle and optimize beside `cp`, litdata and Ray Data, on the same rows.

    python -m benchmarks.data shuffle --folder DISK [--gigabytes 1 4 8] [--memory 4GB] [--peers] [--record]
    python -m benchmarks.data memory [--gigabytes 2] [--record]      CPU rate a core, everything in /dev/shm
    python -m benchmarks.data passes --folder DISK [--record]        the same rows in two, three and four passes

Rows are random bits in shards as `embed` writes them. Each contender is a process of its own, in turn, on one core unless it
says otherwise (`--workers`). `cp` copies the shards and then the copy: it reads and writes the same bytes twice, as shuffle and
optimize do; both end with the bytes on the disk (fsync). `--peers` needs litdata, ray[data] and pandas; what is absent is
said, and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plmsae_cli.runtime.task import Task

D = 1280
ROW_BYTES = 2 * D
SHARD = 1_000_000_000
BLOCK_ROWS = 8192
MADE = "made.json"


def make(folder: Path, gigabytes: float) -> int:
    """A finished embedding of random rows; how many."""
    import numpy as np
    import torch

    from plmsae_cli.store.activations import Statistics
    from plmsae_cli.store.fs import Store, join
    from plmsae_cli.store.manifest import write_manifest
    from plmsae_cli.store.tensorfile import write_tensors

    store, root = Store(), str(folder / "embed")
    generator = np.random.default_rng(0)
    rows = int(gigabytes * 1e9) // ROW_BYTES
    files, start = [], 0
    while start < rows:
        count = min(SHARD // ROW_BYTES, rows - start)
        raw = torch.from_numpy(generator.integers(0, 2**16, (count, D), dtype=np.uint16).view(np.int16))
        name = f"shard-{len(files):05d}.safetensors"
        record = write_tensors(store, join(root, name), {"acts": raw.view(torch.bfloat16)}, {"row_offset": str(start)})
        files.append({"name": name, "size": record.size, "xxh3": record.xxh3})
        start += count
    Statistics(D).write(store, join(root, "stats.safetensors"))
    body = {"format": "f", "stage": "embed", "key": "k", "config": {}, "inputs": {}, "created": 0.0, "files": files}
    names = {"num_layers": 1, "weights": {}, "fasta": {}, "heldout_rows": 0, "counts": {}, "layer": 0}
    write_manifest(store, root, {**body, **names, "rows": rows, "d": D, "dtype": "bfloat16"})
    return rows


def ours(folder: Path, memory: int, workers: int = 1, middle: int | None = None) -> Mapping[str, Any]:
    """shuffle and optimize, one task after the other in this process or by workers, whose start does not count."""
    import torch

    from plmsae_cli.stages.common import finish_task, passes_json
    from plmsae_cli.stages.optimize import reduce_tasks
    from plmsae_cli.stages.shuffle import level_tasks
    from plmsae_cli.store.blocks import chunk_rows
    from plmsae_cli.store.fs import Store
    from plmsae_cli.store.lineage import Ref
    from plmsae_cli.store.manifest import read_manifest
    from plmsae_cli.store.passes import ceil_root, chunks_per_task, divide

    source, shuffled, blocks = (str(folder / name) for name in ("embed", "shuffle", "optimize"))
    manifest = read_manifest(Store(), source)
    assert manifest is not None
    rows = manifest["rows"]
    passes = divide(rows, ROW_BYTES, memory, remote=False)
    if middle is not None:
        fan = max(2, ceil_root(passes.levels()[0].groups, middle + 1)) if middle else 0
        passes = replace(passes, middle=middle, fan=fan)
    levels = level_tasks(passes, shuffled, source, 0, memory)
    facts = {**passes_json(passes), "d": D, "layer": 0, "source": source}
    first = finish_task("shuffle", [Ref("shuffle", "s", shuffled)], levels[-1], facts)
    per_chunk = chunk_rows(512_000_000, BLOCK_ROWS, D, torch.bfloat16)
    step = chunks_per_task(rows, ROW_BYTES, per_chunk, memory, remote=False)
    reduces = reduce_tasks(blocks, shuffled, rows, per_chunk, step, memory)
    more = {
        "layer": 0,
        "rows": rows,
        "d": D,
        "width": D,
        "chunk_rows": per_chunk,
        "activations": source,
        "source": shuffled,
    }
    second = finish_task("optimize", [Ref("optimize", "o", blocks)], reduces, more)
    waves = [*levels, [first], reduces, [second]]
    if workers == 1:
        _run([task for wave in waves for task in wave])
        own: dict[str, float] = {}
    else:
        assert len(levels) == 1, "passes between free the files of those before"
        with ProcessPoolExecutor(workers, get_context("spawn"), _run, ([],)) as pool:
            list(pool.map(_run, [[]] * workers))
            begun, used = time.perf_counter(), _cpu()
            for wave in waves:
                list(pool.map(_run, [[task] for task in wave]))
            own = {"seconds": time.perf_counter() - begun, "cpu": _cpu() - used}
    manifests = [read_manifest(Store(), f) or {} for f in (shuffled, blocks)]
    return {"passes": passes.count, "peak": max(m["peak_memory"] for m in manifests), **own}


def _run(tasks: Sequence[Task]) -> None:
    """In the process that does them."""
    import torch

    from plmsae_cli.config.experiment import Experiment
    from plmsae_cli.executors.worker import LocalContext, run_task
    from plmsae_cli.stages.common import FINISH
    from plmsae_cli.store.memory import BUFFERS

    torch.set_num_threads(1)
    experiment = Experiment.model_validate({"embed": {"fasta": "x", "layers": [0]}, "shuffle": {}})
    for task in tasks:
        run_task(task, LocalContext(experiment, lambda *_, **__: None))
        if task.id == FINISH:
            BUFFERS.clear()  # as executors do at a stage's end


def litdata(folder: Path, workers: int = 1) -> Mapping[str, Any]:
    """litdata.optimize fed with blocks of rows in their own order: no shuffle, half the work. It writes no bfloat16, so int16."""
    import litdata as ld
    import torch
    from litdata.streaming.item_loader import TokensLoader

    rows = _num_rows(folder)
    ld.optimize(
        fn=_LitdataBlock(str(folder / "embed")),
        inputs=[(start, min(start + BLOCK_ROWS, rows)) for start in range(0, rows, BLOCK_ROWS)],
        output_dir=str(folder / "litdata"),
        chunk_size=24 * BLOCK_ROWS * D,
        item_loader=TokensLoader(block_size=BLOCK_ROWS * D),
        num_workers=workers,
        mode="overwrite",
    )
    os.sync()
    index = json.loads((folder / "litdata" / "index.json").read_text())
    assert sum(chunk["dim"] for chunk in index["chunks"]) == rows * D, "litdata lost rows"
    assert torch.int16.itemsize * D == ROW_BYTES
    return {}


class _LitdataBlock:
    """One block of rows as litdata's workers make it."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __call__(self, bounds: tuple[int, int]) -> Iterator[Any]:
        import torch

        yield _read(self.source, *bounds).view(torch.int16).reshape(-1)


def ray_data(folder: Path) -> Mapping[str, Any]:
    """Ray Data: read blocks, random_shuffle all rows, write them; all cores. Starting Ray does not count."""
    import numpy as np
    import ray

    rows, source, out = _num_rows(folder), str(folder / "embed"), folder / "ray"
    out.mkdir()
    ray.init(num_cpus=len(os.sched_getaffinity(0)), log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def load(batch: dict[str, Any]) -> dict[str, Any]:
        import torch

        start = int(batch["id"][0]) * BLOCK_ROWS
        return {"row": _read(source, start, min(start + BLOCK_ROWS, rows)).view(torch.int16).numpy()}

    def write(batch: dict[str, Any]) -> dict[str, Any]:
        path = out / f"{os.getpid()}-{time.monotonic_ns()}.npy"
        np.save(path, batch["row"])
        return {"count": np.array([len(batch["row"])])}

    begun, used = time.perf_counter(), _cpu()
    blocks = ray.data.range(-(-rows // BLOCK_ROWS)).map_batches(load, batch_size=1)
    written = blocks.random_shuffle(seed=0).map_batches(write, batch_size=BLOCK_ROWS)
    counts = sum(int(row["count"]) for row in written.take_all())
    os.sync()
    assert counts == rows, f"Ray Data wrote {counts} of {rows} rows"
    return {"seconds": time.perf_counter() - begun, "cpu": _cpu() - used}


def copies(folder: Path) -> Mapping[str, Any]:
    """`cp` of the shards, and of the copy."""
    for a, b in (("embed", "copy"), ("copy", "copy2")):
        subprocess.run(["cp", "-r", str(folder / a), str(folder / b)], check=True)
        for path in (folder / b).rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
    return {}


def _num_rows(folder: Path) -> int:
    return int(json.loads((folder / "embed" / "MANIFEST.json").read_text())["rows"])


def _read(source: str, start: int, stop: int) -> Any:
    import torch

    from plmsae_cli.store.activations import ActivationShards
    from plmsae_cli.store.fs import Store

    rows_RD = torch.empty(stop - start, D, dtype=torch.bfloat16)
    ActivationShards(Store(), source).read_into(start, rows_RD)
    return rows_RD


CONTENDERS: Mapping[str, Callable[..., Mapping[str, Any]]] = {
    "plmsae": ours,
    "cp": copies,
    "litdata.optimize": litdata,
    "ray.data random_shuffle": ray_data,
}
LEFT = ("shuffle", "optimize", "copy", "copy2", "litdata", "ray")


def measure(folder: Path, who: str, *arguments: Any) -> dict[str, Any] | None:
    """Run one contender in a process of its own: wall seconds, CPU seconds with children, its own figures."""
    _cool(folder)
    command = [sys.executable, "-m", "benchmarks.data", "one", str(folder), who, *map(str, arguments)]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    for name in LEFT:
        shutil.rmtree(folder / name, ignore_errors=True)
    if "ModuleNotFoundError" in done.stderr:
        print(f"{who}: not installed ({done.stderr.splitlines()[-1]})", file=sys.stderr)
        return None
    if done.returncode:
        raise SystemExit(f"{who} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _cool(folder: Path) -> None:
    """Put the rows out of the page cache (of a disk; /dev/shm has nothing else)."""
    for path in (folder / "embed").glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def certain(folder: Path, who: str, *arguments: Any) -> dict[str, Any]:
    """The same of a contender that is always there."""
    found = measure(folder, who, *arguments)
    assert found is not None
    return found


def one(folder: Path, who: str, arguments: list[str]) -> None:
    """In the contender's process."""
    import numpy  # noqa: F401
    import torch  # noqa: F401, imports are not what is measured

    import plmsae_cli.executors.worker  # noqa: F401

    begun, before = time.perf_counter(), _cpu()
    figures = CONTENDERS[who](folder, *(int(a) for a in arguments))
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "cpu": _cpu() - before, **figures}))


def _cpu() -> float:
    """Seconds that this process used, and all that it started, alive (Ray's workers) or not."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    total = sum(u.ru_utime + u.ru_stime for u in used)
    parents, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended
            continue
        parents[path.parent.name] = fields[1]
        ticks[path.parent.name] = sum(int(field) for field in fields[11:15])
    for name in ticks:
        above = parents[name]
        while above in parents and above != str(os.getpid()):
            above = parents[above]
        total += ticks[name] / os.sysconf("SC_CLK_TCK") if above == str(os.getpid()) else 0.0
    return total


@contextmanager
def rows_in(parent: Path, gigabytes: float) -> Iterator[Path]:
    """A folder with an embedding of that size, gone afterwards."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        make(Path(name), gigabytes)
        os.sync()
        yield Path(name)


def shuffle(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rate beside cp and the peers, time per GB by size, peak memory against the budget."""
    from benchmarks.record import busy

    memory, beside = _bytes(options.memory), busy()
    kind = "peers-" if options.peers else ""
    if Path(options.folder).is_relative_to("/dev/shm"):
        kind += "memory-"
    if options.workers > 1:
        kind += f"{options.workers}-workers-"
    for size in options.gigabytes:
        with rows_in(Path(options.folder), size) as folder:
            contenders: dict[str, list[Any]] = {"cp": [], "plmsae": [memory, options.workers]}
            if options.peers:
                contenders |= {"litdata.optimize": [options.workers], "ray.data random_shuffle": []}
            found = in_turns(folder, contenders, options.turns)
        for who, figures in found.items():
            label = "limit cp, twice" if who == "cp" else who
            note = f"{size:g} GB of rows, d {D}" + (f", tasks of {options.memory}" if who == "plmsae" else "")
            note += (
                f", {options.workers} workers" if options.workers > 1 and who in ("plmsae", "litdata.optimize") else ""
            )
            if options.turns > 1:
                slow, fast = (size * 1e3 / figures[end] for end in ("slowest", "fastest"))
                note += f"; median of {options.turns} turns, {slow:,.0f} to {fast:,.0f}"
            note += f"; {beside}" if beside else ""
            name = f"data/shuffle-optimize-{kind}{size:g}GB"
            yield _line(name, label, size * 1e3 / figures["seconds"], "MB/s", note)
        if options.peers:  # CPU, which other work on the machine does not take away
            for who, figures in found.items():
                name, label = f"data/shuffle-optimize-{kind}cpu-{size:g}GB", "limit cp, twice" if who == "cp" else who
                note = f"CPU seconds a GB, all processes; {beside}".rstrip("; ")
                yield _line(name, label, figures["cpu"] / size, "s", note)
            continue
        yield _line(
            f"data/shuffle-optimize-{kind}time-per-GB",
            f"plmsae {size:g} GB",
            found["plmsae"]["seconds"] / size,
            "s",
            "",
        )
        peak = found["plmsae"]["peak"] / 1e6
        yield _line(f"data/shuffle-optimize-{kind}peak-{size:g}GB", "plmsae", peak, "MB", f"tasks of {options.memory}")
        yield _line(f"data/shuffle-optimize-{kind}peak-{size:g}GB", "limit budget", memory / 1e6, "MB", "")


def in_turns(folder: Path, contenders: Mapping[str, list[Any]], turns: int) -> dict[str, dict[str, Any]]:
    """Name -> the turn of median time, with the `fastest` and `slowest` beside it; those that are not installed are left out."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, arguments in contenders.items():
            if (figures := measure(folder, name, *arguments)) is not None:
                runs[name].append(figures)
    found = {}
    for name, figures_of in runs.items():
        if figures_of:
            ordered = sorted(figures_of, key=lambda figures: float(figures["seconds"]))
            ends = {"fastest": ordered[0]["seconds"], "slowest": ordered[-1]["seconds"]}
            found[name] = {**ordered[(len(ordered) - 1) // 2], **ends}
    return found


def in_memory(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """CPU a GB, with everything in /dev/shm."""
    from benchmarks.record import busy

    beside = busy()
    for size in options.gigabytes:
        with rows_in(Path("/dev/shm"), size) as folder:
            found = in_turns(folder, {"cp": [], "plmsae": [_bytes(options.memory)]}, options.turns)
        assert len(found) == 2
        for name, figures in found.items():
            label = "limit cp, twice" if name == "cp" else name
            note = f"{size:g} GB in /dev/shm; the median turn of {options.turns}; {beside}".rstrip("; ")
            yield _line("data/shuffle-optimize-core", label, size / figures["cpu"], "GB/s a core", note)


def passes(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What each further pass costs."""
    memory = _bytes(options.memory)
    for size in options.gigabytes:
        with rows_in(Path(options.folder), size) as folder:
            for middle in (0, 1, 2):
                figures = certain(folder, "plmsae", memory, 1, middle)
                note = f"{size:g} GB of rows, tasks of {options.memory}"
                name = f"plmsae {figures['passes']} passes"
                yield _line("data/shuffle-optimize-passes", name, size * 1e3 / figures["seconds"], "MB/s", note)


def _line(name: str, who: str, value: float, unit: str, note: str) -> dict[str, Any]:
    return {"name": name, "who": who, "value": float(f"{value:.4g}"), "unit": unit, "note": note}


def _bytes(text: str) -> int:
    from pydantic import ByteSize, TypeAdapter

    return int(TypeAdapter(ByteSize).validate_python(text))


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        one(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    works = {
        "shuffle": (shuffle, [1.0, 4.0, 8.0], "4GB"),
        "memory": (in_memory, [2.0], "1GB"),
        "passes": (passes, [1.0], "400MB"),
    }
    for name, (work, sizes, memory) in works.items():
        verb = verbs.add_parser(name, help=work.__doc__)
        verb.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure")
        verb.add_argument("--gigabytes", type=float, nargs="+", default=sizes)
        verb.add_argument("--memory", default=memory, help="of a task")
        verb.add_argument("--peers", action="store_true")
        verb.add_argument("--turns", type=int, default=1, help="of all sides, one after the other; the median counts")
        verb.add_argument("--workers", type=int, default=1, help="of ours and of litdata; Ray takes all cores")
        verb.add_argument("--record", action="store_true", help="add the figures to results.jsonl")
    options = parser.parse_args()
    from benchmarks.record import HERE, add, cpu, stamp

    common = stamp(f"data-{options.verb}", cpu(1), " ".join(["python -m benchmarks.data", *sys.argv[1:]]))
    for line in works[options.verb][0](options):
        print(f"{line['name']:36} {line['who']:26} {line['value']:10.4g} {line['unit']}", flush=True)
        if options.record:
            add(HERE / "results.jsonl", [{**line, **common, "note": line["note"]}])


if __name__ == "__main__":
    main()
