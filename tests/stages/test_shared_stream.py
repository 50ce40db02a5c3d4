"""Many SAEs on one stream: each is, bit for bit, the run it would be alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from plmsae_cli.cli.options import Wishes
from plmsae_cli.cli.stage import plans_of, run_stage
from plmsae_cli.cli.status import show_status
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors import shared
from plmsae_cli.executors.pipeline import Done
from plmsae_cli.executors.pool import Pool
from plmsae_cli.runtime.progress import PlainReporter
from plmsae_cli.runtime.saved import load_sae_with_facts
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted, Plan
from plmsae_cli.stages.sweep import trials
from plmsae_cli.store.blocks import Blocks
from plmsae_cli.store.checkpoint import load_newest
from plmsae_cli.training import loop
from plmsae_cli.training.sae_objective import SAEObjective

Build = Callable[..., Experiment]
Go = Callable[..., Done]

CLOCK = {"tokens_per_second", "loader_wait", "step_ms", "loader_share"}
DATA = ["embed", "shuffle", "optimize"]
SAES = [
    {},
    {"k": 6, "architecture": "batch_topk"},
    {"k": None, "architecture": "jumprelu", "target_l0": 8, "bandwidth": 0.5, "expansion": 3},
]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def science(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def state(run: Path) -> dict[str, torch.Tensor]:
    found = load_newest(run / "checkpoints")
    assert found is not None
    return dict(found.tensors)


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Weights, optimiser, figures and the export, bit for bit."""
    assert science(ours) == science(theirs)
    first, second = state(ours), state(theirs)
    assert first.keys() == second.keys()
    assert any(name.startswith("optimizer.") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, two = load_sae_with_facts(ours), load_sae_with_facts(theirs)
    assert one.facts == two.facts
    tensors = two.model.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in one.model.state_dict().items())
    assert (ours / "sae" / "sae.safetensors").read_bytes() == (theirs / "sae" / "sae.safetensors").read_bytes()


def alone(build: Build, go: Go, point: Mapping[str, Any], **changes: Any) -> Path:
    number = len(list(Path(build().root).glob("alone-*"))) if Path(build().root).exists() else 0
    return go(build(name=f"alone-{number}", **{**changes, **point}), [*DATA, "train"]).run.path


