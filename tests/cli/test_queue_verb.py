"""`plmsae run` on folders: all files are checked first, one failure does not stop the next, nothing runs twice."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.cli import run as run_verb
from plmsae_cli.config import faults
from plmsae_cli.store.records import StoreError

Plmsae = Callable[..., Any]
Write = Callable[..., Path]


@pytest.fixture
def write(write: Write) -> Write:
    """Experiments without eval: only the order of things matters here."""
    return partial(write, evaluation="")


@pytest.fixture(autouse=True)
def _fresh_counts() -> None:
    faults._passes.clear()


def states(outcome: Any) -> dict[str, str]:
    return {Path(e["path"]).name: e["state"] for e in json.loads(outcome.out)["queue"]}


def test_two_of_four_invalid_shows_every_problem_and_runs_nothing(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        write(f"queue/{name}.yaml")
    (tmp_path / "queue" / "b.yaml").write_text("train: {sae: {k: 0}, tokns: 5}\n")
    (tmp_path / "queue" / "d.yaml").write_text("embed: [\n")
    refused = plmsae("run", tmp_path / "queue")
    assert refused.code == 2
    for said in ("b.yaml:1:18: train.sae.k", "train.tokns: unknown key", "did you mean train.tokens?", "d.yaml:"):
        assert said in refused.err
    assert "nothing was run" in refused.err
    assert "(4 experiments checked)" in refused.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["queue"]
    assert sorted(p.name for p in (tmp_path / "queue").iterdir()) == [f"{n}.yaml" for n in "abcd"]


def test_one_that_fails_does_not_stop_the_next_and_the_second_start_does_what_is_left(
    plmsae: Plmsae, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        write(f"queue/{name}.yaml")
    write("queue/examples/z.yaml")
    monkeypatch.setenv("PLMSAE_FAULT", "raise:train.train.begin:2")
    first = plmsae("run", tmp_path / "queue", "--json")
    assert first.code == 3
    assert states(first) == {"a.yaml": "done", "b.yaml": "failed", "c.yaml": "done"}
    assert "InjectedFault" in first.err
    status = json.loads((tmp_path / "runs" / "b" / "status.json").read_text())
    assert (status["state"], status["stage"], status["error"]) == (
        "failed",
        "train",
        "injected fault at train.train.begin",
    )

    monkeypatch.delenv("PLMSAE_FAULT")
    second = plmsae("run", tmp_path / "queue")
    assert second.code == 0
    table = [line.split() for line in second.out[second.out.index("experiment ") :].splitlines()]
    assert table[0] == ["experiment", "state", "time", "see"]
    assert [row[:2] for row in table[1:]] == [["a.yaml", "skipped"], ["b.yaml", "done"], ["c.yaml", "skipped"]]
    assert all(Path(row[3]).is_file() for row in table[1:])
    status = json.loads((tmp_path / "runs" / "b" / "status.json").read_text())
    assert (status["state"], status["stage"], status["error"]) == ("done", None, None)
    assert not (tmp_path / "runs" / "z").exists()
    assert sorted(p.name for p in (tmp_path / "queue").iterdir() if p.suffix == ".json") == []


def test_an_experiment_whose_inputs_are_missing_fails_before_its_first_stage(
    plmsae: Plmsae, write: Write, tmp_path: Path
) -> None:
    """What each file lacks is said for all of them before the first begins."""
    write("queue/a.yaml", fasta=tmp_path / "nowhere.fasta")
    write("queue/b.yaml")
    write("queue/c.yaml", weights=tmp_path / "no-weights")
    write("queue/d.yaml", root=tmp_path / "queue" / "b.yaml", data=tmp_path / "own", more="limits: {bytes: 1}\n")
    ended = plmsae("run", tmp_path / "queue", "--json")
    assert ended.code == 3
    assert states(ended) == {"a.yaml": "failed", "b.yaml": "done", "c.yaml": "failed", "d.yaml": "failed"}
    ahead = ended.err[: ended.err.index("== ")]
    assert "3 of 4 experiments could not start now" in ahead
    for said in ("a.yaml: ", "nowhere.fasta", "c.yaml: ", "no-weights", f"d.yaml: root: {tmp_path}/queue/b.yaml is not a folder",
                 "d.yaml: ", "limits.bytes is 1"):  # fmt: skip
        assert said in ahead
    assert ahead.count("a.yaml: ") == 1
    assert not (tmp_path / "runs" / "a").exists()


def test_a_search_without_optuna_is_told_ahead_and_spoils_no_other_experiment(
    plmsae: Plmsae, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plmsae_cli.stages.sweep.find_spec", lambda name: None)
    search = "sweep: {optuna: {trials: 2, space: {train.sae.k: [2, 4]}}}\n"
    write("queue/a.yaml", more=search, evaluation="")
    write("queue/b.yaml", evaluation="")
    ended = plmsae("run", tmp_path / "queue", "--json")
    assert states(ended) == {"a.yaml": "failed", "b.yaml": "done"}
    assert "a.yaml: sweep.optuna needs the package optuna" in ended.err[: ended.err.index("== ")]


def test_files_dropped_in_while_it_runs_are_picked_up(
    plmsae: Plmsae, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("queue/b.yaml")
    real = run_verb.preflight

    def drop(experiment: Any, stages: Any, fetch: bool, yes: bool) -> Any:
        if not (tmp_path / "queue" / "a.yaml").exists():
            write("queue/a.yaml", tokens=640)
            (tmp_path / "queue" / "c.yaml").write_text("train: {sea: {}}\n")
        return real(experiment, stages, fetch, yes)

    monkeypatch.setattr(run_verb, "preflight", drop)
    ended = plmsae("run", tmp_path / "queue", "--json")
    assert states(ended) == {"b.yaml": "done", "a.yaml": "done", "c.yaml": "failed"}
    assert ended.code == 3
    assert "did you mean train.sae?" in ended.err


def test_of_a_pending_file_counts_what_it_says_when_its_turn_comes(
    plmsae: Plmsae, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was edited runs as it is now, one that was taken away does not run, one spoilt is an error of its own."""
    for name in ("a", "b", "c", "d", "f"):
        write(f"queue/{name}.yaml", tokens=640)
    queue, real = tmp_path / "queue", run_verb.preflight

    def meddle(experiment: Any, stages: Any, fetch: bool, yes: bool) -> Any:
        if experiment.name == "a":
            write("queue/b.yaml", tokens=1280)
            (queue / "c.yaml").unlink()
            (queue / "d.yaml").write_text("train: {sea: {}}\n")
            write("queue/e.yaml", tokens=640, more="name: f\n")
        return real(experiment, stages, fetch, yes)

    monkeypatch.setattr(run_verb, "preflight", meddle)
    ended = plmsae("run", queue)
    table = [line.split(maxsplit=3) for line in ended.out[ended.out.index("experiment ") :].splitlines()[1:]]
    assert [row[:2] for row in table] == [
        ["a.yaml", "done"],
        ["b.yaml", "done"],
        ["c.yaml", "skipped"],
        ["d.yaml", "failed"],
        ["f.yaml", "done"],
        ["e.yaml", "failed"],
    ]
    assert table[2][3] == "its file was taken away"
    assert "did you mean train.sae?" in ended.err
    assert "share the run folder" in ended.err
    assert json.loads((tmp_path / "runs" / "b" / "identity.json").read_text())["train"]["tokens"] == 1280
    assert ended.code == 3


