"""Many trainings: every point of a grid, every SAE of a list. Each is an ordinary run under `trials/`, all are in one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plmsae_cli.config.base import digest
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.overrides import points, trial
from plmsae_cli.config.tree import plain
from plmsae_cli.runtime.results import headline


@dataclass(frozen=True)
class Trial:
    """One point of the grid, one SAE of the list, or one of their combinations."""

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
    """Every combination, in the order of the YAML. The trials share the sweep's data folder."""
    assert experiment.name is not None
    found = []
    for point in points(experiment):
        name = digest(point)[:12]
        place: dict[str, Any] = {
            "name": name,
            "root": str(Path(experiment.root) / experiment.name / "trials"),
            "data_root": experiment.data_folder(),
            "wandb.group": experiment.wandb.group or experiment.name,
        }
        if experiment.shares_stream and experiment.launch.ranks == "auto":
            place["launch.ranks"] = 1  # GPUs are filled with groups of SAEs, not each SAE spread over all
        found.append(Trial(name, point, trial(experiment, {**point, **place})))
    return found


def table(experiment: Experiment, states: Mapping[str, str]) -> dict[str, Any]:
    """The body of sweep.json: values, state and headline figures of every trial.

    Of SAEs from a list each has the values that any of them gives, its own or those of `train.sae`.
    """
    found = trials(experiment)
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
