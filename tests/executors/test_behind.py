"""Tasks whose files are still being written when the next one starts: the order of records, errors, needs."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors import worker
from plmsae_cli.executors.worker import Behind, LocalContext, run_task
from plmsae_cli.runtime.task import Context, Interrupted, Pending, Result, Task
from plmsae_cli.store.fs import Store, StoreError, join
from plmsae_cli.store.manifest import done_tasks


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stage whose tasks write one file each, in a thread, once `open_` is set; `worked` says what has computed."""
    module = ModuleType("slow_stage")
    module.open_, module.worked = threading.Event(), []  # type: ignore[attr-defined]
    threads = ThreadPoolExecutor(2)

    def work(task: Task, context: Context) -> Pending:
        (folder,) = task.folders
        if task.args.get("stop"):
            raise Interrupted

        def write() -> Result:
            module.open_.wait(240)
            if task.args.get("fails"):
                raise StoreError("the disk is full")
            return Result([context.store.write(join(folder, task.id), [b"x"])])

        module.worked.append((task.id, sorted(done_tasks(context.store, folder))))
        future: Future[Result] = threads.submit(write)
        return Pending({folder: future})

    module.work = work  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "slow_stage", module)
    monkeypatch.setitem(worker.STAGE_MODULES, "slow", "slow_stage")
    return module


@pytest.fixture
def context() -> LocalContext:
    body = {"name": "x", "embed": {"fasta": "x", "layers": [1]}}
    return LocalContext(Experiment.model_validate(body), lambda *_, **__: None)


def task(name: str, folder: Path, *needs: str, **args: object) -> Task:
    return Task(name, "slow", (str(folder),), needs=needs, args=args)


def test_the_next_task_works_before_the_files_are_written(
    stage: ModuleType, context: LocalContext, tmp_path: Path
) -> None:
    with Behind() as behind:
        behind.run(task("a", tmp_path), context)
        assert done_tasks(Store(), str(tmp_path)) == set(), "not done before its files are"
        threading.Timer(0.2, stage.open_.set).start()
        behind.run(task("b", tmp_path), context)
        assert done_tasks(Store(), str(tmp_path)) == {"a"}
        behind.run(task("c", tmp_path, "b"), context)
    assert done_tasks(Store(), str(tmp_path)) == {"a", "b", "c"}
    # b computed beside a's writing; c needed b and waited for it.
    assert stage.worked == [("a", []), ("b", []), ("c", ["a", "b"])]


def test_alone_a_task_is_done_when_it_returns(stage: ModuleType, context: LocalContext, tmp_path: Path) -> None:
    stage.open_.set()
    run_task(task("a", tmp_path), context)
    assert done_tasks(Store(), str(tmp_path)) == {"a"}


def test_what_was_being_written_is_recorded_when_the_next_is_stopped(
    stage: ModuleType, context: LocalContext, tmp_path: Path
) -> None:
    stage.open_.set()
    with Behind() as behind:
        behind.run(task("a", tmp_path), context)
        with pytest.raises(Interrupted):
            behind.run(task("b", tmp_path, stop=True), context)
    assert done_tasks(Store(), str(tmp_path)) == {"a"}


def test_a_failed_write_is_raised_and_nothing_is_recorded(
    stage: ModuleType, context: LocalContext, tmp_path: Path
) -> None:
    stage.open_.set()
    with Behind() as behind:
        behind.run(task("a", tmp_path, fails=True), context)
        with pytest.raises(StoreError, match="the disk is full"):
            behind.run(task("b", tmp_path), context)
    assert done_tasks(Store(), str(tmp_path)) == set()


def test_an_error_comes_when_nothing_is_being_written_any_more(
    stage: ModuleType, context: LocalContext, tmp_path: Path
) -> None:
    """Neither another folder of the task that failed, nor what the next task writes."""
    stage.open_.set()
    with pytest.raises(StoreError):
        worker.publish(task("a", tmp_path), context, Pending({"a": broken(), "b": late(tmp_path / "b")}))
    assert (tmp_path / "b").exists()

    behind = Behind()
    behind.run(task("c", tmp_path, fails=True), context)
    stage.work = lambda *_: Pending({str(tmp_path): late(tmp_path / "d")})  # type: ignore[attr-defined]
    with pytest.raises(StoreError):
        behind.run(task("d", tmp_path), context)
    assert (tmp_path / "d").exists()


def broken() -> Future[Result]:
    future: Future[Result] = Future()
    future.set_exception(StoreError("the disk is full"))
    return future


def late(path: Path) -> Future[Result]:
    """Writes a file after a while."""

    def write() -> Result:
        time.sleep(0.2)
        path.touch()
        return Result([])

    return ThreadPoolExecutor(1).submit(write)
