"""Every axis that cuts its proteins into pieces: the same bytes for any number of them, in any order, each killed once."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from plmsae_cli.config.yaml import load
from plmsae_cli.evaluation import rows
from plmsae_cli.evaluation.concepts import scoring, sources
from plmsae_cli.evaluation.families import largest
from plmsae_cli.evaluation.probes import features
from plmsae_cli.executors.pipeline import plan_stage
from plmsae_cli.executors.worker import LocalContext, run_task, work_on
from plmsae_cli.store.fs import Store

Plmsae = Callable[..., Any]
TABLES = (
    "metrics.json", "latents.parquet", "latent_concepts.parquet", "concepts.csv", "proteins.parquet", "top_latents.parquet",
    "model_card.md",
)  # fmt: skip
EVAL = """
eval:
  fidelity: {{loss_recovered: false}}
  concepts: {{annotations: {folder}/t.tsv, min_instances: 5, keep_instances: 5, clusters: kmer, bootstraps: 50, tasks: {tasks},
    nulls: [residual, shuffled], memory: {memory}}}
  families: {{proteins: {folder}/t.tsv, labels: {folder}/labels.tsv, clusters: kmer, top: 4, tasks: {tasks}}}
  probes: {{proteins: {folder}/t.tsv, labels: {folder}/labels.tsv, clusters: kmer, min_instances: 5, tasks: {tasks}}}
  encode: {{fasta: {folder}/t.tsv, tasks: {tasks}}}
"""


def write_proteins(folder: Path, count: int = 40) -> None:
    """So many proteins of 20 to 90 residues; W is an active site in two of three, C the middle of a domain."""
    draw = random.Random(0)
    lines, labels = ["Entry\tSequence\tActive site\tDomain [FT]"], []
    for number in range(count):
        text = "".join(draw.choices("ACDEFGHIKLMNPQRSTVWY", k=draw.randint(20, 90)))
        sites = "; ".join(
            f'ACT_SITE {i}; /note="Nucleophile"' for i, a in enumerate(text, 1) if a == "W" and draw.random() < 0.7
        )
        places = [(max(1, i - 2), min(len(text), i + 2)) for i, a in enumerate(text, 1) if a == "C"]
        domains = "; ".join(f'DOMAIN {a}..{b}; /note="SH3"' for a, b in places)
        lines.append(f"P{number}\t{text}\t{sites}\t{domains}")
        labels.append(f"P{number}\t{'even' if number % 2 == 0 else 'odd'}; all")
    (folder / "t.tsv").write_text("\n".join(lines) + "\n")
    (folder / "labels.tsv").write_text("\n".join(labels) + "\n")


def found(run: Path) -> dict[str, Any]:
    """The tables, and the activations of encoded proteins, whose files follow the pieces."""
    activations = pq.read_table(run / "eval" / "encode" / "activations").to_pylist()
    rows = sorted(tuple(row.values()) for row in activations)
    return {"activations": rows, **{name: (run / "eval" / name).read_bytes() for name in TABLES}}


def test_neither_the_number_of_pieces_nor_their_order_nor_kills_change_a_byte(
    plmsae: Plmsae, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rows, scoring, sources):  # so that 40 proteins are many groups
        monkeypatch.setattr(module, "group_residues", lambda _: 200)
    write_proteins(tmp_path)
    assert plmsae("run", write(evaluation=""), "--no-progress").code == 0
    run = tmp_path / "runs" / "one"
    results = []
    for tasks, memory in ((1, "8GB"), (2, "8GB"), (4, "30kB")):
        shutil.rmtree(run / "eval", ignore_errors=True)
        experiment = load(write(evaluation=EVAL.format(folder=tmp_path, tasks=tasks, memory=memory))).experiment
        if tasks == 4:
            for module in (largest, features):
                monkeypatch.setattr(module, "BLOCK_BYTES", 500)
        context = LocalContext(experiment, lambda *_, **__: None)
        left = list(plan_stage("eval", experiment, Store()).tasks)
        axes = {task.args["axis"] for task in left}
        assert axes == {"fidelity", "concepts", "families", "probes", "encode", "merge"}
        done: set[str] = set()
        while left:  # the last of those that may begin: another order than the planner's
            task = [task for task in left if set(task.needs) <= done][-1]
            if tasks > 1:
                work_on(task, context)  # killed before its record
            run_task(task, context)
            left.remove(task)
            done.add(task.id)
        results.append(found(run))
        assert plan_stage("eval", experiment, Store()).tasks == []
    for kept in ("families/activations", "probes/features"):
        assert len(list((run / "eval" / kept).iterdir())) > 4
    for other in results[1:]:
        assert [name for name in other if other[name] != results[0][name]] == []