def test_what_was_edited_while_it_ran_does_what_was_added_and_is_refused_where_results_would_differ(
    plmsae: Plmsae, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("queue/a.yaml", tokens=640, evaluation="")
    real, turns = run_verb.preflight, list[str]()

    def edit(experiment: Any, stages: Any, fetch: bool, yes: bool) -> Any:
        turns.append(experiment.name)
        if len(turns) == 1:
            write("queue/a.yaml", tokens=640, evaluation="", more="wandb: {group: later}\n")
        elif len(turns) == 2:
            write("queue/a.yaml", tokens=1280, evaluation="")
        return real(experiment, stages, fetch, yes)

    monkeypatch.setattr(run_verb, "preflight", edit)
    ended = plmsae("run", tmp_path / "queue", "--restart")
    assert ended.code == 3
    assert [line.split()[1] for line in ended.out.splitlines() if line.startswith("a.yaml")] == [
        "done",
        "skipped",
        "failed",
    ]
    assert "holds a run that differs in:\n  train.tokens: 640 -> 1280" in ended.err
    assert not list((tmp_path / "runs").glob("a.archived*")), "what this queue has done is not begun anew"


def test_one_name_given_twice_in_passing_spoils_no_other_file(
    plmsae: Plmsae, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("queue/a.yaml", tokens=640)
    real = run_verb.preflight

    def drop(experiment: Any, stages: Any, fetch: bool, yes: bool) -> Any:
        if experiment.name == "a":
            write("queue/b.yaml", tokens=640, more="name: a\n")
            write("queue/c.yaml", tokens=640)
        return real(experiment, stages, fetch, yes)

    monkeypatch.setattr(run_verb, "preflight", drop)
    ended = plmsae("run", tmp_path / "queue", "--json")
    assert states(ended) == {"a.yaml": "done", "b.yaml": "failed", "c.yaml": "done"}


def test_what_is_tried_again_goes_on_from_its_checkpoint_with_restart_too(
    plmsae: Plmsae, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("queue/a.yaml", tokens=640)
    assert plmsae("run", path).code == 0
    monkeypatch.setattr("plmsae_cli.executors.trouble.BACKOFF_S", (0.0,))
    monkeypatch.setattr("plmsae_cli.executors.trouble.passing", lambda error: True)
    monkeypatch.setenv("PLMSAE_FAULT", "raise:train.train.begin:1")
    assert plmsae("run", path, "--restart").code == 0
    assert len(list((tmp_path / "runs").glob("a.archived-*"))) == 1


def test_two_files_of_one_name_are_reported_before_anything_runs(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    write("queue/a.yaml")
    write("queue/b.yaml", more="name: a\n")
    refused = plmsae("run", tmp_path / "queue")
    assert refused.code == 2
    assert "a.yaml" in refused.err
    assert "b.yaml" in refused.err
    assert f"share the run folder {tmp_path / 'runs' / 'a'}" in refused.err
    assert not (tmp_path / "runs").exists()


def test_a_wish_to_stop_leaves_the_rest_pending(
    plmsae: Plmsae, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wish comes when the first has nothing left to do: it is done, and no other one is begun."""
    from plmsae_cli.runtime.stop import STOP

    for name in ("a", "b"):
        write(f"queue/{name}.yaml")
    real = run_verb.outcome

    def stop(run: Path) -> dict[str, Any]:
        STOP.request()
        return real(run)

    monkeypatch.setattr(run_verb, "outcome", stop)
    ended = plmsae("run", tmp_path / "queue", "--json")
    assert ended.code == 75
    assert states(ended) == {"a.yaml": "done", "b.yaml": "pending"}
    assert not (tmp_path / "runs" / "b").exists()


def test_the_same_file_named_twice_runs_once(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    path = write("queue/a.yaml")
    body = json.loads(plmsae("run", path, tmp_path / "queue", "--dry-run", "--json").out)
    assert len(body["experiments"]) == 1


def test_an_empty_folder_and_a_missing_one_are_wrong_usage(plmsae: Plmsae, tmp_path: Path) -> None:
    for target, said in ((tmp_path, "no experiments in"), (tmp_path / "nowhere", "does not exist")):
        refused = plmsae("run", target)
        assert refused.code == 2
        assert said in refused.err


def test_an_overloaded_server_is_asked_again(
    plmsae: Plmsae, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("queue/a.yaml")
    real, left = run_verb.preflight, [0, 1]
    monkeypatch.setattr("plmsae_cli.executors.trouble.BACKOFF_S", (0.0, 0.0))

    def overloaded(*arguments: Any, **options: Any) -> Any:
        if left:
            left.pop()
            raise StoreError("cannot list s3://b: the server is overloaded (SlowDown)", "start again later: ...")
        return real(*arguments, **options)

    monkeypatch.setattr(run_verb, "preflight", overloaded)
    ended = plmsae("run", tmp_path / "queue", "--json")
    assert (ended.code, states(ended)) == (0, {"a.yaml": "done"})
    assert "trying again in 0 s (2 of 2)" in ended.err


def test_a_watching_queue_waits_takes_what_is_dropped_in_and_ends_at_ctrl_c(
    plmsae: Plmsae, start: Callable[..., Any], write: Write, tmp_path: Path
) -> None:
    (tmp_path / "queue").mkdir()
    process = start("run", tmp_path / "queue", "--watch", "--no-progress")
    process.until(lambda: "waiting for YAMLs" in process.log)
    write("queue/a.yaml")
    process.until(lambda: process.log.count("waiting for YAMLs") == 2)
    process.popen.send_signal(signal.SIGINT)
    assert process.wait() == 0, process.log
    assert process.log.splitlines()[-1].split()[:2] == ["a.yaml", "done"]
    assert "one was named" in plmsae("run", tmp_path / "queue" / "a.yaml", "--watch").err


@pytest.mark.parametrize("option", ["--token", "--wandb_token=hf_secret", "--yaml_path"])
def test_options_of_the_former_launcher_are_answered(plmsae: Plmsae, option: str) -> None:
    refused = plmsae("run", "experiments", option, "hf_secret")
    assert refused.code == 2
    assert f"there is no option {option.partition('=')[0]}\nhint: " in refused.err
    assert "hf_secret" not in refused.err
    script = Path(run_verb.__file__).parents[2] / "run_experiments.sh"
    ended = subprocess.run([str(script), option, "hf_secret"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "hint: " in ended.stderr
    assert "hf_secret" not in ended.stderr
