"""What verify names, what clean lists, what freeing leaves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plmsae_cli.store import checkpoint as checkpoints
from plmsae_cli.store.checkpoint import Checkpoint
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.housekeeping import FREED, Leaving, damages, free, leavings, remove
from plmsae_cli.store.manifest import read_manifest, read_parts, write_manifest, write_part

KEY = "0123456789abcdef"
DAY = 86_400.0


def made(folder: Path, finished: bool = True) -> str:
    """An artifact of two tasks with a file each."""
    store, root = Store(), str(folder)
    files = []
    for i in range(2):
        record = store.write(join(root, f"shard-{i}.bin"), [bytes([i]) * 1000])
        write_part(store, root, f"task-{i}", [record], {})
        files.append({"name": f"shard-{i}.bin", "size": record.size, "xxh3": record.xxh3})
    store.write(join(root, "plan.json"), [b"{}"])
    if finished:
        body = {"format": "f", "stage": "embed", "key": KEY, "config": {}, "inputs": {}, "created": 1.0, "rows": 2}
        write_manifest(store, root, {**body, "files": files})
    return root


def aged(path: Path, seconds: float) -> None:
    status = path.stat()
    os.utime(path, (status.st_atime - seconds, status.st_mtime - seconds))


def found(root: Path, used: tuple[str, ...] = (), older: float = DAY, unused: bool = False) -> dict[str, str]:
    return {
        str(Path(one.path).relative_to(root)): one.why for one in leavings(root, set(used), older=older, unused=unused)
    }


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda f: (f / "shard-1.bin").write_bytes(b"\1" * 999 + b"\3"), "content differs"),
        (lambda f: (f / "shard-1.bin").write_bytes(b"\1" * 999), "size differs"),
        (lambda f: (f / "shard-1.bin").write_bytes(bytes(1000)), "content differs"),
        (lambda f: (f / "shard-1.bin").unlink(), "missing"),
        (lambda f: shutil.copy(f / "shard-0.bin", f / "shard-1.bin"), "content differs"),
    ],
    ids=["one bit", "truncated", "zeros", "missing", "swapped"],
)
@pytest.mark.parametrize("finished", [True, False])
def test_every_damage_is_named_with_its_task_and_following_the_remedy_redoes_that_task(
    tmp_path: Path, damage: Damage, problem: str, finished: bool
) -> None:
    folder = tmp_path / f"embed-{KEY}"
    root = made(folder, finished)
    assert damages(Store(), root) == []
    damage(folder)
    (one,) = damages(Store(), root)
    assert (one.path, one.task, one.folder) == (join(root, "shard-1.bin"), "task-1", root)
    assert problem in one.problem
    assert "task-1" in one.remedy
    assert f"{root}/MANIFEST.json" in one.remedy
    assert ("delete it" in one.remedy) == (one.problem != "missing")


def test_swapping_two_shards_of_a_size_damages_both(tmp_path: Path) -> None:
    root = made(tmp_path / f"embed-{KEY}")
    one, two = (Path(root) / f"shard-{i}.bin" for i in range(2))
    one.rename(tmp_path / "x")
    two.rename(one)
    (tmp_path / "x").rename(two)
    assert [d.path for d in damages(Store(), root)] == [str(one), str(two)]


def test_a_clean_root_has_nothing_to_clean(tmp_path: Path) -> None:
    made(tmp_path / "data" / f"embed-{KEY}")
    made(tmp_path / "data" / f"shuffle-{KEY}", finished=False)
    assert found(tmp_path, older=-DAY) == {}


def test_strays_temporaries_and_lost_attempts_are_listed_and_the_young_left_alone(tmp_path: Path) -> None:
    finished, begun = tmp_path / f"embed-{KEY}", tmp_path / f"shuffle-{KEY}"
    made(finished)
    made(begun, finished=False)
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead = f".map.{int(child.stdout)}-abcd.tmp"
    alive = f".map.{os.getpid()}-abcd.tmp"
    names = ["stray.bin", "heldout/stray.bin", dead, alive]
    for folder in (finished, begun):
        (folder / "heldout").mkdir()
        for name in names:
            (folder / name).write_bytes(b"xyz")
    assert found(tmp_path) == {}
    for folder in (finished, begun):
        for name in names:
            aged(folder / name, 2 * DAY)
    listed = found(tmp_path)
    assert set(listed) == {f"{folder.name}/{name}" for folder in (finished, begun) for name in names if name != alive}
    assert "lost" in listed[f"{begun.name}/stray.bin"]
    for one in list(leavings(tmp_path, set(), DAY, False)):
        remove(one)
    assert found(tmp_path) == {}
    assert damages(Store(), str(finished)) == damages(Store(), str(begun)) == []


def test_unused_data_go_as_a_whole_only_when_asked_and_never_what_a_run_uses(tmp_path: Path) -> None:
    root = made(tmp_path / f"embed-{KEY}")
    assert found(tmp_path, older=-DAY) == {}
    assert found(tmp_path, used=(Path(root).name,), older=-DAY, unused=True) == {}
    assert found(tmp_path, unused=True) == {}  # made today: a share of a machine without a run folder, say
    assert found(tmp_path, older=-DAY, unused=True) == {f"embed-{KEY}": "no run here uses it"}
    for one in list(leavings(tmp_path, set(), -DAY, unused=True)):
        remove(one)
    assert not Path(root).exists()


def test_deleting_takes_the_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = made(tmp_path / f"embed-{KEY}")
    deleted: list[str] = []
    delete = Store.delete

    def watch(store: Store, path: str) -> None:
        deleted.append(Path(path).name)
        delete(store, path)

    monkeypatch.setattr(Store, "delete", watch)
    remove(Leaving(root, 0, "", whole=True))
    assert deleted[0] == "MANIFEST.json"


def test_a_freed_artifact_leaves_a_record_and_nothing_else(tmp_path: Path) -> None:
    root = made(tmp_path / f"embed-{KEY}")
    assert free(Store(), root) == 2000
    assert read_manifest(Store(), root) is None
    assert read_parts(Store(), root) == {}
    assert sorted(Store().list(root)) == [FREED]
    assert found(tmp_path, older=-DAY, unused=True) == {}
    assert free(Store(), root) is None, "another process was first"
    # Cut short in the middle: what is left is listed.
    (Path(root) / "shard-1.bin").write_bytes(b"x")
    aged(Path(root) / "shard-1.bin", 60)
    assert found(tmp_path) == {f"embed-{KEY}/shard-1.bin": "its folder was freed"}


@pytest.mark.parametrize("other", ["writes", "removes"])
def test_what_another_process_does_in_a_folder_that_is_freed_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    root, real = Path(made(tmp_path / f"embed-{KEY}")), os.rmdir

    def meanwhile(folder: str) -> None:
        if other == "writes":
            (Path(folder) / "new").write_bytes(b"x")
        else:
            real(folder)
        real(folder)

    monkeypatch.setattr(os, "rmdir", meanwhile)
    assert free(Store(), str(root)) == 2000
    assert {FREED, *(["parts/new"] if other == "writes" else [])} <= set(Store().list(str(root)))


@pytest.mark.parametrize("at", ["read", "hash"])
def test_a_checkpoint_that_training_drops_while_it_is_verified_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    for step in (1, 2):
        checkpoint = Checkpoint(step, {"w": torch.ones(2)}, {})
        checkpoints.save(tmp_path / "checkpoints", checkpoint, keep=2)
    real = getattr(Store, at)

    def dropped(store: Store, path: str) -> Any:
        if "step-00000001" in path:
            shutil.rmtree(tmp_path / "checkpoints" / "step-00000001", ignore_errors=True)
        return real(store, path)

    monkeypatch.setattr(Store, at, dropped)
    assert damages(Store(), str(tmp_path)) == []


def test_an_artifact_that_is_made_again_after_it_was_freed_is_no_rest_of_it(tmp_path: Path) -> None:
    root = made(tmp_path / f"embed-{KEY}")
    free(Store(), root)
    aged(Path(root) / FREED, 2 * DAY)
    made(Path(root), finished=False)
    for path in (Path(root) / "shard-0.bin", Path(root) / "parts" / "task-0.json"):
        aged(path, 1.5 * DAY)
    assert found(tmp_path) == {}


def test_a_damaged_manifest_or_record_is_a_damage_like_others(tmp_path: Path) -> None:
    root = Path(made(tmp_path / f"embed-{KEY}"))
    for path in (root / "parts" / "task-0.json", root / "MANIFEST.json"):
        path.write_text("{")
        (one,) = damages(Store(), str(root))
        assert one.path == str(path)
        assert one.remedy.startswith("delete it, ")
        path.unlink()


def test_a_damaged_record_deletes_nothing(tmp_path: Path) -> None:
    root = Path(made(tmp_path / f"embed-{KEY}"))
    (root / "parts" / "task-0.json").write_text("{")
    (root / "stray").write_bytes(b"x")
    aged(root / "stray", 2 * DAY)
    assert found(tmp_path, unused=True) == {}
