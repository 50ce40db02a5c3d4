"""Shuffle and optimize beyond two passes: the same bytes for any memory, and nothing lost wherever it is cut short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.faults import InjectedFault
from plmsae_cli.executors.worker import LocalContext, run_task
from plmsae_cli.runtime.task import Task
from plmsae_cli.stages import optimize, shuffle
from plmsae_cli.stages.common import finish_task
from plmsae_cli.store import passes as planner
from plmsae_cli.store.activations import Statistics
from plmsae_cli.store.blocks import Blocks
from plmsae_cli.store.buckets import bytes_of
from plmsae_cli.store.fs import Store, StoreError, join
from plmsae_cli.store.lineage import Ref
from plmsae_cli.store.manifest import done_tasks, read_manifest, verify, write_manifest
from plmsae_cli.store.passes import Passes, bucket_rows, chunks_per_task, divide, held_rows
from plmsae_cli.store.permutation import Permutation
from plmsae_cli.store.quantise import CALIBRATION, Quantiser
from plmsae_cli.store.rowsum import hexed, row_sum
from plmsae_cli.store.tensorfile import write_tensors

SEED = 5
LOCAL = Store()
EXPERIMENT = Experiment.model_validate({"embed": {"fasta": "x", "layers": [0]}, "shuffle": {"seed": SEED}})


def embedded(folder: Path | str, rows_RD: torch.Tensor, cuts: Sequence[int] = (), store: Store = LOCAL) -> str:
    """Rows as a finished embedding, in shards that begin at the cuts."""
    root = f"{folder}/embed"
    bounds = [0, *cuts, len(rows_RD)]
    files = []
    for i in range(len(bounds) - 1):
        part = rows_RD[bounds[i] : bounds[i + 1]].contiguous()
        record = write_tensors(
            store, join(root, f"shard-{i:05d}.safetensors"), {"acts": part}, {"row_offset": str(bounds[i])}
        )
        files.append({"name": Path(record.name).name, "size": record.size, "xxh3": record.xxh3})
    d = rows_RD.shape[1]
    if rows_RD.dtype == torch.int8:
        d -= 2
        Quantiser(torch.zeros(d), torch.ones(d)).write(store, join(root, CALIBRATION))
    record = Statistics(d).write(store, join(root, "stats.safetensors"))
    files.append({"name": "stats.safetensors", "size": record.size, "xxh3": record.xxh3})
    total = hexed(row_sum(bytes_of(rows_RD)))
    names = {"num_layers": 1, "weights": {}, "fasta": {}, "heldout_rows": 0, "counts": {}, "layer": 0}
    dtype = str(rows_RD.dtype).removeprefix("torch.")
    body = {"format": "f", "stage": "embed", "key": "k", "config": {}, "inputs": {}, "created": 0.0, "files": files}
    write_manifest(store, root, {**body, **names, "rows": len(rows_RD), "d": d, "dtype": dtype, "row_sum": total})
    return root


class Line:
    """One embedding through shuffle and optimize, task by task."""

    def __init__(
        self,
        folder: Path | str,
        source: str,
        width: int,
        passes: Passes,
        memory: int,
        experiment: Experiment = EXPERIMENT,
    ) -> None:
        self.passes, self.source, self.memory, self.width = passes, source, memory, width
        self.shuffled, self.blocks = f"{folder}/shuffle", f"{folder}/optimize"
        self.context = LocalContext(experiment, lambda *_, **__: None)
        self.store = self.context.store

    def shuffle_tasks(self) -> list[Task]:
        levels = shuffle.level_tasks(self.passes, self.shuffled, self.source, SEED, self.memory)
        needed = shuffle._not_superseded(self.store, self.shuffled, levels)
        names = ("rows", "map_rows", "fan", "middle")
        shape = {k: getattr(self.passes, k) for k in names} | {"bucket_rows": self.passes.first_bucket_rows}
        facts = {"d": self.width, "layer": 0, "source": self.source, **shape}
        finish = finish_task("shuffle", [Ref("shuffle", "s", self.shuffled)], needed, facts)
        done = done_tasks(self.store, self.shuffled)
        return [task for task in [*needed, finish] if task.id not in done or task.id == "finish"]

    def shuffle(self) -> None:
        for task in self.shuffle_tasks():
            run_task(task, self.context)

    def optimize(self, chunk_rows: int, chunks_per_task: int = 1) -> None:
        tasks = optimize.reduce_tasks(
            self.blocks, self.shuffled, self.passes.rows, chunk_rows, chunks_per_task, self.memory
        )
        common = {"source": self.shuffled, "chunk_rows": chunk_rows, "rows": self.passes.rows}
        facts = {"layer": 0, "d": self.width, "width": self.width, "activations": self.source, **common}
        for task in [*tasks, finish_task("optimize", [Ref("optimize", "o", self.blocks)], tasks, facts)]:
            run_task(task, self.context)

    def in_order(self) -> torch.Tensor:
        """The dataset's rows as the bijection says they were before."""
        blocks = Blocks(self.store, self.blocks)
        placed = blocks.read(0, blocks.num_rows)
        return placed[
            torch.from_numpy(Permutation(self.passes.rows, SEED, domain="shuffle")(np.arange(self.passes.rows)))
        ]


