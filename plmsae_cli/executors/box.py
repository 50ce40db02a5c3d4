"""Trials of a sweep side by side on this machine: each in a process of its own, which sees its own GPUs and no others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from plmsae_cli.config.errors import UserError, first_line
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.executor import Executor
from plmsae_cli.executors.trials import run_trial
from plmsae_cli.runtime.device import ALLOWED, chosen_gpus, visible_as
from plmsae_cli.runtime.environment import cpu_count
from plmsae_cli.runtime.processes import go_with_parent
from plmsae_cli.runtime.progress import Reporter
from plmsae_cli.runtime.run_folder import read_json
from plmsae_cli.runtime.stop import FORCED, STOP
from plmsae_cli.runtime.task import Interrupted
from plmsae_cli.stages.sweep import Trial, trial_ranks
from plmsae_cli.stages.train import TRAIN
from plmsae_cli.store.fs import Store
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import read_manifest

_LOOK_S = 0.2
Place = Sequence[int]
"""GPUs by their numbers among the visible ones; none: the CPU."""


def places(experiment: Experiment) -> list[Place]:
    """Where trials can be at work at the same time: as many GPUs for each as it has ranks, on a CPU `launch.workers`."""
    launch = experiment.launch
    if launch.executor != "local":
        return [()]
    gpus, ranks, most = chosen_gpus(launch), trial_ranks(launch), launch.workers
    if gpus:
        found: list[Place] = [gpus[at : at + ranks] for at in range(0, len(gpus) - ranks + 1, ranks)] or [gpus]
    else:
        found = [()] * (1 if most == "auto" else most)
    return found if most == "auto" else found[:most]


class Box:
    """Places, and the trials that are at work on them."""

    def __init__(self, found: Sequence[Place], logs: Path, reporter: Reporter) -> None:
        self.size, self._logs, self._reporter = len(found), logs, reporter
        self._free: SimpleQueue[Place] = SimpleQueue()
        self._at_work: dict[str, threading.Lock] = {}
        for place in found:
            self._free.put(place)
        logs.mkdir(parents=True, exist_ok=True)

    def run(self, trial: Trial, stages: Sequence[str], look: Callable[[], None] = lambda: None) -> bool:
        """One trial through, on the next place that is free; called by as many threads as there are places, or more.

        Args:
            look: called now and then meanwhile; what it raises ends the trial, which saves before.

        Returns:
            Whether it had anything to do.

        Raises:
            Interrupted: it has saved.
            UserError: what it failed with.
        """
        # A search may choose a point again while it is at work: the second then finds it done.
        with self._at_work.setdefault(trial.hash, threading.Lock()), self._place() as place:
            if STOP.requested():
                raise Interrupted
            where = f" on GPU {visible_as(place)}" if place else ""
            self._reporter.say(f"trial {trial.hash} begins{where}: {trial.title}")
            outcome = self._work(trial, stages, place, look)
        if "interrupted" in outcome:
            raise Interrupted
        if "error" in outcome:
            raise UserError(outcome["error"])
        return bool(outcome["worked"])

    @contextmanager
    def _place(self) -> Iterator[Place]:
        place = self._free.get()
        try:
            yield place
        finally:
            self._free.put(place)

    def _work(self, trial: Trial, stages: Sequence[str], place: Place, look: Callable[[], None]) -> dict[str, Any]:
        order = {"experiment": self._settings(trial, place), "stages": list(stages)}
        log = self._logs / f"trial-{trial.hash}.log"
        with log.open("ab") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "plmsae_cli.executors.box"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, env=self._environment(place),
                start_new_session=True,  # a Ctrl-C at the terminal is this process's to pass on
            )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None

        def kill() -> None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        with process, STOP.before_forced_exit(kill):
            try:
                # Kept open: the end of this pipe tells the trial that this process is gone.
                process.stdin.write(json.dumps(order).encode() + b"\n")
                process.stdin.flush()
                self._wait(process, look)
            except BrokenPipeError:
                process.wait()
            except BaseException:
                _ask_to_stop(process)
                process.wait()
                raise
            kill()  # whatever it has left behind, which would hold the pipe open
            lines = process.stdout.read().splitlines()
        if not lines and process.returncode == -signal.SIGTERM:  # asked while it was still importing
            return {"interrupted": True}
        if not lines:
            return {"error": f"its process died (exit {process.returncode}); its output is in {log}"}
        outcome: dict[str, Any] = json.loads(lines[-1])
        return outcome

    def _wait(self, process: subprocess.Popen[bytes], look: Callable[[], None]) -> None:
        asked = False
        while True:
            try:
                process.wait(_LOOK_S)
                return
            except subprocess.TimeoutExpired:
                pass
            if STOP.requested() and not asked:
                asked = True
                _ask_to_stop(process)
            look()

    def _settings(self, trial: Trial, place: Place) -> dict[str, Any]:
        """The experiment as its process sees it: all GPUs there are its own."""
        own = trial.experiment
        launch = {**own.launch.model_dump(mode="json"), "gpus": "auto" if place else 0, "workers": "auto"}
        return {**own.dump(), "launch": launch}

    def _environment(self, place: Place) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name != ALLOWED}
        if place:
            environment["CUDA_VISIBLE_DEVICES"] = visible_as(place)
        # Trials that share a CPU must not each take all of its cores.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // self.size)))
        return environment


def _ask_to_stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)


def side_by_side(
    points: Sequence[Trial],
    only: Sequence[str] | None,
    box: Box,
    executor: Executor,
    reporter: Reporter,
    ended: Callable[[Trial, str | None], None],
) -> bool:
    """All trials, as many at once as the box has places. What several may share is made before, by the whole box.

    Args:
        ended: told of each trial what it failed with, None where it did not.

    Returns:
        Whether anything was done.

    Raises:
        Interrupted: those at work have saved.
    """
    worked, left = False, list[Trial]()
    for trial in points:
        try:
            if _done(trial, only):
                ended(trial, None)
                continue
            worked |= only is None and make_data(trial.experiment, executor, reporter)
            left.append(trial)
        except Interrupted:
            raise
        except Exception as error:
            ended(trial, first_line(error))
    executor.close()  # idle workers hold models in the memory of the GPUs
    interrupted = False
    reporter.begin(f"{len(left)} trials, {box.size} at a time")
    with ThreadPoolExecutor(box.size) as crew:
        waiting = {crew.submit(box.run, trial, only or trial.experiment.stages()): trial for trial in left}
        try:
            for count, future in enumerate(as_completed(waiting), 1):
                why: str | None = None
                try:
                    worked |= future.result()
                except Interrupted:
                    interrupted = True
                    continue
                except Exception as failure:
                    why = first_line(failure)
                ended(waiting[future], why)
                reporter.update(count, len(left))
        except BaseException:  # what became of a trial cannot be kept: no other is begun
            crew.shutdown(wait=False, cancel_futures=True)
            reporter.end("failed")
            raise
    if interrupted:
        reporter.end("stopped")
        raise Interrupted
    reporter.end("all have ended")
    return worked


def _done(trial: Trial, only: Sequence[str] | None) -> bool:
    """Whether a process would find nothing to do."""
    from plmsae_cli.executors.pipeline import plan_stage

    if (read_json(trial.run / "status.json") or {}).get("state") != "done":
        return False
    own = trial.experiment
    store = Store(own.storage)
    return all(plan_stage(stage, own, store).done for stage in only or own.stages() if stage in ("train", "eval"))


def make_data(experiment: Experiment, executor: Executor, reporter: Reporter) -> bool:
    """What a training reads, where it is not there yet; false where it is."""
    from plmsae_cli.executors.pipeline import DATA_STAGES, plan_stage, run_experiment

    assert experiment.train is not None
    store = Store(experiment.storage)
    if experiment.train.kind == "plm":
        plan = plan_stage("train", experiment, store)
        tasks = [task for task in plan.tasks if task.id != TRAIN]
        if tasks:
            executor.run(replace(plan, tasks=tasks), lambda *_, **__: None)
        return bool(tasks)
    if experiment.train.data is not None or read_manifest(store, Lineage(experiment, store).dataset().folder):
        return False
    return bool(run_experiment(experiment, [s for s in experiment.stages() if s in DATA_STAGES], reporter).stages)


def main() -> None:
    """A trial that a box has started: its order comes on stdin, its outcome goes to stdout, what it says to stderr."""
    answers = os.dup(1)
    os.dup2(2, 1)
    STOP.install(quiet=True)
    go_with_parent()
    order = json.loads(sys.stdin.buffer.readline())

    def leave_with_parent() -> None:
        os.read(0, 1)  # gives nothing but the pipe's end
        os._exit(FORCED)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    outcome = run_trial(order["experiment"], order["stages"], os.getcwd())
    os.write(answers, json.dumps(outcome).encode() + b"\n")


if __name__ == "__main__":
    main()
