"""The documented names are those that training writes, on every line of every kind."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.pipeline import Done
from plmsae_cli.runtime.metric_names import METRICS, general
from plmsae_cli.runtime.metrics import flat

DOCS = Path(__file__).parents[2] / "docs"
SOMETIMES = {"mfu"}
"""Needs a GPU."""


def written(done: Done) -> set[str]:
    lines = [json.loads(line) for line in (done.run.path / "metrics.jsonl").read_text().splitlines()]
    return {general(name) for line in lines for name in flat(line)}


def named(kind: str) -> set[str]:
    return {each.name for each in METRICS if kind in each.kinds} - SOMETIMES


def test_an_autoencoder(build: Callable[..., Experiment], go: Callable[..., Done]) -> None:
    assert written(go(build(**{"train.tokens": 640, "eval": None}))) == named("sae")


def test_a_language_model(tmp_path: Path, fasta: Path, go: Callable[..., Done]) -> None:
    plm = {"fasta": str(fasta), "num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "max_length": 62,
           "pack_tokens": 256, "eval_every": 2, "eval_tokens": 512, "holdout": 0.1,
           "starting_mask_rate": 0.3, "mask_rate_steps": 2}  # fmt: skip
    body: dict[str, Any] = {
        "name": "lm", "root": str(tmp_path), "train": {"kind": "plm", "plm": plm, "batch_tokens": 256, "tokens": 1024,
                                                       "log_every": 1},
    }  # fmt: skip
    assert written(go(Experiment.model_validate(body))) == named("plm")


def test_the_page_is_fresh() -> None:
    spec = importlib.util.spec_from_file_location("metrics_page", DOCS / "metrics.py")
    assert spec is not None
    assert spec.loader is not None
    page: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    assert page.refreshed(text) == text, "python docs/metrics.py writes it anew"


@pytest.mark.parametrize(("name", "expected"), [
    ("loss", "loss"), ("valid/random/loss", "valid/*/loss"), ("valid/a/b", "valid/*/b"),
])  # fmt: skip
def test_sets_have_one_name(name: str, expected: str) -> None:
    assert general(name) == expected
