"""Many trainings: points of a grid or a search, SAEs of a list. Each is an ordinary run in `trials/`, all are in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plmsae_cli.config.base import digest
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment, Launch
from plmsae_cli.config.overrides import points, trial
from plmsae_cli.config.tree import plain
from plmsae_cli.runtime.results import headline
from plmsae_cli.runtime.run_folder import read_json


@dataclass(frozen=True)
class Trial:
    """One point of the grid or search, one SAE of the list, or one of their combinations."""

    hash: str
    values: Mapping[str, Any]
    experiment: Experiment

    @property
    def title(self) -> str:
        """Its values for people."""
        return ", ".join(f"{k.rsplit('.', 1)[-1]}={plain(v)}" for k, v in self.values.items()) or "as train.sae says"

    @property
    def run(self) -> Path:
        assert self.experiment.name is not None
        return Path(self.experiment.root) / self.experiment.name


def trials(experiment: Experiment) -> list[Trial]:
    """Every combination or draw, in order; of Optuna's those that are done. They share the sweep's data folder."""
    chosen = experiment.sweep is not None and experiment.sweep.optuna is not None
    values = _done(experiment) if chosen else points(experiment)
    return [trial_at(experiment, point) for point in values]


def foreseen(experiment: Experiment) -> list[Trial]:
    """The trials that a plan can show: of Optuna's those that are done, or else one corner of the space."""
    return trials(experiment) or [trial_at(experiment, next(points(experiment)))]


def trial_at(experiment: Experiment, point: Mapping[str, Any]) -> Trial:
    """The trial of one point; its name depends on the point alone. Raises pydantic's ValidationError."""
    assert experiment.name is not None
    name = digest(point)[:12]
    place: dict[str, Any] = {
        "name": name,
        "root": str(Path(experiment.root) / experiment.name / "trials"),
        "data_root": experiment.data_folder(),
        "wandb.group": experiment.wandb.group or experiment.name,
    }
    if "launch.ranks" not in point:
        place["launch.ranks"] = trial_ranks(experiment.launch)
    return Trial(name, point, trial(experiment, {**point, **place}))


def trial_ranks(launch: Launch) -> int:
    """Processes of each trial: GPUs are filled with trials, not each trial spread over all."""
    return launch.nodes if launch.ranks == "auto" else launch.ranks


def _done(experiment: Experiment) -> list[dict[str, Any]]:
    if find_spec("optuna") is None:
        raise UserError("sweep.optuna needs the package optuna, which is not installed", 'pip install "plmsae[optuna]"')
    body = read_json(Path(experiment.root) / str(experiment.name) / "sweep.json") or {"trials": []}
    return [each["values"] for each in body["trials"] if each["state"] == "done"]


def table(experiment: Experiment, found: Sequence[Trial], states: Mapping[str, str]) -> dict[str, Any]:
    """The body of sweep.json: values, state and headline figures of every trial.

    Of SAEs from a list each has the values that any of them gives, its own or those of `train.sae`.
    """
    names = list(dict.fromkeys(name for each in found for name in each.values))
    grid: dict[str, list[Any]] = {name: [] for name in names}
    rows = []
    for each in found:
        values = {name: each.values.get(name, _value(each.experiment, name)) for name in names}
        for name, value in values.items():
            if value not in grid[name]:
                grid[name].append(value)
        state = states.get(each.hash, "pending")
        rows.append({"hash": each.hash, "values": values, "state": state, "metrics": headline(each.run)})
    return {"schema": 1, "grid": grid, "trials": rows}


def _value(experiment: Experiment, path: str) -> Any:
    at: Any = experiment.dump()
    for key in path.split("."):
        at = at[key]
    return at
