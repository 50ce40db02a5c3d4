"""A grid over any fields: every trial is an ordinary run under `trials/`, collected into one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plmsae_cli.config.base import digest
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.overrides import points, trial
from plmsae_cli.runtime.results import headline


@dataclass(frozen=True)
class Trial:
    """One point of the grid."""

    hash: str
    values: Mapping[str, Any]
    experiment: Experiment

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
        place = {
            "name": name,
            "root": str(Path(experiment.root) / experiment.name / "trials"),
            "data_root": experiment.data_folder(),
            "wandb.group": experiment.wandb.group or experiment.name,
        }
        found.append(Trial(name, point, trial(experiment, {**point, **place})))
    return found


def table(experiment: Experiment, states: Mapping[str, str]) -> dict[str, Any]:
    """The body of sweep.json: values, state and headline figures of every trial."""
    assert experiment.sweep is not None
    rows = [
        {"hash": t.hash, "values": dict(t.values), "state": states.get(t.hash, "pending"), "metrics": headline(t.run)}
        for t in trials(experiment)
    ]
    return {"schema": 1, "grid": dict(experiment.sweep.grid), "trials": rows}
