"""SLURM's executor on submitit's local jobs: the same bytes, a killed job told and mended, options that reach sbatch."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors import slurm as module
from plmsae_cli.executors.executor import load_extra, waves
from plmsae_cli.executors.local import LocalExecutor
from plmsae_cli.executors.pipeline import plan_stage
from plmsae_cli.executors.slurm import FarTask, SlurmExecutor
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted, TaskFailed
from plmsae_cli.store.fs import Store

submitit = pytest.importorskip("submitit")
Prepared = Callable[..., Experiment]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def local(experiment: Experiment) -> SlurmExecutor:
    return SlurmExecutor(experiment, cluster="local", poll_seconds=0.1)


def test_jobs_write_what_one_process_writes_and_a_second_start_fills_the_gaps(
    prepared: Prepared,
    run_stages: Callable[..., None],
    files: Callable[..., Any],
    reference: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experiment = prepared("slurm", executor="slurm")
    run_stages(experiment, LocalExecutor(experiment), ("embed",))
    executor = local(experiment)
    monkeypatch.setenv("PLMSAE_FAULT", "kill:shuffle.map-00001.begin")
    with pytest.raises(TaskFailed, match=r"map-00001: job \S+ was lost; the same command fills the gaps"):
        run_stages(experiment, executor, ("shuffle",))
    monkeypatch.delenv("PLMSAE_FAULT")
    left = {task.id for task in plan_stage("shuffle", experiment, Store()).tasks}
    assert left == {"map-00001", "finish"}
    run_stages(experiment, executor, ("shuffle",))
    run_stages(
        experiment, LocalExecutor(experiment), ("optimize",)
    )  # its tasks are no other kind, and each job is a process
    assert files(experiment) == reference


def test_a_task_that_fails_is_told_with_its_error(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = prepared("failing", executor="slurm")
    monkeypatch.setenv("PLMSAE_FAULT", "raise:embed.proteins.begin")
    with pytest.raises(TaskFailed, match=r"proteins: InjectedFault: injected fault at embed\.proteins\.begin"):
        local(experiment).run(plan_stage("embed", experiment, Store()), lambda *_, **__: None)


def test_a_wish_to_stop_takes_jobs_back(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = prepared("stopped", executor="slurm")
    STOP.asked = True
    with pytest.raises(Interrupted):
        local(experiment).run(plan_stage("embed", experiment, Store()), lambda *_, **__: None)


def test_a_job_that_is_put_back_begins_its_task_again() -> None:
    again = FarTask().checkpoint({"id": "x"}, {}, "/")
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert isinstance(again.function, FarTask)
    assert again.args == ({"id": "x"}, {}, "/")


def test_options_reach_the_jobs(prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What sbatch gets, from a stand-in that keeps the file it is given."""
    for name in ("srun", "sbatch"):
        script = tmp_path / name
        script.write_text(
            f'#!/bin/sh\nn=$(ls {tmp_path} | grep -c kept)\ncp "$1" {tmp_path}/kept-$n.sh\necho job 12$n\n'
        )
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    options = {"partition": "gpu", "account": "lab", "time": 30, "array": 3, "cpus": 3, "options": {"qos": "high"}}
    experiment = prepared("options", executor="slurm", slurm=options, gpus="auto")
    executor = SlurmExecutor(experiment)
    first, shards, _ = waves(plan_stage("embed", experiment, Store()).tasks)
    jobs = executor._submit(shards)
    assert [job.job_id for job in jobs] == [f"120_{i}" for i in range(len(shards))]
    assert list(jobs.values()) == shards
    text = (tmp_path / "kept-0.sh").read_text()
    for line in ("partition=gpu", "account=lab", "time=30", "cpus-per-task=3", "gpus-per-node=1", "qos=high"):
        assert f"#SBATCH --{line}\n" in text
    assert f"#SBATCH --array=0-{len(shards) - 1}%3\n" in text
    assert "#SBATCH --mem=3GB\n" in text
    assert "#SBATCH --requeue\n" in text or "#SBATCH --signal=USR2@" in text, "told of its end, so that it is put back"
    monkeypatch.setattr(module, "LARGEST_ARRAY", 2)
    assert len(executor._submit(shards)) == len(shards)
    assert len(list(tmp_path.glob("kept-*"))) == 1 + -(-len(shards) // 2)
    executor._submit(first)
    assert "--gpus-per-node=0\n" in sorted(tmp_path.glob("kept-*"))[-1].read_text(), "the table of proteins needs none"


@pytest.mark.parametrize("job", ["1", "2", "70000"])
def test_ranks_of_a_job_meet_at_a_port_that_no_connection_takes(monkeypatch: pytest.MonkeyPatch, job: str) -> None:
    """submitit draws it from the job's number, so that every rank draws the same, but from those of connections too."""
    values = {"JOB_ID": job, "NTASKS": "2", "GLOBALID": "0", "LOCALID": "0", "NODEID": "0", "NNODES": "1"}
    for name, value in {"SUBMITIT_EXECUTOR": "local", **{f"SUBMITIT_LOCAL_{n}": v for n, v in values.items()}}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # put back behind the test
        monkeypatch.delenv(name)
    found: list[int] = []
    monkeypatch.setattr(module, "far_rank", lambda *_: found.append(int(os.environ["MASTER_PORT"])))
    for _ in range(2):
        monkeypatch.delenv("MASTER_PORT", raising=False)
        module.FarRank()("run", "/", {})
    assert found[0] == found[1]
    assert 20_000 <= found[0] < 32_000
    monkeypatch.setenv("MASTER_PORT", "45678")
    module.FarRank()("run", "/", {})
    assert found[2] == 45_678, "whoever names one gets it"


def test_waves_respect_needs(prepared: Prepared) -> None:
    tasks = plan_stage("embed", prepared("waves"), Store()).tasks
    found = list(waves(tasks))
    assert [{task.id.partition("-")[0] for task in wave} for wave in found] == [{"proteins"}, {"shard"}, {"finish"}]
    assert sum(map(len, found)) == len(tasks)


def test_a_machine_that_cannot_submit(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"launch\.executor: slurm cannot submit from this machine") as error:
        SlurmExecutor(prepared("nowhere", executor="slurm"))
    assert "sbatch" in str(error.value.hint)


def test_an_absent_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as error:
        load_extra("no_such_package_here", "slurm")
    assert error.value.hint == 'pip install "plmsae[slurm]"'


@pytest.mark.slow
def test_a_gang_told_to_leave_saves_and_is_submitted_again(
    prepared: Prepared, trained: Callable[..., Experiment], losses: Callable[[Experiment], list[float]]
) -> None:
    """Two ranks as processes of a job; SIGUSR2, as before the end of its time, to one of them. The losses are a lone run's."""
    alone = trained("slurm-alone", "slurm-train")
    run_train(alone, LocalExecutor(alone))
    experiment = trained("slurm-gang", "slurm-train", executor="slurm", ranks=2)
    notes: list[str] = []

    def report(done: float | None, total: float | None, note: str | None = None, **figures: Any) -> None:
        notes.extend([] if note is None else [note])
        logs = Path(experiment.root) / "slurm-gang" / "logs"
        if done and not notes and (sign := logs / "alive-rank-1").exists():
            os.kill(json.loads(sign.read_text())["pid"], signal.SIGUSR2)

    run_train(experiment, local(experiment), report)
    assert [re.sub(r"\d+", "N", note) for note in notes] == [
        "job N was told to leave and has saved; submitted again as N"
    ]
    assert losses(experiment) == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.slow
def test_an_error_of_one_rank_ends_the_job_with_its_name(
    prepared: Prepared, trained: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = trained("slurm-broken", "slurm-train", executor="slurm", ranks=2)
    monkeypatch.setenv("PLMSAE_FAULT", "raise:train.step:rank=1,step=3")
    with pytest.raises(TaskFailed, match=r"train: rank 1: InjectedFault: injected fault at train\.step"):
        run_train(experiment, local(experiment))


def run_train(experiment: Experiment, executor: Any, report: Callable[..., None] = lambda *_, **__: None) -> None:
    executor.run(plan_stage("train", experiment, Store()), report)
