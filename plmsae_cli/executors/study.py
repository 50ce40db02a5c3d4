"""A search in Optuna's words: the study on disk, the next point to try, what has come of all.

The study is a journal of JSON lines in the sweep's folder. Nothing else decides.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from pydantic import ValidationError

from plmsae_cli.config.base import digest
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.space import Axis, axes
from plmsae_cli.config.sweep import Optuna
from plmsae_cli.stages.sweep import Trial, table, trial_at

JOURNAL = "optuna.journal"
_STATES = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}


def open_study(experiment: Experiment, folder: Path) -> optuna.Study:
    """The study in the folder, begun or continued. Raises UserError where its space is another."""
    assert experiment.sweep is not None
    options = experiment.sweep.optuna
    assert options is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = folder / JOURNAL
    folder.mkdir(parents=True, exist_ok=True)
    _drop_half_line(journal)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal))),
        study_name=experiment.name,
        direction=options.goal(),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=options.startup_trials)
        if options.prune == "median"
        else optuna.pruners.NopPruner(),
        load_if_exists=True,
    )
    # What makes results comparable: other values of it would be another study.
    asked = digest([options.space, options.metric, options.goal()])
    if study.user_attrs.setdefault("asked", asked) != asked:
        raise UserError(
            f"{journal} is a search of another space, metric or direction",
            "give the experiment another name, or pass --restart to archive the old search",
        )
    if not study.trials:
        study.set_user_attr("asked", asked)
    return study


def _drop_half_line(journal: Path) -> None:
    """A line that a killed process left half written would spoil the next one."""
    if journal.exists() and not (content := journal.read_bytes()).endswith(b"\n"):
        os.truncate(journal, content.rfind(b"\n") + 1)  # in one piece: written anew, a second kill could lose all


def ask(
    study: optuna.Study, options: Optuna, distributions: dict[str, BaseDistribution], others_at_work: bool
) -> optuna.Trial:
    """The next point, a function of the seed, its number and what is known of the trials before it."""
    number = len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(
        seed=_seed(options.seed, number), n_startup_trials=options.startup_trials, constant_liar=others_at_work
    )
    return study.ask(distributions)


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big")


def distribution(each: Axis) -> BaseDistribution:
    """An axis in Optuna's words."""
    if isinstance(each, list):
        return CategoricalDistribution([value if _scalar(value) else json.dumps(value) for value in each])
    if each.whole:
        return IntDistribution(int(each.low), int(each.high), log=each.log)
    return FloatDistribution(each.low, each.high, log=each.log)


def point_of(space: Mapping[str, Axis], params: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted path, of what Optuna chose; floats to four figures, so that a YAML can repeat them."""
    point = {}
    for path, each in space.items():
        value = params[path]
        if isinstance(each, list):
            point[path] = next(item for item in each if item == value or json.dumps(item) == value)
        else:
            point[path] = value if each.whole else min(each.high, max(each.low, float(f"{value:.4g}")))
    return point


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def summary(experiment: Experiment, study: optuna.Study) -> dict[str, Any]:
    """The body of sweep.json, from the study alone; a point that was tried again stands once."""
    assert experiment.sweep is not None
    options = experiment.sweep.optuna
    assert options is not None
    space = axes(options.space)
    found: dict[str, Trial] = {}
    states: dict[str, str] = {}
    values: dict[str, float | None] = {}
    for each in study.get_trials(deepcopy=False):
        try:
            trial = trial_at(experiment, point_of(space, each.params))
        except ValidationError:
            continue
        found.setdefault(trial.hash, trial)
        states.setdefault(trial.hash, _STATES[each.state])
        # Of a trial that was pruned Optuna gives the last thing it was told, which is not the figure.
        values.setdefault(trial.hash, each.value if each.state == TrialState.COMPLETE else None)
    body = table(experiment, list(found.values()), states)
    for row in body["trials"]:
        row["objective"] = values[row["hash"]]
    return {**body, "search": {"metric": options.metric, "direction": options.goal(), "trials": options.trials}}
