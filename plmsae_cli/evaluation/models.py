"""The language models that an axis scores: published ones, files, and what runs have trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plmsae_cli.config.base import digest
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.language_models import TRAINED
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.store.fs import join
from plmsae_cli.store.weights import resolve_weights


@dataclass(frozen=True)
class Scored:
    """One language model."""

    name: str
    """What the tables show: as it was written, for the experiment's own the run's name."""
    weights: str
    """What `load_plm` takes."""
    identity: str
    """Stands for the weights; of a model yet to be trained, for its training."""
    num_layers: int


def scored_models(scope: Scope, wanted: Sequence[str], field: str, encoders: bool = False) -> list[Scored]:
    """The models by their names.

    Raises:
        UserError: naming `field`, where weights are not found, or can be embedded only and `encoders` is false.
    """
    return [_own(scope) if name == TRAINED else _given(scope, name, field, encoders) for name in wanted]


def _own(scope: Scope) -> Scored:
    name, train = scope.experiment.name, scope.experiment.train
    assert name is not None
    assert train is not None
    assert train.plm is not None
    identity = f"run-{digest(scope.lineage.run_identity())}"
    return Scored(name, join(scope.folder, "plm"), identity, train.plm.num_layers)


def _given(scope: Scope, name: str, field: str, encoders: bool) -> Scored:
    try:
        info = resolve_weights(name, scope.store, download=False)
    except UserError as error:
        raise UserError(error.message.replace("model.weights", field), error.hint) from error
    if info.format == "encoder" and not encoders:
        raise UserError(
            f"{field}: {name} can be embedded, but has no predictions that this scores", "name an ESM-2 model"
        )
    return Scored(name, name, f"{info.sha256}-{digest(dict(info.config))}", int(info.config["num_layers"]))
