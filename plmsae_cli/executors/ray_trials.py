"""Trials of a sweep side by side on a Ray cluster: each is an ordinary run, started as a task of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from plmsae_cli.config.errors import first_line
from plmsae_cli.executors.ray import RayExecutor
from plmsae_cli.executors.trials import Ended, run_trial
from plmsae_cli.runtime.progress import Reporter
from plmsae_cli.runtime.run_folder import RunFolder
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted
from plmsae_cli.stages.sweep import Trial, trial_ranks


def run_trials(
    points: Sequence[Trial], only: Sequence[str] | None, executor: RayExecutor, reporter: Reporter, ended: Ended
) -> bool:
    """As many at once as the cluster has room for; a lost node's trials begin again from their checkpoints.

    Returns:
        Whether anything was done.

    Raises:
        Interrupted: those at work have saved.
        UserError: no node can hold a trial.
    """
    ray, gpus = executor.ray, executor.has_gpus
    waiting: dict[Any, Trial] = {}
    for trial in points:
        ranks = trial_ranks(trial.experiment.launch)
        wanted = {"CPU": trial.experiment.launch.ray.cpus * ranks, "GPU": ranks if gpus else 0}
        hint = "lower launch.ray.cpus or launch.ranks (a trial has all its ranks on one node), or add a larger node"
        executor.check_fits(f"trial {trial.hash}", wanted, hint)
    for trial in points:
        launch = trial.experiment.launch
        ranks = trial_ranks(launch)
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
    worked = asked = False
    while waiting:
        for reference in ray.wait(list(waiting), timeout=0.5)[0]:
            trial = waiting.pop(reference)
            outcome = _outcome(ray, reference)
            worked |= bool(outcome.get("worked"))
            if not asked:
                ended(trial, outcome.get("error"))
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
    reporter.end("all have ended")
    return worked


def _outcome(ray: Any, reference: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = ray.get(reference)
    except ray.exceptions.RayError as error:
        return {"error": f"its worker was lost: {first_line(error)}"}
    return found
