"""metrics.jsonl is cut back and stays JSON; W&B may fail in any way without anybody losing anything."""

from __future__ import annotations

import json
import math
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.runtime.metrics import MetricsFile, WandbSink, open_sinks


def strict(path: Path) -> list[dict[str, Any]]:
    """The file's lines, each whole and valid: NaN and Infinity are errors."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{path} holds {token}")

    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def write(path: Path, *steps: int, after: int = 0) -> None:
    file = MetricsFile(path, after)
    for step in steps:
        file.add({"step": step, "loss": 1.0 / step})
    file.close()


# The file


def test_lines_are_there_at_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in (1, 2, 3):
        file.add({"step": step, "loss": 0.5, "valid": {"random": {"loss": 0.25}}})
        assert [line["step"] for line in strict(path)] == list(range(1, step + 1)), "a killed run keeps what it wrote"
    file.close()
    assert strict(path)[0] == {"step": 1, "loss": 0.5, "valid": {"random": {"loss": 0.25}}}


def test_a_run_that_was_deleted_or_moved_is_not_written_on(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.add({"step": 1, "loss": 0.5})
    path.parent.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"metrics\.jsonl is gone: its run was deleted or moved"):
        file.add({"step": 2, "loss": 0.5})
    assert not path.parent.exists()
    assert len(strict(tmp_path / "elsewhere" / "metrics.jsonl")) == 1


def test_a_resumed_run_is_cut_back_to_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, 3, 4, 4, 5, 6)
    write(path, 5, 6, 7, after=4)
    assert [line["step"] for line in strict(path)] == [1, 2, 3, 4, 4, 5, 6, 7]
    write(path, after=2)
    assert [line["step"] for line in strict(path)] == [1, 2]
    write(path, 1, after=0)
    assert [line["step"] for line in strict(path)] == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 0.', "{", '{"step": 3, "loss": 0.33\u00e9'])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    with path.open("a", encoding="utf-8") as file:
        file.write(torn)
    write(path, 3, 4, after=5)
    assert strict(path) == [{"step": s, "loss": 1.0 / s} for s in (1, 2, 3, 4)]


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_at_any_depth(tmp_path: Path, odd: float) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.add({"step": 1, "loss": odd, "lr": 0.5, "valid": {"random": {"loss": odd, "residues": 3}}})
    file.close()
    assert strict(path) == [{"step": 1, "loss": None, "lr": 0.5, "valid": {"random": {"loss": None, "residues": 3}}}]


# Weights & Biases


class FakeRun:
    """A run that remembers, and fails where it is told to."""

    def __init__(self, wandb: FakeWandb, arguments: dict[str, Any]) -> None:
        self.wandb, self.arguments = wandb, arguments
        self.lines: list[tuple[int, dict[str, Any]]] = []
        self.dir = f"{arguments['dir']}/wandb/offline-run-1/files"
        self.settings = types.SimpleNamespace(_offline=arguments["mode"] == "offline")
        self.finished = 0

    def log(self, line: dict[str, Any], step: int) -> None:
        self.wandb.fail("log")
        self.lines.append((step, line))

    def finish(self, exit_code: int | None = None) -> None:
        self.wandb.fail("finish")
        self.finished += 1


class FakeWandb(types.ModuleType):
    """As much of the module as is used."""

    def __init__(self, failing: str = "") -> None:
        super().__init__("wandb")
        self.failing = failing
        self.runs: list[FakeRun] = []

    def fail(self, place: str) -> None:
        if place == self.failing:
            raise ConnectionError(f"no network in {place}")

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **arguments: Any) -> FakeRun:
        self.fail("init")
        active = [run for run in self.runs if not run.finished]
        if active and arguments["settings"].get("reinit") != "create_new":
            return active[-1]  # as the real one does
        self.runs.append(FakeRun(self, arguments))
        return self.runs[-1]


def experiment(mode: str = "offline", **wandb: Any) -> Experiment:
    body = {"name": "test", "embed": {"fasta": "a.fasta", "layers": [1]}, "wandb": {"mode": mode, **wandb}}
    return Experiment.model_validate(body)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeWandb:
    module = FakeWandb(getattr(request, "param", ""))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def run_through(sinks: list[Any], steps: int = 3) -> None:
    for step in range(1, steps + 1):
        for sink in sinks:
            sink.add({"step": step, "loss": 0.5 * step, "valid": {"random": {"loss": 2.0}}})
    for sink in sinks:
        sink.close()


def test_switched_off_nothing_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise, and be told
    run_through(open_sinks(experiment("off"), tmp_path, 0, True))
    assert capsys.readouterr().err == ""
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_ranks_write_nothing(tmp_path: Path, fake: FakeWandb) -> None:
    run_through(open_sinks(experiment(), tmp_path, 0, False))
    assert list(tmp_path.iterdir()) == []
    assert fake.runs == []


def test_lines_are_mirrored_flat(tmp_path: Path, fake: FakeWandb, capsys: pytest.CaptureFixture[str]) -> None:
    run_through(open_sinks(experiment(project="p", entity="e", group="g"), tmp_path, 0, True))
    (run,) = fake.runs
    assert run.lines[1] == (2, {"step": 2, "loss": 1.0, "valid/random/loss": 2.0})
    assert [step for step, _ in run.lines] == [line["step"] for line in strict(tmp_path / "metrics.jsonl")]
    assert run.finished == 1
    given = run.arguments
    assert (given["project"], given["entity"], given["group"], given["name"]) == ("p", "e", "g", "test")
    assert (given["mode"], given["dir"]) == ("offline", str(tmp_path))
    assert given["config"] == experiment(project="p", entity="e", group="g").dump()
    assert f"wandb sync {tmp_path}/wandb/offline-run-1" in capsys.readouterr().err


def test_runs_side_by_side_stay_apart(tmp_path: Path, fake: FakeWandb) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    sinks = [WandbSink(experiment(), tmp_path / name) for name in ("a", "b")]
    for step, sink in enumerate(sinks, 1):
        sink.add({"step": step, "loss": 0.5})
    for sink in sinks:
        sink.close()
    assert [[step for step, _ in run.lines] for run in fake.runs] == [[1], [2]]
    assert [run.finished for run in fake.runs] == [1, 1]


def test_online_needs_no_hint(tmp_path: Path, fake: FakeWandb, capsys: pytest.CaptureFixture[str]) -> None:
    run_through(open_sinks(experiment("online"), tmp_path, 0, True))
    assert fake.runs[0].finished == 1
    assert capsys.readouterr().err == ""


def test_a_resumed_run_is_the_same_run(tmp_path: Path, fake: FakeWandb) -> None:
    for start in (0, 2):
        run_through(open_sinks(experiment(), tmp_path, start, True))
    first, second = (run.arguments for run in fake.runs)
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    (tmp_path / "other").mkdir()
    WandbSink(experiment(), tmp_path / "other")
    assert fake.runs[2].arguments["id"] != first["id"]


def test_a_run_that_was_killed_as_it_got_its_name_gets_a_whole_one(
    tmp_path: Path, fake: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, text: str, **_: Any) -> int:
        path.write_bytes(b"")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            WandbSink(experiment(), tmp_path)
    WandbSink(experiment(), tmp_path)
    assert len(fake.runs[0].arguments["id"]) == 12


@pytest.mark.parametrize("fake", ["init", "log", "finish"], indirect=True)
def test_its_failures_are_told_once_and_cost_nothing(
    tmp_path: Path, fake: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    run_through(open_sinks(experiment(), tmp_path, 0, True), steps=5)
    said = capsys.readouterr().err
    assert said.count("W&B stopped") == 1
    assert f"no network in {fake.failing}" in said
    assert [line["step"] for line in strict(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_without_the_package_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run_through(open_sinks(experiment(), tmp_path, 0, True))
    assert capsys.readouterr().err.count("W&B stopped") == 1
    assert len(strict(tmp_path / "metrics.jsonl")) == 3


def test_the_real_package_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The calls above are those of the installed version, its files are on disk, and no secret is among them."""
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    secrets = {"AWS_SECRET_ACCESS_KEY": "planted-aws-secret", "HF_TOKEN": "planted-hf-token"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    sinks = open_sinks(experiment(), tmp_path, 0, True)
    settings = sinks[1]._run.settings  # type: ignore[attr-defined]
    assert 0 < getattr(settings, "finish_timeout", 60) <= 60, "a dead network must not hold a finished run"
    run_through(sinks)
    said = capsys.readouterr().err
    assert "W&B stopped" not in said
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert f"wandb sync {folder}" in said
    (log,) = folder.glob("*.wandb")
    until = time.monotonic() + 240
    while b"valid/random/loss" not in log.read_bytes() and time.monotonic() < until:
        time.sleep(0.05)  # `finish` may return a moment before the service of W&B has written its last lines
    assert b"valid/random/loss" in log.read_bytes()
    assert folder.name.endswith((tmp_path / "wandb-id").read_text())
    for path in tmp_path.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            assert not any(value.encode() in content for value in secrets.values()), path
