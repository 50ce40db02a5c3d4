"""The trials of a sweep, each an ordinary run through its stages."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plmsae_cli.config.errors import UserError, first_line
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.executor import Executor
from plmsae_cli.runtime.progress import NoReporter, Reporter
from plmsae_cli.runtime.run_folder import RunFolder, write_json
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted
from plmsae_cli.stages.sweep import Trial, table, trials

Ended = Callable[[Trial, str | None], None]
"""Told of each trial what it failed with, None where it did not."""


def each_trial(
    experiment: Experiment, only: Sequence[str] | None, run: RunFolder, executor: Executor, reporter: Reporter
) -> bool:
    """All or some stages of every trial, each a run of its own; one that fails does not stop the next.

    On a shared stream the trials train first, together; what is left of each is its evaluation.
    """
    from plmsae_cli.executors.pipeline import report_run

    if experiment.sweep is not None and experiment.sweep.optuna is not None:
        from plmsae_cli.executors.search import search

        return search(experiment, only, run, executor, reporter)
    points, states = trials(experiment), dict[str, str]()
    if not (run.path / "sweep.json").exists():
        write_json(run.path / "sweep.json", table(experiment, points, states))

    def ended(trial: Trial, error: str | None) -> None:
        states[trial.hash] = "done" if error is None else "failed"
        reporter.say(f"trial {trial.hash} done" if error is None else f"trial {trial.hash} failed: {error}")
        write_json(run.path / "sweep.json", table(experiment, points, states))

    worked = False
    if only is None and experiment.shares_stream:
        from plmsae_cli.executors.shared import train_shared

        worked, failed = train_shared(experiment, run, executor, reporter)
        for trial in points:
            if trial.hash in failed:
                ended(trial, failed[trial.hash])
    left = [trial for trial in points if trial.hash not in states]
    if experiment.launch.executor == "ray" and not experiment.shares_stream:
        from plmsae_cli.executors.ray import RayExecutor
        from plmsae_cli.executors.ray_trials import run_trials

        assert isinstance(executor, RayExecutor)
        worked |= run_trials(left, only, executor, reporter, ended)
    else:
        worked |= spread(experiment, left, only, run, executor, reporter, ended)
    if lost := sum(state == "failed" for state in states.values()):
        report_run(experiment, ["sweep"], run, True, reporter)
        raise UserError(f"{lost} of {len(points)} trials failed", f"see {run.path}/trials/*/status.json")
    return worked


def spread(
    experiment: Experiment,
    points: Sequence[Trial],
    only: Sequence[str] | None,
    run: RunFolder,
    executor: Executor,
    reporter: Reporter,
    ended: Ended,
) -> bool:
    """The trials on this machine: as many at once as it has places for, else one after the other; whether any did anything."""
    from plmsae_cli.executors.box import Box, places, side_by_side

    if len(points) > 1 and len(found := places(experiment)) > 1:
        return side_by_side(points, only, Box(found, run.path / "logs", reporter), executor, reporter, ended)
    return _in_turn(points, only, reporter, ended)


def _in_turn(points: Sequence[Trial], only: Sequence[str] | None, reporter: Reporter, ended: Ended) -> bool:
    """One after the other, in this process."""
    from plmsae_cli.executors.pipeline import run_experiment

    worked = False
    for number, trial in enumerate(points, 1):
        if STOP.requested():
            raise Interrupted
        reporter.say(f"trial {number}/{len(points)}: {trial.title} ({trial.hash})")
        try:
            stages = only or trial.experiment.stages()  # the grid may sweep what the data are made of
            worked |= bool(run_experiment(trial.experiment, stages, reporter).stages)
        except Interrupted:
            raise
        except Exception as error:
            ended(trial, str(error))
        else:
            ended(trial, None)
    return worked


def run_trial(settings: Mapping[str, Any], stages: Sequence[str], folder: str) -> dict[str, Any]:
    """One trial in a process of its own, on this machine or another; what it says is in `logs/run.log` of its run.

    Returns:
        `worked`: whether it had anything to do; or `interrupted`; or `error`: what it failed with.
    """
    from plmsae_cli.executors.pipeline import run_experiment

    os.chdir(folder)
    experiment = Experiment.model_validate(settings)
    try:
        return {"worked": bool(run_experiment(experiment, stages, NoReporter()).stages)}
    except Interrupted:
        return {"interrupted": True}
    except Exception as error:
        return {"error": first_line(error)}
