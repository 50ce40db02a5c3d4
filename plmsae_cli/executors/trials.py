"""The trials of a sweep, each an ordinary run through its stages."""

from __future__ import annotations

from collections.abc import Sequence

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.executor import Executor
from plmsae_cli.runtime.progress import Reporter
from plmsae_cli.runtime.run_folder import RunFolder, write_json
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted
from plmsae_cli.stages.sweep import table, trials


def each_trial(
    experiment: Experiment, only: Sequence[str] | None, run: RunFolder, executor: Executor, reporter: Reporter
) -> bool:
    """All or some stages of every trial, each a run of its own; one that fails does not stop the next.

    On a shared stream the trials train first, together; what is left of each is its evaluation.
    """
    from plmsae_cli.executors.pipeline import report_run, run_experiment

    if experiment.sweep is not None and experiment.sweep.optuna is not None:
        from plmsae_cli.executors.search import search

        return search(experiment, only, run, reporter)
    worked, failed, states = False, dict[str, str](), dict[str, str]()
    points = trials(experiment)
    if not (run.path / "sweep.json").exists():
        write_json(run.path / "sweep.json", table(experiment, points, states))
    if only is None and experiment.shares_stream:
        from plmsae_cli.executors.shared import train_shared

        worked, failed = train_shared(experiment, run, executor, reporter)
    if experiment.launch.executor == "ray" and not experiment.shares_stream:
        from plmsae_cli.executors.ray import RayExecutor
        from plmsae_cli.executors.ray_trials import run_trials

        assert isinstance(executor, RayExecutor)
        worked, failed = run_trials(points, only, executor, reporter)
    for number, trial in enumerate(points, 1):
        if STOP.requested():
            raise Interrupted
        reporter.say(f"trial {number}/{len(points)}: {trial.title} ({trial.hash})")
        try:
            if trial.hash in failed:
                raise UserError(failed[trial.hash])
            stages = only or trial.experiment.stages()  # the grid may sweep what the data are made of
            worked |= bool(run_experiment(trial.experiment, stages, reporter).stages)
            states[trial.hash] = "done"
        except Interrupted:
            raise
        except Exception as error:
            states[trial.hash] = "failed"
            reporter.say(f"trial {trial.hash} failed: {error}")
        write_json(run.path / "sweep.json", table(experiment, points, states))
    if lost := sum(state == "failed" for state in states.values()):
        report_run(experiment, ["sweep"], run, True, reporter)
        raise UserError(f"{lost} of {len(points)} trials failed", f"see {run.path}/trials/*/status.json")
    return worked