def test_a_list_of_saes_is_that_many_ordinary_runs_from_one_reading(
    build: Build, go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = build(**{"train.saes": SAES, "eval.fidelity.loss_recovered": False, "train.log_every": 3})
    go(experiment, DATA)
    reads: list[int] = []
    real = Blocks.read_into

    def counted(self: Blocks, row_start: int, out_RD: torch.Tensor) -> None:
        reads.append(len(out_RD))
        real(self, row_start, out_RD)

    monkeypatch.setattr(Blocks, "read_into", counted)
    run = go(experiment, ["sweep"]).run.path
    together = sum(reads)
    folders = [trial.run for trial in trials(experiment)]
    assert len(folders) == 3
    reads.clear()
    lone = [alone(build, go, t.values, **{"train.log_every": 3}) for t in trials(experiment)]
    # Reading ahead ends where its threads were when training ended: up to five batches of 128 rows more or less.
    assert together < sum(reads) / 3 + 6 * 128
    monkeypatch.undo()
    for ours, theirs in zip(folders, lone, strict=True):
        assert_same_run(ours, theirs)
        assert read(ours / "identity.json") == read(theirs / "identity.json")
        status = read(ours / "status.json")
        assert (status["state"], status["together"]) == ("done", 3)
        assert status["stage_seconds"]["train"] > 0
    # Eval, the table and the page know them as they know any trial.
    assert go(experiment).stages == {}
    body = read(run / "sweep.json")
    assert body["grid"] == {
        "train.sae.k": [4, 6, None],
        "train.sae.architecture": ["topk", "batch_topk", "jumprelu"],
        "train.sae.target_l0": [None, 8],
        "train.sae.bandwidth": [None, 0.5],
        "train.sae.expansion": [2, 3],
    }
    assert [row["state"] for row in body["trials"]] == ["done"] * 3
    assert all(row["metrics"]["fvu"] > 0 for row in body["trials"])
    assert (run / "report" / "index.html").exists()
    assert go(experiment).stages == {}
    capsys.readouterr()
    show_status(run, as_json=False)
    show_status(folders[1], as_json=False)
    told = capsys.readouterr().out
    assert "  trials: 3 done" in told
    assert "  trains with 2 other SAE(s) on one reading of the dataset" in told


def test_a_grid_over_optimizers_and_seeds_shares_within_an_epoch(build: Build, go: Go) -> None:
    grid = {"train.optimizer": ["muon", "signum"], "train.seed": [0, 5]}
    experiment = build(**{"sweep.grid": grid, "sweep.stream": "shared", "train.tokens": 640, "eval": None})
    go(experiment)
    found = trials(experiment)
    assert {read(trial.run / "status.json")["together"] for trial in found} == {4}
    for trial in found[1:3]:
        assert_same_run(trial.run, alone(build, go, trial.values, **{"train.tokens": 640}))


def test_seeds_that_order_epochs_differently_part(build: Build, go: Go) -> None:
    changes = {"train.tokens": 128 * 200, "train.log_every": 50, "train.checkpoint_every": 100, "eval": None}
    grid = {"train.seed": [0, 5], "train.sae.k": [2, 4]}
    experiment = build(**{"sweep.grid": grid, "sweep.stream": "shared", **changes})
    go(experiment, DATA)
    (plan,) = plans_of(experiment, ["sweep"])
    assert plan_of_one(experiment).figures["epochs"] > 1
    assert plan.figures["streams"] == 2
    assert "train.seed" in plan.figures["note"]
    found = trials(experiment)
    assert [set(task.folders) for task in plan.tasks] == [{str(t.run) for t in found[i : i + 2]} for i in (0, 2)]
    go(experiment, ["sweep"])
    assert read(found[3].run / "status.json")["together"] == 2
    assert_same_run(found[3].run, alone(build, go, found[3].values, **changes))


def plan_of_one(experiment: Experiment) -> Plan:
    return plans_of(trials(experiment)[0].experiment, ["train"])[0]


def test_a_shorter_one_ends_earlier_and_one_that_is_ahead_waits(
    build: Build, go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid: dict[str, list[Any]] = {"train.tokens": [1024, 2560], "train.sae.k": [2, 4]}
    experiment = build(**{"sweep.grid": grid, "sweep.stream": "shared", "eval": None})
    go(experiment, DATA)
    steps: list[int] = []
    real = SAEObjective.step

    def counted(self: SAEObjective, step: int) -> Mapping[str, torch.Tensor]:
        steps.append(step)
        return real(self, step)

    monkeypatch.setattr(SAEObjective, "step", counted)
    # Two of the four alone, stopped at step 12; then all: those wait there for the others.
    ahead = build(**{"sweep.grid": {**grid, "train.sae.k": [2]}, "sweep.stream": "shared", "eval": None})
    monkeypatch.setenv("PLMSAE_FAULT", "sigterm:train.step:step=11")
    STOP.install(quiet=True)
    with pytest.raises(Interrupted):
        go(ahead, ["sweep"])
    monkeypatch.delenv("PLMSAE_FAULT")
    STOP.asked = False
    states = [read(t.run / "status.json")["state"] for t in trials(ahead)]
    assert states == ["interrupted", "interrupted"]
    steps.clear()
    go(experiment, ["sweep"])
    assert sorted(steps) == sorted([*range(8), *range(20), *range(12, 20)])
    for trial in trials(experiment):
        assert_same_run(trial.run, alone(build, go, trial.values))


def test_one_that_diverges_leaves_and_the_others_go_on(build: Build, go: Go) -> None:
    experiment = build(**{"sweep.grid": {"train.lr": [1e-3, 1e38, 2e-3]}, "sweep.stream": "shared", "eval": None})
    reporter = Told()
    with pytest.raises(UserError, match="1 of 3 trials failed"):
        go(experiment, None, reporter)
    good, bad, other = trials(experiment)
    status = read(bad.run / "status.json")
    assert status["state"] == "failed"
    assert "the gradients of step" in status["error"]
    assert any("the other 2 go on" in line and bad.hash in line for line in reporter.lines)
    assert not (bad.run / "sae").exists()
    assert all(tensor.isfinite().all() for tensor in (load_newest(bad.run / "checkpoints") or NOTHING).tensors.values())
    last = science(bad.run)[-1]
    assert last["loss"] is None
    for trial in (good, other):
        assert read(trial.run / "status.json")["state"] == "done"
        assert_same_run(trial.run, alone(build, go, trial.values, eval=None))
    body = read(Path(experiment.root) / "run" / "sweep.json")
    assert [row["state"] for row in body["trials"]] == ["done", "failed", "done"]


class Told(PlainReporter):
    """Keeps what was said, and every figure of progress."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.figures: list[dict[str, Any]] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def update(self, done: float | None, total: float | None, **figures: Any) -> None:
        super().update(done, total, **figures)
        self.figures.append(figures)


NOTHING = loop.checkpoints.Checkpoint(0, {}, {})


def test_the_line_tells_of_all(build: Build, go: Go) -> None:
    experiment = build(**{"train.saes": [{"k": 2}, {"k": 8}], "eval": None})
    reporter = Told()
    go(experiment, None, reporter)
    two, eight = (science(trial.run)[-1] for trial in trials(experiment))
    shown = [f for f in reporter.figures if "SAEs" in f][-1]
    assert shown["SAEs"] == 2
    low, high = (float(word) for word in shown["fvu"].split(" to "))
    assert (low, high) == pytest.approx(sorted((two["fvu"], eight["fvu"])), rel=1e-3)
    assert shown["l0"] == "2 to 8"
    assert any(line.startswith("group 1/1: 2 SAE(s) on one stream: k=2 (") for line in reporter.lines)
    assert any(line.startswith("train 2 SAEs: ") and line.endswith(", 2 done") for line in reporter.lines)


@pytest.mark.slow
def test_two_ranks_train_what_each_alone_trains_on_two(build: Build, go: Go) -> None:
    """Also where one diverges: all ranks let it go at the same step."""
    changes = {"launch.ranks": 2, "eval": None, "train.tokens": 1280, "train.sae.architecture": "batch_topk"}
    experiment = build(**{"sweep.grid": {"train.lr": [1e38, 1e-3, 2e-3]}, "sweep.stream": "shared", **changes})
    reporter = Told()
    with pytest.raises(UserError, match="1 of 3 trials failed"):
        go(experiment, None, reporter)
    bad, *good = trials(experiment)
    assert "the gradients of step" in read(bad.run / "status.json")["error"]
    assert any(line.startswith(f"{bad.hash} failed: ") and "the other 2 go on" in line for line in reporter.lines)
    for trial in good:
        assert trial.experiment.launch.ranks == 2
        newest = load_newest(trial.run / "checkpoints")
        assert newest is not None
        assert newest.state["world"] == 2
    assert_same_run(good[0].run, alone(build, go, good[0].values, **changes))


def test_one_whose_checkpoints_are_all_damaged_leaves(build: Build, go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = build(**{"train.saes": [{"k": 2}, {"k": 4}], "eval": None})
    monkeypatch.setenv("PLMSAE_FAULT", "sigterm:train.step:step=10")
    STOP.install(quiet=True)
    with pytest.raises(Interrupted):
        go(experiment)
    monkeypatch.delenv("PLMSAE_FAULT")
    STOP.asked = False
    first, second = trials(experiment)
    for file in (first.run / "checkpoints").glob("*/rank-0.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="1 of 2 trials failed"):
        go(experiment)
    assert "no checkpoint of this run can be read" in read(first.run / "status.json")["error"]
    assert_same_run(second.run, alone(build, go, second.values, eval=None))


def test_groups_work_side_by_side_in_a_pool(build: Build, go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on several GPUs: tasks of one name in different folders, and each line says of which group it is."""
    grid = {"train.lr": [1e-3, 1e38], "train.sae.k": [2, 4]}
    experiment = build(**{"sweep.grid": grid, "sweep.stream": "shared", "eval": None, "train.log_every": 10})
    go(experiment, DATA)
    (plan,) = plans_of(experiment, ["sweep"])
    memory = plan.figures["group 1"]["memory_per_rank"]
    monkeypatch.setattr(shared, "device_memory", lambda launch: 2 * memory // 3)
    (plan,) = plans_of(experiment, ["sweep"])
    assert [len(task.folders) for task in plan.tasks] == [2, 2]
    reporter = Told()
    pool = Pool(experiment, slots=2, gpus=0)
    try:
        pool.run(plan.tasks, reporter.update)
    finally:
        pool.close()
    assert {figures["group"] for figures in reporter.figures if "group" in figures} == {"1 of 2", "2 of 2"}
    for trial in trials(experiment):
        good = trial.values["train.lr"] == 1e-3
        assert (trial.run / "parts" / "train.json").exists() == (trial.run / "sae" / "sae.json").exists() == good
        assert good or any(f"{trial.hash} failed: the gradients of step" in line for line in reporter.lines)


def test_what_the_data_are_made_of_may_be_swept_too(build: Build, go: Go) -> None:
    grid = {"shuffle.seed": [3, 4], "train.sae.k": [2, 4]}
    experiment = build(**{"sweep.grid": grid, "sweep.stream": "shared", "train.tokens": 640, "eval": None})
    go(experiment)
    found = trials(experiment)
    assert [read(trial.run / "status.json")["together"] for trial in found] == [2] * 4
    assert_same_run(found[3].run, alone(build, go, found[3].values, **{"train.tokens": 640, "eval": None}))


def test_train_is_the_verb_of_a_list_too(build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "many.yaml"
    path.write_text(json.dumps(build(**{"train.saes": [{"k": 2}, {"k": 4}]}).dump()))
    for verb in ("train", "sweep"):
        assert run_stage(verb, path, Wishes(dry_run=True, json=True)) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first == second
    (plan,) = first["plans"]
    assert len(plan["artifacts"]) == 2
    assert list(plan["figures"]["group 1"]["SAEs"]) == [
        trial.hash for trial in trials(build(**{"train.saes": [{"k": 2}, {"k": 4}]}))
    ]


def test_the_plan_shows_members_groups_place_and_memory(build: Build) -> None:
    experiment = build(**{"train.saes": [{"k": 2}, {"k": 4, "expansion": 4}], "eval": None})
    *_, plan = plans_of(experiment, experiment.stages())
    lone = [plans_of(trial.experiment, ["train"])[0].figures for trial in trials(experiment)]
    group = plan.figures["group 1"]
    assert (plan.figures["SAEs"], plan.figures["streams"], len(plan.tasks)) == (2, 1, 1)
    titles = {t.hash: f"{t.title}; {f['latents']} latents" for t, f in zip(trials(experiment), lone, strict=True)}
    assert group["SAEs"] == titles
    assert group["place"] == "this CPU, one process"
    assert group["tokens_read"] == 2560
    assert math.isclose(group["share_of_work"], 1.0)
    # Weights, gradients and moments of both; steps take turns.
    held = sum(f["memory_per_rank"] - f["memory_of_step"] for f in lone)
    assert group["memory_per_rank"] == held + max(f["memory_of_step"] for f in lone)
