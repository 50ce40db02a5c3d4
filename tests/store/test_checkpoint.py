"""Checkpoints: written by any number of ranks, read by any, never lost to a kill, a flipped bit named."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.config.errors import UserError
from plmsae_cli.store import checkpoint as checkpoints
from plmsae_cli.store.checkpoint import COMMIT, Checkpoint, load_newest, save


def state(step: int, rows: int = 7) -> Checkpoint:
    """Tensors of every kind that training has, which differ from step to step."""
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "model.w_ND": torch.randn(rows, 3, generator=generator),
        "model.w_bf16": torch.randn(rows, 2, 2, generator=generator).bfloat16(),
        "adam.step": torch.tensor(float(step)),
        "dead_N": torch.randint(0, 1 << 40, (rows,), generator=generator),
        "one_row": torch.full((1, 4), float(step)),
        "flags_N": torch.rand(rows, generator=generator) < 0.5,
    }
    return Checkpoint(step, tensors, {"tokens": 128 * step, "world": 2})


def save_by(world: int, folder: Path, checkpoint: Checkpoint, keep: int = 2) -> None:
    """Every rank a thread, with a real barrier between them."""
    barrier = threading.Barrier(world)
    errors: list[BaseException] = []

    def rank(number: int) -> None:
        try:
            save(folder, checkpoint, keep, number, world, lambda: barrier.wait(240) and None)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def same(found: Checkpoint | None, expected: Checkpoint) -> bool:
    assert found is not None
    assert (found.step, dict(found.state)) == (expected.step, dict(expected.state))
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert found.tensors[name].shape == tensor.shape
        assert torch.equal(found.tensors[name], tensor), name
    return True


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_what_any_number_of_ranks_wrote_reads_whole(tmp_path: Path, world: int) -> None:
    save_by(world, tmp_path, state(10))
    assert same(load_newest(tmp_path), state(10))
    step = tmp_path / "step-00000010"
    assert {p.name for p in step.glob("*.safetensors")} == {f"rank-{r}.safetensors" for r in range(world)}
    # The ranks share the work: no file holds all rows unless it is alone.
    sizes = [p.stat().st_size for p in step.glob("*.safetensors")]
    assert max(sizes) < 1200 if world > 1 else True


@settings(deadline=None, max_examples=15)
@given(rows=st.integers(1, 12), world=st.integers(1, 4))
def test_fewer_rows_than_ranks_are_no_matter(tmp_path_factory: pytest.TempPathFactory, rows: int, world: int) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_by(world, folder, state(1, rows))
    assert same(load_newest(folder), state(1, rows))


def test_nothing_there_is_nothing_to_continue(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "absent") is None
    # A save that was killed before its commit is no checkpoint.
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000005" / "rank-0.safetensors").write_bytes(b"half")
    assert load_newest(tmp_path) is None


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


@pytest.mark.parametrize("keep", [2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (5, 10, 15, 20, 1000):
        save(tmp_path, state(step), keep)
    kept = [5, 10, 15, 20, 1000][-keep:]
    assert steps_in(tmp_path) == [f"step-{step:08d}" for step in kept]
    assert same(load_newest(tmp_path), state(1000))


class Killed(BaseException):
    """The process ends here."""


def kill_at(point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(here: str, **where: object) -> None:
        if here == point:
            raise Killed

    monkeypatch.setattr(checkpoints, "fault", fault)


@pytest.mark.parametrize(("point", "newest"), [
    ("checkpoint.before-commit", 10),  # the new one is not there yet
    ("checkpoint.before-rotation", 15),
    ("checkpoint.in-rotation", 15),  # the oldest lost its commit, not its files
])  # fmt: skip
def test_a_kill_loses_nothing_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, newest: int
) -> None:
    for step in (5, 10):
        save(tmp_path, state(step), 2)
    kill_at(point, monkeypatch)
    with pytest.raises(Killed):
        save(tmp_path, state(15), 2)
    monkeypatch.undo()
    assert same(load_newest(tmp_path), state(newest))
    # The run continues: the next saves sweep up what the killed one left.
    for step in range(newest + 5, 25, 5):
        save(tmp_path, state(step), 2)
    assert steps_in(tmp_path) == ["step-00000015", "step-00000020"]
    assert same(load_newest(tmp_path), state(20))


def test_a_kill_while_an_old_one_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (5, 10):
        save(tmp_path, state(step), 2)

    def half(folder: Path, **_: Any) -> None:
        next(folder.glob("*.safetensors")).unlink()
        raise Killed

    monkeypatch.setattr(checkpoints.shutil, "rmtree", half)
    with pytest.raises(Killed):
        save(tmp_path, state(15), 2)
    monkeypatch.undo()
    assert same(load_newest(tmp_path), state(15))
    save(tmp_path, state(20), 2)
    assert steps_in(tmp_path) == ["step-00000015", "step-00000020"]


def test_a_step_saved_again_after_a_kill_replaces_the_torn_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, state(5), 2)
    kill_at("checkpoint.before-commit", monkeypatch)
    with pytest.raises(Killed):
        save(tmp_path, Checkpoint(10, state(99).tensors, {}), 2)
    monkeypatch.undo()
    save_by(2, tmp_path, state(10))  # and by another number of ranks
    assert same(load_newest(tmp_path), state(10))


def flip(path: Path, at: int, to: bytes | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + 1] = bytes([data[at] ^ 1]) if to is None else to
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("harm", [lambda path: flip(path, -1), truncate, empty, zeros, Path.unlink])
@pytest.mark.parametrize("name", ["rank-0.safetensors", "rank-1.safetensors", COMMIT])
def test_a_damaged_one_is_passed_over_and_named(tmp_path: Path, name: str, harm: Callable[[Path], None]) -> None:
    save_by(2, tmp_path, state(5))
    save_by(2, tmp_path, state(10))
    harm(tmp_path / "step-00000010" / name)
    said: list[str] = []
    assert same(load_newest(tmp_path, said.append), state(5))
    if (tmp_path / "step-00000010" / COMMIT).exists():
        assert len(said) == 1
        assert "step-00000010 is damaged" in said[0]


def test_no_digit_of_the_commit_can_change_unseen(tmp_path: Path) -> None:
    """Another step or another range would be a wrong training that looks right."""
    save_by(2, tmp_path, state(5))
    save_by(2, tmp_path, state(10))
    path = tmp_path / "step-00000010" / COMMIT
    text = path.read_text()
    for at in [i for i, letter in enumerate(text) if letter.isdigit()][:: max(1, len(text) // 80)]:
        other = "1" if text[at] != "1" else "2"
        path.write_text(text[:at] + other + text[at + 1 :])
        assert same(load_newest(tmp_path, lambda said: None), state(5))
    path.write_text(text)
    assert same(load_newest(tmp_path), state(10))


def test_all_damaged_is_one_error_that_names_each(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, state(step), 2)
        flip(tmp_path / f"step-{step:08d}" / "rank-0.safetensors", -1)
    with pytest.raises(UserError) as caught:
        load_newest(tmp_path, lambda said: None)
    assert "step-00000005" in caught.value.message
    assert "step-00000010" in caught.value.message
    assert "--restart" in str(caught.value.hint)


def test_every_rank_waits_for_the_commit(tmp_path: Path) -> None:
    """When `save` returns on any rank the checkpoint is there: a rank that went on could be killed before it was."""
    barriers: list[bool] = []
    commit = tmp_path / "step-00000001" / COMMIT
    # Rank 1 first, to its first barrier and beyond; rank 0 commits between the two.
    save(tmp_path, state(1), 2, 1, 2, lambda: barriers.append(commit.exists()))
    save(tmp_path, state(1), 2, 0, 2, lambda: barriers.append(commit.exists()))
    assert barriers == [False, False, False, True]
    assert json.loads(commit.read_text())["commit"]["world"] == 2
    assert same(load_newest(tmp_path), state(1))


def test_a_checkpoint_that_cannot_be_removed_yet_goes_with_the_next_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS, while somebody on this machine reads a file of it."""
    for step in (1, 2):
        save(tmp_path, state(step), 2)
    real = os.rmdir

    def held(path: str, **how: Any) -> None:
        if str(path).endswith("step-00000001"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", path)
        real(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", held)
        save(tmp_path, state(3), 2)
    assert (tmp_path / "step-00000001").exists()
    assert same(load_newest(tmp_path), state(3))
    save(tmp_path, state(4), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_damaged_checkpoint_that_was_passed_over_takes_no_place_of_a_sound_one(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, state(step), 2)
    damaged = tmp_path / "step-00000020" / "rank-0.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert same(load_newest(tmp_path, lambda said: None), state(10))
    for step in (13, 16):  # stopped by hand, before step 20 comes round again
        save(tmp_path, state(step), 2)
    said: list[str] = []
    assert same(load_newest(tmp_path, said.append), state(16))
    assert said == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000013", "step-00000016"]
