"""Which weights a start reads, and so fetches before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from plmsae_cli.config.experiment import Experiment

NAME = "esm2_t6_8M_UR50D"
DATASET = {"data": "somewhere/optimize-0"}
EMBEDDED = {"embed": {"fasta": "a.fasta", "layers": [1]}, "shuffle": {}, "optimize": {}}
SCORED = {"lm": {"models": ["bundled", "esm2_t12_35M_UR50D"], "fasta": "a.fasta"}}


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ({**EMBEDDED, "train": {}}, [NAME]),
        ({"train": DATASET}, []),
        ({"train": DATASET, "eval": {}}, [NAME]),
        ({"train": DATASET, "eval": {"fidelity": {"loss_recovered": False}}}, []),
        ({"train": DATASET, "eval": {"fidelity": {"loss_recovered": False}, "encode": {"fasta": "b.fasta"}}}, [NAME]),
        ({"eval": SCORED}, ["esm2_t12_35M_UR50D"]),
    ],
)
def test_what_a_start_reads(body: dict[str, Any], weights: list[str]) -> None:
    assert Experiment.model_validate({**body, "model": {"weights": NAME}}).published_weights() == weights
