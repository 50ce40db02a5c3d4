"""The queue without experiments: order, locks, files that come and go."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from plmsae_cli.config.errors import UserError
from plmsae_cli.executors.locks import Locked
from plmsae_cli.executors.queue import Entry, find, locked, run_queue, smoke_folder
from plmsae_cli.runtime.stop import STOP


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_files_as_given_and_folders_by_name_each_once(tmp_path: Path) -> None:
    touch(tmp_path, "b.yaml", "a.yml", "C.YAML", "10.yaml", "9.yaml", ".hidden.yaml", "notes.txt", "examples/z.yaml")
    found = find([tmp_path / "b.yaml", tmp_path, tmp_path / "examples"])
    assert [p.name for p in found] == ["b.yaml", "10.yaml", "9.yaml", "C.YAML", "a.yml", "z.yaml"]
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        find([tmp_path / "nowhere.yaml"])


def test_files_that_come_while_it_runs_are_appended_and_a_folder_that_goes_is_no_accident(tmp_path: Path) -> None:
    touch(tmp_path, "q/b.yaml", "q/c.yaml")
    order = []

    def run_one(entry: Entry) -> None:
        order.append(entry.path.name)
        entry.state = "done"
        if entry.path.name == "b.yaml":
            touch(tmp_path, "q/a.yaml")
        if entry.path.name == "c.yaml":
            (tmp_path / "q").rename(tmp_path / "gone")

    entries = run_queue([tmp_path / "q"], run_one)
    assert order == ["b.yaml", "c.yaml", "a.yaml"]
    assert [entry.state for entry in entries] == ["done"] * 3


def test_one_that_is_edited_while_it_runs_or_after_has_another_turn(tmp_path: Path) -> None:
    touch(tmp_path, "a.yaml", "b.yaml", "c.yaml")
    ran: list[str] = []

    def run_one(entry: Entry) -> None:
        ran.append(entry.path.stem)
        entry.state = "done"
        edited = {("a",): "a.yaml", ("a", "b"): "c.yaml", ("a", "b", "c"): "b.yaml"}.get(tuple(ran))
        if edited is not None:
            os.utime(tmp_path / edited, ns=(len(ran), len(ran)))

    run_queue([tmp_path], run_one)
    assert ran == ["a", "b", "c", "a", "b"], "a was edited while it ran, b after, c while it waited"


def test_after_an_interruption_the_rest_stays_pending(tmp_path: Path) -> None:
    touch(tmp_path, "a.yaml", "b.yaml", "c.yaml")

    def run_one(entry: Entry) -> None:
        entry.state = "interrupted" if entry.path.name == "b.yaml" else "done"

    assert [e.state for e in run_queue([tmp_path], run_one)] == ["done", "interrupted", "pending"]


def test_one_queue_a_folder_and_the_lock_names_its_holder(tmp_path: Path) -> None:
    with locked(tmp_path):
        card = json.loads((tmp_path / ".queue.json").read_text())
        assert card["pid"] == os.getpid()
        with pytest.raises(Locked, match=f"pid {os.getpid()} on .* since 20"), locked(tmp_path):
            pass
        assert (tmp_path / ".queue.json").exists()
    assert not (tmp_path / ".queue.json").exists()


def test_the_card_of_a_queue_that_died_locks_nobody_out(tmp_path: Path) -> None:
    (tmp_path / ".queue.json").write_text('{"pid": 1, "host": "elsewhere", "started": 0}')
    with locked(tmp_path):
        assert json.loads((tmp_path / ".queue.json").read_text())["pid"] == os.getpid()


def test_a_smoke_run_has_an_empty_folder_to_itself(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "bugfix"
    touch(root, "old/status.json")
    touch(tmp_path, "runs/mine/status.json")
    with smoke_folder(root):
        assert not root.exists()
        touch(root, "new/status.json")
        with pytest.raises(Locked, match="another --bugfix"), smoke_folder(root):
            pass
        assert (root / "new" / "status.json").exists()
    assert (tmp_path / "runs" / "mine" / "status.json").exists()


def test_a_watching_queue_takes_what_comes_and_what_was_mended_until_it_is_asked_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plmsae_cli.executors.queue.WATCH_EVERY_S", 0.01)
    ran: list[str] = []
    waits: list[int] = []

    def run_one(entry: Entry) -> None:
        ran.append(entry.path.read_text())
        entry.state = "failed" if ran[-1] == "bad" else "done"

    def act() -> None:
        """What happens while the queue waits: a file comes, it is mended, Ctrl-C."""
        waits.append(len(ran))
        if len(waits) == 1:
            (tmp_path / "a.yaml").write_text("bad")
        elif len(waits) == 2:
            (tmp_path / "a.yaml").write_text("good")
            os.utime(tmp_path / "a.yaml", ns=(1, 1))
        else:
            STOP.request()

    entries = run_queue([tmp_path], run_one, watch=act)
    assert (ran, waits) == (["bad", "good"], [0, 1, 2])
    assert [entry.state for entry in entries] == ["failed", "done"]
    with pytest.raises(UserError, match="none was named"):
        find([tmp_path / "a.yaml"], watch=True)


def test_what_is_tried_again_keeps_its_place(tmp_path: Path) -> None:
    touch(tmp_path, "a.yaml", "b.yaml")
    order: list[str] = []

    def run_one(entry: Entry) -> None:
        order.append(entry.path.stem)
        entry.state = "failed" if order in (["a"], ["a", "a"]) else "done"

    assert [e.state for e in run_queue([tmp_path], run_one, again=lambda entry: len(order) < 3)] == ["done", "done"]
    assert order == ["a", "a", "a", "b"]
