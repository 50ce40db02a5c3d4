"""Small experiments on real proteins with a tiny language model."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import plmsae_cli
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.overrides import apply
from plmsae_cli.executors.pipeline import Done, run_experiment
from plmsae_cli.runtime.progress import PlainReporter
from plmsae_cli.store.activations import ActivationShards
from plmsae_cli.store.fs import Store
from tests.conftest import random_esm2

ASSETS = Path(plmsae_cli.__file__).parent / "data"


def rows_of(folder: str, heldout: bool) -> torch.Tensor:
    """An artifact's rows of one side of the split, as stored."""
    shards = ActivationShards(Store(), folder, heldout=heldout)
    rows_RW = torch.empty(shards.stop, shards.width, dtype=shards.dtype)
    shards.read_into(0, rows_RW)
    return rows_RW


class Quiet(PlainReporter):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of random weights of a three-layer model."""
    return str(random_esm2(tmp_path_factory.mktemp("weights")))


@pytest.fixture(scope="session")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 80 short proteins of the package, as plain FASTA, one of them with odd letters."""
    path = tmp_path_factory.mktemp("fasta") / "proteins.fasta"
    text = gzip.decompress((ASSETS / "smoke.fasta.gz").read_bytes()).decode()
    path.write_text(text + ">odd letters\nMKVJ*lavvU\n")
    return path


Build = Callable[..., Experiment]


@pytest.fixture
def build(tmp_path: Path, weights: str, fasta: Path) -> Build:
    """An experiment through every stage, with changes by dotted path; as keywords, `__` stands for the dot."""

    def make(**changes: Any) -> Experiment:
        body: dict[str, Any] = {
            "name": "run",
            "root": str(tmp_path / "runs"),
            "model": {"weights": weights},
            "embed": {"fasta": str(fasta), "layers": [2], "holdout": 0.1, "dtype": "float32", "shard": "100kB"},
            "shuffle": {"seed": 3, "memory": "200kB"},
            "optimize": {"chunk": "64kB", "block_rows": 64},
            "train": {
                "sae": {"expansion": 2, "k": 4},
                "batch_tokens": 128,
                "tokens": 2560,
                "log_every": 1,
                "checkpoint_every": 5,
                "lr": 1e-3,
            },
            "eval": {"fidelity": {"proteins": 4}},
        }
        return Experiment.model_validate(apply(body, {k.replace("__", "."): v for k, v in changes.items()}))

    return make


@pytest.fixture
def go() -> Callable[..., Done]:
    """Run an experiment's stages; the reporter is in `.reporter` of the result's run."""

    def run(experiment: Experiment, stages: list[str] | None = None, reporter: PlainReporter | None = None) -> Done:
        return run_experiment(experiment, stages or experiment.stages(), reporter or Quiet())

    return run