def rows_of(count: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of random bits: no two alike, NaN patterns among them."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (count, width * dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and np.array_equal(bytes_of(a.contiguous()), bytes_of(b.contiguous()))


def content(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.bin"))}


def test_three_and_four_passes_give_the_bytes_of_two(tmp_path: Path) -> None:
    rows = rows_of(1500, 3, torch.bfloat16)
    source = embedded(tmp_path, rows, cuts=[400, 400, 1100])
    made = []
    for middle, fan in ((0, 0), (1, 4), (2, 3)):
        passes = Passes(1500, 100, fan, middle, 1024)
        line = Line(tmp_path / str(middle), source, 3, passes, 6000)
        line.shuffle()
        last = passes.levels()[-1]
        names = {path.stem for path in Path(line.shuffled).glob("*.safetensors")}
        assert names == {last.name(part, group) for part in range(last.slices) for group in range(last.groups)}
        line.optimize(256, 2)
        assert same(line.in_order(), rows)
        made.append(content(line.blocks))
    assert made[0] == made[1] == made[2]


def test_three_passes_on_s3_give_the_bytes_of_two_on_a_disk(s3: Any, tmp_path: Path) -> None:
    rows = rows_of(700, 5, torch.int8)
    local = Line(tmp_path, embedded(tmp_path, rows), 5, Passes(700, 700, 0, 0, 1024), 100_000)
    experiment = EXPERIMENT.model_copy(update={"storage": s3.storage()})
    source = embedded(s3.url("data"), rows, [300], s3.store())
    remote = Line(s3.url("data"), source, 5, Passes(700, 150, 3, 1, 1024), 3000, experiment)
    for line in (local, remote):
        line.shuffle()
        line.optimize(200)
    assert same(remote.in_order(), rows)
    for i in range(4):
        name = f"chunk-0-{i}.bin"
        assert s3.store().read(f"{remote.blocks}/{name}") == (Path(local.blocks) / name).read_bytes()
    left = s3.store().list(remote.shuffled)
    assert any(name.startswith("merge1-") for name in left)
    assert not any(name.startswith("map-") for name in left)


def test_tiny_budgets_bring_middle_passes_by_themselves() -> None:
    counts = [divide(100_000, 64, memory, False).count for memory in (10_000_000, 100_000, 30_000, 9_000)]
    assert counts == sorted(counts)
    assert counts[0] == 2 < counts[-1]


@settings(max_examples=25, deadline=None)
@example(count=1021, width=5, dtype=torch.bfloat16, memory=10**9, task_bytes=2_000, chunk_rows=7)
@example(count=0, width=5, dtype=torch.bfloat16, memory=10**9, task_bytes=2_000, chunk_rows=7)
@given(
    count=st.sampled_from([0, 1, 2, 3, 63, 64, 65, 127, 541, 1021]),
    width=st.integers(3, 19),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.int8]),
    memory=st.one_of(st.integers(2_000, 100_000), st.just(10**9)),
    task_bytes=st.sampled_from([2_000, 5_000, planner.LOCAL_TASK]),
    chunk_rows=st.integers(7, 300),
)
def test_every_row_once_for_any_count_width_type_and_budget(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    width: int,
    dtype: torch.dtype,
    memory: int,
    task_bytes: int,
    chunk_rows: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    rows = rows_of(count, width, dtype, seed=count)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(planner, "LOCAL_TASK", task_bytes)
        passes = divide(count, width * dtype.itemsize, memory, remote=False)
        per_task = chunks_per_task(count, width * dtype.itemsize, chunk_rows, memory, remote=False)
    line = Line(folder, embedded(folder, rows, cuts=[count // 3]), width, passes, memory)
    line.shuffle()
    line.optimize(chunk_rows, per_task)
    assert same(line.in_order(), rows)
    manifest = read_manifest(Store(), line.blocks)
    assert manifest is not None
    assert manifest["row_sum"] == hexed(row_sum(bytes_of(rows)))


def divided(rows: int, row_bytes: int) -> Passes:
    """As data of some gigabytes are: in tasks far below what the memory holds."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(planner, "LOCAL_TASK", rows * row_bytes // 6)
        return divide(rows, row_bytes, 10**9, remote=False)


@pytest.mark.parametrize(
    "passes", [Passes(600, 100, 3, 1, 1024), divided(600, 8)], ids=["with a middle pass", "small data, divided"]
)
def test_killed_after_any_task_and_continued(tmp_path: Path, passes: Passes) -> None:
    rows = rows_of(600, 2, torch.float32)
    source = embedded(tmp_path, rows)
    whole = Line(tmp_path / "whole", source, 2, passes, 4000)
    whole.shuffle()
    num_tasks = len(Line(tmp_path / "count", source, 2, passes, 4000).shuffle_tasks())
    for stop in range(1, num_tasks):
        line = Line(tmp_path / f"cut-{stop}", source, 2, passes, 4000)
        for task in line.shuffle_tasks()[:stop]:
            run_task(task, line.context)
        line.shuffle()
        ours, theirs = (sorted(Path(f).glob("*.safetensors")) for f in (line.shuffled, whole.shuffled))
        assert [p.name for p in ours] == [p.name for p in theirs]
        assert [p.read_bytes() for p in ours] == [p.read_bytes() for p in theirs]
        # Freed a second time, as after a kill between the files and their records: nothing to do and no error.
        for level in shuffle.level_tasks(passes, line.shuffled, source, SEED, 4000)[1:]:
            run_task(replace(level[-1]), line.context)


COMMITS = [
    "store.write.before-rename", "store.write.after-rename", "shuffle.map-00003.begin", "shuffle.map-00003.written",
    "shuffle.finish.begin", "shuffle.manifest", "optimize.reduce-00002.begin", "optimize.reduce-00002.written",
    "optimize.manifest",
]  # fmt: skip


@pytest.mark.parametrize("point", COMMITS)
def test_small_data_in_many_tasks_stopped_at_a_commit_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """The bytes are those of one task that does all; nothing that was stopped half-way stands."""
    rows = rows_of(600, 2, torch.float32)
    source = embedded(tmp_path, rows)
    whole = Line(tmp_path / "whole", source, 2, Passes(600, 600, 0, 0, 1024), 10**9)
    line = Line(tmp_path / "divided", source, 2, divided(600, 8), 10**9)
    whole.shuffle()
    whole.optimize(64, 10)
    monkeypatch.setenv("PLMSAE_FAULT", f"raise:{point}:{3 if point.startswith('store') else 1}")

    def both() -> None:
        line.shuffle()
        line.optimize(64, 2)

    with pytest.raises(InjectedFault):
        both()
    monkeypatch.delenv("PLMSAE_FAULT")
    both()
    assert len(list(Path(line.shuffled).glob("map-*"))) == 6
    assert content(line.blocks) == content(whole.blocks)
    assert verify(Store(), line.blocks) == verify(Store(), line.shuffled) == []
    assert not list(Path(line.blocks).parent.rglob("*.tmp"))


def test_a_bit_that_flips_between_two_stages_is_noticed_and_the_file_named(tmp_path: Path) -> None:
    rows = rows_of(300, 4, torch.float32)
    source = embedded(tmp_path, rows, cuts=[150])
    passes = divide(300, 16, 4_000, False)
    _flip(Path(source) / "shard-00001.safetensors")
    with pytest.raises(StoreError, match=r"shard-00001\.safetensors: content differs") as caught:
        Line(tmp_path / "a", source, 4, passes, 4_000).shuffle()
    assert "plmsae verify" in str(caught.value.hint)

    _flip(Path(source) / "shard-00001.safetensors")  # back again
    line = Line(tmp_path / "b", source, 4, passes, 4_000)
    line.shuffle()
    _flip(Path(line.shuffled) / "map-00002.safetensors")
    with pytest.raises(StoreError, match=r"map-00002\.safetensors: content differs"):
        line.optimize(100)
    assert read_manifest(Store(), line.blocks) is None


def test_what_the_dataset_takes_along_is_what_was_recorded(tmp_path: Path) -> None:
    rows = rows_of(300, 4, torch.float32)
    line = Line(tmp_path, embedded(tmp_path, rows), 4, divide(300, 16, 4_000, False), 4_000)
    line.shuffle()
    statistics = Path(line.source) / "stats.safetensors"
    whole = statistics.read_bytes()
    _flip(statistics)
    with pytest.raises(StoreError, match=r"embed/stats\.safetensors is damaged: its xxh3 is \w+") as flipped:
        line.optimize(100)
    assert not (Path(line.blocks) / statistics.name).exists()
    statistics.write_bytes(whole[:-7])
    with pytest.raises(StoreError, match=r"embed/stats\.safetensors is cut short") as cut:
        line.optimize(100)
    statistics.unlink()
    with pytest.raises(StoreError, match=r"cannot read \S+embed/stats\.safetensors") as absent:
        line.optimize(100)
    assert all("plmsae verify" in str(caught.value.hint) for caught in (flipped, cut, absent))
    statistics.write_bytes(whole)
    line.optimize(100)
    assert (Path(line.blocks) / statistics.name).read_bytes() == whole


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(data)


Damage = Callable[[Path, Path], None]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda one, _: one.write_bytes(one.read_bytes()[:-7]), r"map-00000\.safetensors"),
        (lambda one, _: one.write_bytes(bytes(len(one.read_bytes()))), r"map-00000\.safetensors"),
        (lambda one, _: one.unlink(), r"map-00000\.safetensors"),
        (lambda one, two: two.write_bytes(one.read_bytes()), "of the places 0 to"),
    ],
    ids=["truncated", "zeros", "missing", "one in the place of another"],
)
def test_damaged_map_files_are_named_by_the_reader(tmp_path: Path, damage: Damage, words: str) -> None:
    rows = rows_of(300, 4, torch.float32)
    line = Line(tmp_path, embedded(tmp_path, rows), 4, divide(300, 16, 4_000, False), 4_000)
    line.shuffle()
    damage(*(Path(line.shuffled) / f"map-{i:05d}.safetensors" for i in range(2)))
    with pytest.raises(StoreError, match=words) as caught:
        line.optimize(100)
    assert caught.value.hint is None or "verify" in caught.value.hint or "delete" in caught.value.hint


@pytest.mark.slow
def test_a_task_stays_within_its_memory(tmp_path: Path) -> None:
    """Peak of the process that does it, beyond what it holds before the first row: the budget less its reserve, and 10 %."""
    rows = rows_of(400_000, 640, torch.bfloat16)
    source = embedded(tmp_path, rows, cuts=[200_000])
    memory = 1_200_000_000
    passes = divide(len(rows), 1280, memory // 4, False)
    assert held_rows(memory // 4, 1280) * 1280 < memory // 4
    assert bucket_rows(len(rows)) == 1024
    del rows
    line = Line(tmp_path, source, 640, passes, memory // 4)
    line.shuffle()
    line.optimize(65_536)
    for folder in (line.shuffled, line.blocks):
        manifest = read_manifest(Store(), folder)
        assert manifest is not None
        assert manifest["peak_memory"] < 700_000_000 + memory // 4
