"""The full-size examples of `eval` plan as they are, beside files of the names that they use."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from plmsae_cli.config.yaml import load
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.store.fs import Store
from plmsae_cli.store.weights import save_model

CASP14 = (
    b"T1024 T1025 T1026 T1029 T1030 T1032 T1046s1 T1046s2 T1050 T1054 T1056 T1067 T1073 T1074 T1079 T1082 T1090"
).split()
EXAMPLES = Path(__file__).parents[2] / "experiments" / "examples"


def structure(chains: str) -> bytes:
    """A PDB file of straight chains of 26 glycines, CA alone."""
    rows = [
        f"GLY {chain}{i:4d}    {9.0 * c:8.3f}   0.000{1.5 * i:8.3f}"
        for c, chain in enumerate(chains)
        for i in range(1, 27)
    ]
    lines = [f"SEQRES {n:3d} {chain}   26  " + "GLY " * 13 for chain in chains for n in (1, 2)]
    lines += [f"ATOM  {n:5d}  CA  {row}  1.00  0.00           C" for n, row in enumerate(rows, 1)]
    return "\n".join([*lines, "END", ""]).encode()


@pytest.mark.parametrize(("name", "layers", "axes"), [
    ("evidence-650m-l24", 33, ["fidelity", "concepts", "families", "probes", "encode", "steering"]),
    ("evidence-3b-l36", 36, ["fidelity", "concepts", "families", "probes"]),
    ("contacts-650m-l24", 33, ["fidelity", "contacts", "steering"]),
    ("interventions-3b-l36", 36, ["fidelity", "contacts", "steering"]),
    ("esmfold-3b-l36-casp14", 36, ["fidelity", "structure", "steering"]),
    ("saefold-3b-l36-matryoshka", 36, ["fidelity"]),
    ("esm2-650m-l24-topk", 33, ["fidelity"]),
])  # fmt: skip
def test_they_plan(
    plmsae: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, layers: int, axes: list[str]
) -> None:
    """A narrow model of as many layers stands for the weights, which are gigabytes."""
    if {"contacts", "structure"} & set(axes):
        for package in ("biotite", "tmtools", "transformers"):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    config = ESM2Config(num_layers=layers, d=8, num_heads=2)
    model = ESM2(config)
    model.init_weights(0)
    save_model(Store(), "narrow", dict(model.state_dict()), asdict(config), {})
    proteins = gzip.compress(b"".join(b">p%d\n%s\n" % (n, b"MKV" * (20 + n)) for n in range(200)))
    for fasta in ("uniref50-2m.fasta.gz", "uniref50-20k.fasta.gz", "uniref50-10m.fasta.gz", "mine.fasta"):
        Path(fasta).write_bytes(proteins)
    Path("casp14.fasta.gz").write_bytes(gzip.compress(b"".join(b">%s\nMKVLA\n" % target for target in CASP14)))
    Path("esmfold").mkdir()
    Path("esmfold/model.safetensors").write_bytes(b"stands for 8 GB")
    Path("uniprot_sprot.tsv.gz").write_bytes(gzip.compress(b"Entry\tSequence\tActive site\nP1\tMKV\tACT_SITE 2\n"))
    Path("go_mfo.tsv.gz").write_bytes(gzip.compress(b"P1\tGO:0003677\n"))
    for code in ("1cs4", "1fx2", "4at1"):
        Path(f"{code}.pdb.gz").write_bytes(gzip.compress(structure("AB")))
    shapes = {"encoder.weight": (32, 8), "encoder.bias": (32,), "decoder.weight": (8, 32), "bias": (8,)}
    torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, "saefold-3b-l36.ckpt")
    sets = ["--set", "model.weights=narrow"]
    text = (EXAMPLES / f"{name}.yaml").read_text()
    if "s3://" in text:  # nobody's bucket
        sets += ["--set", "embed.fasta=uniref50-10m.fasta.gz", "--set", "data_root=null"]
    for axis in ("structure", "steering"):
        if "esmfold: facebook/esmfold_v1" in text:
            sets += ["--set", f"eval.{axis}.esmfold=esmfold"]
    if "imported:" in text:
        sets += ["--set", "train.imported.weights=narrow"]
    if name == "contacts-650m-l24":  # the narrow model has no head
        sets += ["--set", "eval.contacts.methods=[jacobian]"]
    done = plmsae("run", EXAMPLES / f"{name}.yaml", "--dry-run", *sets)
    assert done.code == 0, done.err
    assert f"axes: [{', '.join(axes)}]" in done.out
    for axis in {"concepts", "families", "probes"} & set(axes):  # what it will hold, before anything exists
        assert f"{axis}, memory_bytes: " in done.out
    if "structure" in axes:
        assert "eval: 23 task(s) to do" in done.out, "fidelity, 17 targets and their means, 3 of steering, tables"
    assert not (tmp_path / "runs").exists()


def test_the_casp14_example_names_the_targets_of_the_published_test() -> None:
    chosen = load(EXAMPLES / "esmfold-3b-l36-casp14.yaml").experiment.eval
    assert chosen is not None
    assert chosen.structure is not None
    assert [one.encode() for one in chosen.structure.ids or []] == CASP14
    assert chosen.structure.esmfold == "facebook/esmfold_v1"
