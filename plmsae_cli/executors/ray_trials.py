"""Trials of a sweep side by side on a Ray cluster: each is an ordinary run, started as a task of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from plmsae_cli.config.errors import first_line
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.ray import RayExecutor
from plmsae_cli.runtime.progress import NoReporter, Reporter
from plmsae_cli.runtime.run_folder import RunFolder
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted
from plmsae_cli.stages.sweep import Trial


def run_trials(
    points: Sequence[Trial], only: Sequence[str] | None, executor: RayExecutor, reporter: Reporter
) -> tuple[bool, dict[str, str]]:
    """As many at once as the cluster has room for; a lost node's trials begin again from their checkpoints.

    Returns:
        Whether anything was done, and by hash the message of each trial that failed.

    Raises:
        Interrupted: those at work have saved.
    """
    ray, launch = executor.ray, points[0].experiment.launch
    gpus = executor.has_gpus
    waiting: dict[Any, Trial] = {}
    for trial in points:
        ranks = 1 if trial.experiment.launch.ranks == "auto" else trial.experiment.launch.ranks
        needs = {
            "num_cpus": launch.ray.cpus * ranks,
            "num_gpus": ranks if gpus else 0,
            "max_retries": launch.ray.retries,
        }
        own = {**launch.model_dump(mode="json"), "executor": "local", "ray": {}, "ranks": ranks}
        settings = {**trial.experiment.dump(), "launch": {**own, "gpus": "auto" if gpus else 0}}
        work = ray.remote(max_calls=1)(run_trial).options(name=f"trial.{trial.hash}", **needs)
        waiting[work.remote(settings, only or trial.experiment.stages(), os.getcwd())] = trial
    reporter.begin(f"{len(points)} trials")
    failed: dict[str, str] = {}
    worked = asked = False
    while waiting:
        for reference in ray.wait(list(waiting), timeout=0.5)[0]:
            trial = waiting.pop(reference)
            outcome = _outcome(ray, reference)
            worked |= bool(outcome.get("worked"))
            if "error" in outcome and not asked:
                failed[trial.hash] = outcome["error"]
                reporter.update(None, None, note=f"trial {trial.hash} ({trial.title}) failed: {outcome['error']}")
            reporter.update(len(points) - len(waiting), len(points))
        if STOP.requested() and not asked:
            asked = True
            for reference, trial in waiting.items():
                if (trial.run / "status.json").exists():
                    RunFolder(trial.run).stop_file.touch()
                ray.cancel(reference, force=False)  # takes back those that wait; those at work see the file
    if asked:
        reporter.end("stopped")
        raise Interrupted
    reporter.end(f"{len(points) - len(failed)} done" + (f", {len(failed)} failed" if failed else ""))
    return worked, failed


def _outcome(ray: Any, reference: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = ray.get(reference)
    except ray.exceptions.RayError as error:
        return {"error": f"its worker was lost: {first_line(error)}"}
    return found


def run_trial(settings: Mapping[str, Any], stages: Sequence[str], folder: str) -> dict[str, Any]:
    """One trial, on the node that Ray has chosen; what it says is in `logs/run.log` of its run."""
    from plmsae_cli.executors.pipeline import run_experiment

    os.chdir(folder)
    experiment = Experiment.model_validate(settings)
    try:
        return {"worked": bool(run_experiment(experiment, stages, NoReporter()).stages)}
    except Interrupted:
        return {"interrupted": True}
    except Exception as error:
        return {"error": first_line(error)}
