"""A small experiment through the data stages, and what one process makes of it: the oracle of every executor."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import plmsae_cli
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.executor import Executor
from plmsae_cli.executors.local import LocalExecutor
from plmsae_cli.executors.pipeline import plan_stage
from plmsae_cli.store.fs import Store
from tests.conftest import random_esm2

STAGES = ("embed", "shuffle", "optimize")
Prepared = Callable[..., Experiment]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums as in a trial's process, which has one thread: with another number of them the last bit may differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """An experiment with data of its own at each call: `prepared("name", launch={...})`."""
    folder = tmp_path_factory.mktemp("executors")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    random_esm2(folder / "weights", num_layers=2, d=16)
    text = gzip.decompress((Path(plmsae_cli.__file__).parent / "data" / "smoke.fasta.gz").read_bytes())
    (folder / "x.fasta").write_bytes(text)

    def make(name: str, **launch: Any) -> Experiment:
        body = {
            "name": name,
            "root": str(folder / "runs"),
            "data_root": str(folder / f"data-{name}"),
            "launch": {"gpus": 0, **launch},
            "model": {"weights": str(folder / "weights")},
            "embed": {
                "fasta": str(folder / "x.fasta"),
                "layers": [1],
                "holdout": 0.1,
                "dtype": "float32",
                "shard": "100kB",
            },
            "shuffle": {"seed": 3, "memory": "300kB"},
            "optimize": {"chunk": "128kB", "block_rows": 64},
        }
        return Experiment.model_validate(body)

    return make


def _run_stages(experiment: Experiment, executor: Executor, stages: tuple[str, ...] = STAGES) -> None:
    """The stages' plans, in order, each planned when those before it are done."""
    for stage in stages:
        executor.run(plan_stage(stage, experiment, Store()), lambda *_, **__: None)


def _files(experiment: Experiment) -> dict[str, list[dict[str, Any]]]:
    """Name, size and hash of every file of every artifact, by the artifact."""
    found = {}
    for manifest in sorted(Path(experiment.data_folder()).glob("*/MANIFEST.json")):
        body = json.loads(manifest.read_text())
        for file in body["files"]:
            assert (manifest.parent / file["name"]).stat().st_size == file["size"]
        found[manifest.parent.name] = sorted(body["files"], key=lambda file: str(file["name"]))
    return found


@pytest.fixture(scope="module")
def reference(prepared: Prepared) -> dict[str, list[dict[str, Any]]]:
    """What one process makes."""
    experiment = prepared("reference")
    _run_stages(experiment, LocalExecutor(experiment))
    found = _files(experiment)
    assert len(found) == 3
    return found


@pytest.fixture(scope="module")
def run_stages() -> Callable[..., None]:
    return _run_stages


@pytest.fixture(scope="module")
def files() -> Callable[[Experiment], dict[str, list[dict[str, Any]]]]:
    return _files


@pytest.fixture(scope="module")
def trained(prepared: Prepared) -> Callable[..., Experiment]:
    """`trained("name", "data")`: an experiment that trains on the dataset of the name `data`, which is made once."""
    made: dict[str, Experiment] = {}

    def make(name: str, data: str, tokens: str = "12_800", **launch: Any) -> Experiment:
        if data not in made:
            made[data] = prepared(data)
            _run_stages(made[data], LocalExecutor(made[data]))
        body = made[data].dump()
        train = {"sae": {"expansion": 2, "k": 4}, "batch_tokens": 128, "tokens": int(tokens), "log_every": 1}
        return Experiment.model_validate({**body, "name": name, "train": train, "launch": {"gpus": 0, **launch}})

    return make


@pytest.fixture(scope="module")
def losses() -> Callable[[Experiment], list[float]]:
    """The loss of every step, each told once."""

    def read(experiment: Experiment) -> list[float]:
        path = Path(experiment.root) / str(experiment.name) / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [line["loss"] for line in lines]

    return read
