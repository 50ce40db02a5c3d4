"""All axes by one process and by two: the same figures, to the byte."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_eval_interventions import write_structure
from tests.cli.test_eval_pieces import found, write_proteins

pytest.importorskip("biotite")
EVAL = """
eval:
  fidelity: {{proteins: 8}}
  concepts: {{annotations: {0}/t.tsv, min_instances: 5, keep_instances: 5, clusters: kmer, bootstraps: 50, tasks: 2,
    nulls: [residual, shuffled]}}
  families: {{proteins: {0}/t.tsv, labels: {0}/labels.tsv, clusters: kmer, top: 4, tasks: 2}}
  probes: {{proteins: {0}/t.tsv, labels: {0}/labels.tsv, clusters: kmer, min_instances: 5, tasks: 2}}
  encode: {{fasta: {0}/t.tsv, tasks: 2}}
  contacts: {{structures: [{0}/a.pdb, {0}/b.pdb], tasks: 2}}
  steering: {{top: 2, proteins: 6}}
"""


@pytest.mark.slow
def test_two_processes_measure_what_one_does(
    plmsae: Callable[..., Any], write: Callable[..., Path], tmp_path: Path
) -> None:
    write_proteins(tmp_path, 400)  # more residues than a group has, so that both have something to do
    draw = random.Random(0)
    for seed, name in enumerate("ab"):
        write_structure(tmp_path / f"{name}.pdb", "".join(draw.choices("ACDEFGHIKLMNPQRSTVWY", k=40)), seed)
    assert plmsae("run", write(evaluation=""), "--no-progress").code == 0
    run = tmp_path / "runs" / "one"
    results = []
    for workers in (1, 2):
        shutil.rmtree(run / "eval", ignore_errors=True)
        launch = f"launch: {{gpus: 0, workers: {workers}}}\n"
        done = plmsae("eval", write(evaluation=EVAL.format(tmp_path), more=launch), "--no-progress")
        assert done.code == 0, done.err
        results.append(
            found(run) | {name: (run / "eval" / name).read_bytes() for name in ("steering/effects.parquet",)}
        )
    files = [path.name for path in (run / "eval" / "probes" / "features").iterdir()]
    assert sorted({name.split("-")[1] for name in files}) == ["0of2", "1of2"]
    assert [name for name in results[0] if results[0][name] != results[1][name]] == []
