"""The axis `families`: prepare, largest activations and patterns by piece, match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.evaluation import Families
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.runtime.task import Context, Result, Task
from plmsae_cli.store.fs import FileRecord

AXIS = "families"
EACH_HALF = 0.25
"""Of `min_proteins`, how many a class needs in either half: a class of one cluster has nothing to find, or to score."""


def plan(scope: Scope) -> tuple[list[Task], Mapping[str, Any]]:
    """The tasks, and figures for people."""
    options = scope.options.families
    assert options is not None
    scope.require_same_model("remove eval.families")
    inputs = scope.contents(proteins=options.proteins, labels=options.labels)
    if options.labels is not None:  # a file that cannot be read is known before training
        from plmsae_cli.evaluation.protein_labels import require_labels

        require_labels(scope.store.local(options.labels))
    identity = scope.identity(AXIS, {"format": 2, **options.science()}, inputs)
    pieces = scope.pieces(AXIS, identity, "embed", options.tasks, 20.0, ["prepare"])
    steps = [piece.args["step"] for piece in pieces]
    tasks = [scope.task(AXIS, identity, "prepare"), *pieces]
    tasks.append(scope.task(AXIS, identity, "match", ["prepare", *steps], 4.0, steps=steps))
    return tasks, {
        "proteins": options.proteins,
        "labels": options.labels or "Pfam",
        "mode": options.mode,
        "memory_bytes": _memory(scope, options),
    }


def _memory(scope: Scope, options: Families) -> int:
    """Bytes that matching holds, beside two tables of one byte a protein and class."""
    import sys

    from plmsae_cli.evaluation.expected import PROGRAM, expected_sample
    from plmsae_cli.evaluation.families.matching import PAIR, TILE
    from plmsae_cli.evaluation.proteins import read_any

    entries = read_any(scope.store.local(options.proteins))
    proteins = expected_sample(entries, sys.maxsize, options.max_length).proteins
    return PROGRAM + PAIR * min(TILE, proteins * scope.shape()[1])


def work(task: Task, scope: Scope, context: Context) -> Result:
    options = scope.options.families
    assert options is not None
    step = task.args["step"].partition("-")[0]
    if step == "prepare":
        return Result(_prepare(scope, options))
    if step == "embed":
        return Result(_embed(scope, options, task.args["index"], task.args["of"], context))
    from plmsae_cli.evaluation.families.outcome import match_all

    return Result(match_all(scope, options, scope.files_of(task, task.args["steps"]), context))


def _prepare(scope: Scope, options: Families) -> list[FileRecord]:
    import numpy as np

    from plmsae_cli.evaluation.clusters import SHOWN, choose_method, cluster, halves
    from plmsae_cli.evaluation.protein_labels import classes, labels_of, read_labels
    from plmsae_cli.evaluation.proteins import choose, read_any

    entries = read_any(scope.store.local(options.proteins))
    chosen = choose(entries, scope.store, scope.dataset, options.max_length, leave_out=options.mode == "strict")
    sequences = [entry.sequence for entry in chosen.entries]
    if options.labels is None:
        labels: Sequence[set[str]] = [set(entry.families) for entry in chosen.entries]
    else:
        table = read_labels(scope.store.local(options.labels))
        labels = labels_of([entry.accession for entry in chosen.entries], table)
    if not any(labels):
        raise UserError(
            f"none of the {len(sequences):,} proteins of {options.proteins} has a label",
            "check that ids in eval.families.labels are those of the proteins"
            if options.labels
            else "a FASTA has no Pfam families: set eval.families.labels to a table of ids and labels",
        )
    method = choose_method(options.clusters)
    cluster_P = cluster(sequences, method)
    test_P = halves(cluster_P, chosen.hashes_P, np.ones(len(sequences), dtype=np.int64))
    names, y_PL = classes(labels, options.min_proteins)
    if options.mode == "strict":
        enough_L = np.minimum(y_PL[test_P].sum(0), y_PL[~test_P].sum(0)) >= EACH_HALF * options.min_proteins
        names = [name for name, enough in zip(names, enough_L, strict=True) if enough]
    if not names:
        raise UserError(
            f"no label has {options.min_proteins} of the {len(sequences):,} proteins, and a fourth of that in either half;"
            f" {sum(bool(one) for one in labels):,} of them have a label",
            "lower eval.families.min_proteins, or name more proteins",
        )
    kept = set(names)
    facts = {
        "mode": options.mode,
        "split": SHOWN[method],
        "clusters": len(np.unique(cluster_P)),
        "proteins": {**chosen.tally, "train": int((~test_P).sum()), "test": int(test_P.sum())},
        "labelled": sum(bool(one) for one in labels),
        "classes": names,
    }
    return [
        scope.write_table(
            AXIS,
            "chosen.parquet",
            {
                "id": [entry.accession for entry in chosen.entries],
                "sequence": sequences,
                "in_training": chosen.trained_P,
                "test": test_P,
                "labels": [sorted(one & kept) for one in labels],
            },
        ),
        scope.write_json(AXIS, "prepared.json", facts),
    ]


def _embed(scope: Scope, options: Families, index: int, of: int, context: Context) -> list[FileRecord]:
    """Every `of`-th group of proteins: largest activations in files of bounded size, and counts of patterns."""
    import torch

    from plmsae_cli.evaluation.families.largest import Writer, largest
    from plmsae_cli.evaluation.families.patterns import Patterns
    from plmsae_cli.evaluation.rows import Rows
    from plmsae_cli.runtime.saved import load_sae_with_facts
    from plmsae_cli.store.tensorfile import write_tensors

    sequences = scope.read_table(AXIS, "chosen.parquet")["sequence"].to_pylist()
    rows = Rows(scope, options.batch_tokens, context.check_stop)
    sae = load_sae_with_facts(scope.folder, scope.store).model.to(rows.device)
    patterns = Patterns(sae.num_latents, rows.device)
    writer = Writer(scope.store, scope.path(AXIS, "activations"), f"{index}of{of}")
    for places, latents in rows.encoded(sae, sequences, context.progress, index, of):
        lengths = torch.tensor([len(sequences[p]) for p in places])
        patterns.add(latents, sae.maximum_N, lengths)
        writer.add(places, largest(latents, sae.maximum_N, lengths))
    writer.close()
    counts = {name: value.cpu() for name, value in patterns.state().items()}
    file = write_tensors(scope.store, scope.path(AXIS, "patterns", f"{index}of{of}.safetensors"), counts)
    return [*writer.files, file]
