"""The small files of a run's folder, whoever else writes there."""

from __future__ import annotations

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
