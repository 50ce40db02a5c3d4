"""The full-size examples of `eval` plan as they are, beside files of the names that they use."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.store.fs import Store
from plmsae_cli.store.weights import save_model

EXAMPLES = Path(__file__).parents[2] / "experiments" / "examples"


@pytest.mark.parametrize(("name", "layers", "axes"), [
    ("evidence-650m-l24", 33, ["fidelity", "concepts", "families", "probes", "encode", "steering"]),
    ("evidence-3b-l36", 36, ["fidelity", "concepts", "families", "probes"]),
    ("contacts-650m-l24", 33, ["fidelity", "contacts", "steering"]),
    ("interventions-3b-l36", 36, ["fidelity", "contacts", "steering"]),
])  # fmt: skip
def test_they_plan(
    plmsae: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, layers: int, axes: list[str]
) -> None:
    """A narrow model of as many layers stands for the weights, which are gigabytes."""
    monkeypatch.chdir(tmp_path)
    config = ESM2Config(num_layers=layers, d=8, num_heads=2)
    model = ESM2(config)
    model.init_weights(0)
    save_model(Store(), "narrow", dict(model.state_dict()), asdict(config), {})
    proteins = gzip.compress(b"".join(b">p%d\n%s\n" % (n, b"MKV" * (20 + n)) for n in range(200)))
    for fasta in ("uniref50-2m.fasta.gz", "uniref50-20k.fasta.gz", "mine.fasta"):
        Path(fasta).write_bytes(proteins)
    Path("uniprot_sprot.tsv.gz").write_bytes(gzip.compress(b"Entry\tSequence\tActive site\nP1\tMKV\tACT_SITE 2\n"))
    Path("go_mfo.tsv.gz").write_bytes(gzip.compress(b"P1\tGO:0003677\n"))
    for code in ("1cs4", "1fx2", "4at1"):
        Path(f"{code}.pdb.gz").write_bytes(gzip.compress(code.encode()))
    shapes = {"encoder.weight": (32, 8), "encoder.bias": (32,), "decoder.weight": (8, 32), "bias": (8,)}
    torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, "saefold-3b-l36.ckpt")
    sets = ["--set", "model.weights=narrow"]
    if "3b" in name:
        sets += ["--set", "train.imported.weights=narrow"]
    if name == "contacts-650m-l24":  # the narrow model has no head
        sets += ["--set", "eval.contacts.methods=[jacobian]"]
    done = plmsae("run", EXAMPLES / f"{name}.yaml", "--dry-run", *sets)
    assert done.code == 0, done.err
    assert f"axes: {axes}" in done.out
    for axis in {"concepts", "families", "probes"} & set(axes):  # what it will hold, before anything exists
        assert f"{axis}, memory_bytes: " in done.out
    assert not (tmp_path / "runs").exists()
