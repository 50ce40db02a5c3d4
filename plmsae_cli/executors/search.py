"""A sweep by Optuna: each trial is an ordinary run, chosen after what those before gave, and perhaps ended early.

Where one runs at a time, a search that was killed chooses what it would have chosen; with several at work, what is known to a
choice (`study.ask`) depends on which of them ended first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import optuna
from optuna.trial import TrialState
from pydantic import ValidationError

from plmsae_cli.config.errors import UserError, first_line
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.space import Axis, axes
from plmsae_cli.executors import executor as executors
from plmsae_cli.executors.box import Box, make_data, places
from plmsae_cli.executors.study import ask, distribution, open_study, point_of, summary
from plmsae_cli.executors.trials import spread
from plmsae_cli.executors.watching import Pruned, Watched, final
from plmsae_cli.runtime.progress import NoReporter, Reporter
from plmsae_cli.runtime.results import headline
from plmsae_cli.runtime.run_folder import RunFolder, write_json
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted
from plmsae_cli.stages.sweep import Trial, foreseen, trial_at, trials
from plmsae_cli.store.fs import Store

_OF_DATA = ("model", "embed", "shuffle", "optimize")
_MOST_FAILURES = 3
"""Trials in a row that may fail: what ails them all is not the choice of values."""

Attempt = Callable[[Trial, Callable[[int, float], None]], float]
"""Runs a trial, tells (step, value) on the way, returns the figure; what it is told raises `Pruned` to end it."""


def search(
    experiment: Experiment,
    only: Sequence[str] | None,
    run: RunFolder,
    executor: executors.Executor,
    reporter: Reporter,
) -> bool:
    """Try points until there are as many as asked; with `only`, those stages of the trials that are done.

    Raises:
        Interrupted: the trials under way continue with the next start.
        UserError: the space is another than the study's, or no trial succeeded.
    """
    study = open_study(experiment, run.path)
    if only is not None:
        failed = list[str]()

        def ended(trial: Trial, error: str | None) -> None:
            if error is not None:
                failed.append(trial.hash)
                reporter.say(f"trial {trial.hash} failed: {error}")
            write_json(run.path / "sweep.json", summary(experiment, study))

        worked = spread(experiment, trials(experiment), only, run, executor, reporter, ended)
        if failed:
            raise UserError(f"{len(failed)} trials failed", f"see {run.path}/trials/*/status.json")
        return worked

    assert experiment.sweep is not None
    options = experiment.sweep.optuna
    assert options is not None
    metric, found = options.metric, places(experiment)
    if any(path.split(".")[0] in _OF_DATA for path in options.space):
        found = found[:1]  # each trial may have data to make, which takes the whole machine

    def here(trial: Trial, tell: Callable[[int, float], None]) -> float:
        train = trial.experiment.train
        assert train is not None
        _run(trial, trial.experiment.stages(), Watched(reporter, trial.run, train, tell))
        return figure(trial, metric)

    if len(found) == 1:
        return explore(experiment, study, run, reporter, here)
    make_data(foreseen(experiment)[0].experiment, executor, reporter)
    executor.close()  # idle workers hold models in the memory of the GPUs
    box = Box(found, run.path / "logs", reporter)

    def apart(trial: Trial, tell: Callable[[int, float], None]) -> float:
        train = trial.experiment.train
        assert train is not None
        steps = _steps(trial)
        watched = Watched(NoReporter(), trial.run, train, tell)
        box.run(trial, trial.experiment.stages(), partial(watched.look, before=steps))
        return figure(trial, metric)

    return explore(experiment, study, run, reporter, apart, box.size)


class _InTurn(Executor):
    """Does what it is given at once, in the thread that gives it."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


