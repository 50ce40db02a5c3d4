"""The small files of a run's folder, whoever else writes there."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.runtime.run_folder import files_named, read_json, write_json


def test_machines_whose_processes_have_one_number_do_not_meet_in_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "gang.json", os.replace

    def another_machine_first(*arguments: Any) -> None:
        monkeypatch.setattr(os, "replace", real)
        write_json(path, {"from": "another"})
        real(*arguments)

    monkeypatch.setattr(os, "replace", another_machine_first)
    write_json(path, {"from": "here"})
    assert read_json(path) == {"from": "here"}
    assert list(tmp_path.iterdir()) == [path]


def test_folders_that_vanish_while_files_are_looked_for_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").touch()
    real = os.scandir

    def vanished(path: str) -> Any:
        if str(path).endswith("/a"):
            raise FileNotFoundError(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", vanished)
    assert files_named(tmp_path, "status.json") == [tmp_path / "b" / "status.json"]


def test_a_file_that_another_machine_replaces_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS has it: the file that was opened is gone on the server."""
    path, real = tmp_path / "gang-status.json", Path.read_text
    write_json(path, {"done": 1})
    stale = iter([True, True, False])

    def read(self: Path, **how: Any) -> str:
        if next(stale):
            raise OSError(errno.ESTALE, "Stale file handle", str(self))
        return real(self, **how)

    monkeypatch.setattr(Path, "read_text", read)
    assert read_json(path) == {"done": 1}
    stale = itertools.repeat(True)
    with pytest.raises(OSError, match="Stale"):
        read_json(path)