def explore(
    experiment: Experiment,
    study: optuna.Study,
    run: RunFolder,
    reporter: Reporter,
    attempt: Attempt,
    at_once: int = 1,
) -> bool:
    """Try points until the study has as many as asked; false where it had.

    Args:
        at_once: trials at work at the same time; of those under way, a choice supposes that they come out badly ("constant
            liar", Ginsbourger et al. 2010), so that it is made elsewhere.
    """
    assert experiment.sweep is not None
    options = experiment.sweep.optuna
    assert options is not None
    space = axes(options.space)
    distributions = {path: distribution(each) for path, each in space.items()}
    sign = 1.0 if options.goal() == "minimize" else -1.0  # of a loss on the way, so that less is better for the pruner
    worked, stopped, failures = False, False, 0
    working: dict[Future[tuple[TrialState, float | None]], int] = {}

    def idle() -> list[optuna.trial.FrozenTrial]:
        """Those that a start before was stopped in."""
        known = study.get_trials(deepcopy=False)
        return [t for t in known if t.state == TrialState.RUNNING and t.number not in working.values()]

    def next_one() -> optuna.Trial:
        if left := idle():
            return optuna.Trial(study, left[0]._trial_id)
        return ask(study, options, distributions, at_once > 1)

    with ThreadPoolExecutor(at_once) if at_once > 1 else _InTurn() as crew:
        while True:
            while len(working) < at_once and failures < _MOST_FAILURES and not stopped:
                if not idle() and len(study.get_trials(deepcopy=False)) >= options.trials:
                    break
                if stopped := STOP.requested():
                    break
                one = next_one()
                working[crew.submit(_attempt, experiment, space, one, sign, reporter, attempt)] = one.number
            if not working:
                break
            worked = True
            for future in wait(working, return_when=FIRST_COMPLETED).done:
                number = working.pop(future)
                try:
                    state, value = future.result()
                except Interrupted:
                    stopped = True  # those at work with it have heard the same
                    continue
                study.tell(number, value, state=state)
                write_json(run.path / "sweep.json", summary(experiment, study))
                failures = failures + 1 if state == TrialState.FAIL else 0
    if stopped:
        raise Interrupted
    if failures >= _MOST_FAILURES:
        raise UserError(f"the last {failures} trials failed", f"see {run.path}/trials/*/status.json")
    if not any(each.state == TrialState.COMPLETE for each in study.get_trials(deepcopy=False)):
        raise UserError("no trial of the search succeeded", f"see {run.path}/trials/*/status.json")
    write_json(run.path / "sweep.json", summary(experiment, study))
    return worked


def _attempt(
    experiment: Experiment,
    space: Mapping[str, Axis],
    one: optuna.Trial,
    sign: float,
    reporter: Reporter,
    attempt: Attempt,
) -> tuple[TrialState, float | None]:
    """One trial through, and how it ended."""

    def tell(step: int, value: float) -> None:
        if step not in known:  # a resumed trial passes again what it told before it was stopped
            one.report(sign * value, step)
        if one.should_prune():
            raise Pruned(f"pruned at step {step}: {value:.4g}")

    known = set(one.study.get_trials(deepcopy=False)[one.number].intermediate_values)
    try:
        trial = trial_at(experiment, point_of(space, one.params))
    except ValidationError as error:
        reporter.say(f"trial {one.number + 1} cannot be: {error.errors(include_url=False)[0]['msg']}")
        return TrialState.FAIL, None
    reporter.say(f"trial {one.number + 1}: {trial.title} ({trial.hash})")
    try:
        return TrialState.COMPLETE, attempt(trial, tell)
    except Interrupted:
        raise
    except Pruned as error:
        RunFolder(trial.run).status(state="pruned", error=None, pruned=str(error))
        reporter.say(f"trial {trial.hash} {error}")
        return TrialState.PRUNED, None
    except Exception as error:
        reporter.say(f"trial {trial.hash} failed: {first_line(error)}")
        return TrialState.FAIL, None


def _steps(trial: Trial) -> int:
    """Steps of its training."""
    from plmsae_cli.executors.pipeline import plan_stage

    return int(plan_stage("train", trial.experiment, Store(trial.experiment.storage)).figures["steps"])


def _run(trial: Trial, stages: Sequence[str], reporter: Reporter) -> dict[str, float]:
    from plmsae_cli.executors.pipeline import run_experiment

    return run_experiment(trial.experiment, stages, reporter).stages


def figure(trial: Trial, metric: str) -> float:
    """What the search is after, of a finished trial. Raises UserError where the run has no such figure."""
    found = headline(trial.run).get(metric)
    if found is None:
        assert trial.experiment.train is not None
        found = final(trial.run, trial.experiment.train, metric)
    if found is None:
        raise UserError(f"{trial.run} has no {metric}", "see its metrics.jsonl and eval/metrics.json")
    return float(found)
