"""The axis `families`: prepare, largest activations and patterns by piece, match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.evaluation import Families
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.runtime.task import Context, Result, Task
from plmsae_cli.store.fs import FileRecord, join

AXIS = "families"
SPECIFIC = 0.7
"""F1 above which a latent is family-specific."""
FOUND = 0.5
"""F1 above which a class counts as found by its latent."""
EACH_HALF = 0.25
"""Of `min_proteins`, how many a class needs in either half: a class of one cluster has nothing to find, or to score."""
LISTED = 100
"""Latents shown with their families, those that fit best on train."""
SEED = 0
"""Of the permutation of labels, and of the draws for intervals."""


def plan(scope: Scope) -> tuple[list[Task], Mapping[str, Any]]:
    """The tasks, and figures for people."""
    options = scope.options.families
    assert options is not None
    scope.require_same_model("remove eval.families")
    inputs = scope.contents(proteins=options.proteins, labels=options.labels)
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
    return Result(_match(scope, options, scope.files_of(task, task.args["steps"]), context))


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


def _match(scope: Scope, options: Families, names: Sequence[str], context: Context) -> list[FileRecord]:
    import numpy as np
    import torch

    from plmsae_cli.evaluation.families.largest import Reader
    from plmsae_cli.evaluation.families.matching import Match, intervals, match, tile_latents
    from plmsae_cli.evaluation.families.patterns import PATTERNS, Patterns
    from plmsae_cli.evaluation.protein_labels import classes
    from plmsae_cli.runtime.device import pick_device
    from plmsae_cli.store.tensorfile import TensorFile

    device = pick_device()
    top = options.top if options.mode == "strict" else None
    facts = scope.read_json(AXIS, "prepared.json")
    chosen = scope.read_table(AXIS, "chosen.parquet")
    found, y_PL = classes([set(one) for one in chosen["labels"].to_pylist()], 1)
    assert found == facts["classes"]
    test_P = torch.from_numpy(chosen["test"].to_numpy(zero_copy_only=False).copy()).to(device)
    paths = {kind: [join(scope.folder, n) for n in names if f"/{kind}/" in n] for kind in ("activations", "patterns")}
    counted = [TensorFile(scope.store, path) for path in paths["patterns"]]
    num_latents = counted[0].shape("active_N")[0]
    patterns = Patterns(num_latents)
    for file in counted:
        for name, value in patterns.state().items():
            value += file.read(name)
    truth_PL = torch.from_numpy(y_PL).to(device)
    generator = torch.Generator().manual_seed(SEED)
    permuted_PL = truth_PL[torch.randperm(len(truth_PL), generator=generator).to(device)]
    reader = Reader(scope.store, paths["activations"], len(truth_PL))
    tile = tile_latents(len(truth_PL), truth_PL.shape[1], top or 1)
    matched: list[Match] = []
    permuted: list[Match] = []
    for first in range(0, num_latents, tile):
        context.check_stop()
        last = min(first + tile, num_latents)
        acts_nP = reader.tile(first, last).to(device)
        matched.append(match(acts_nP, truth_PL, test_P, top))
        permuted.append(match(acts_nP, permuted_PL, test_P, top))
        context.progress(last, num_latents)
    ours, null = (
        {k: torch.cat([vars(m)[k] for m in many]).cpu() for k in vars(many[0])} for many in (matched, permuted)
    )
    classes_N = ours["class_N"].tolist()
    pattern_N = patterns.classes()

    def column(name: str) -> list[float | None]:
        return [v if c >= 0 else None for v, c in zip(ours[name].tolist(), classes_N, strict=True)]

    def scored(one: Mapping[str, Any]) -> Any:
        return torch.where(one["class_N"] >= 0, one["f1_N"], 0.0)

    share_L = truth_PL[test_P].double().mean(0)
    chance_L = (2 * share_L / (1 + share_L)).tolist()

    def rows(latents: Sequence[int]) -> list[dict[str, Any]]:
        ends = intervals(ours, latents, int(test_P.sum()), SEED)
        return [
            {
                "latent": n,
                "family": found[classes_N[n]],
                "proteins": int(y_PL[:, classes_N[n]].sum()),
                "pattern": PATTERNS[int(pattern_N[n])],
                **{key: float(ours[f"{key}_N"][n]) for key in ("threshold", "f1_train", "precision", "recall", "f1")},
                "interval_f1": ends[place],
                "chance": chance_L[classes_N[n]],
            }
            for place, n in enumerate(latents)
        ]

    of_class, of_class_null = (_best_of_classes(one) for one in (ours, null))
    order = sorted((n for n in range(num_latents) if classes_N[n] >= 0), key=lambda n: -float(ours["f1_train_N"][n]))
    specific_N = scored(ours) > SPECIFIC
    result = {
        **{key: facts[key] for key in ("mode", "split", "clusters", "proteins", "labelled")},
        "classes": len(found),
        "found": sum(float(ours["f1_N"][n]) > FOUND for n in of_class),
        "found_permuted": sum(float(null["f1_N"][n]) > FOUND for n in of_class_null),
        "specific": int(specific_N.sum()),
        "specific_families": len({classes_N[n] for n in np.flatnonzero(specific_N.numpy())}),
        "specific_permuted": int((scored(null) > SPECIFIC).sum()),
        "patterns": {name: int((pattern_N == i).sum()) for i, name in enumerate(PATTERNS)},
        "histogram": _histogram(scored(ours)[ours["class_N"] >= 0]),
        "histogram_permuted": _histogram(scored(null)[null["class_N"] >= 0]),
        "best": rows(order[:LISTED]),
        "by_class": sorted(rows(of_class), key=lambda row: -row["f1"]),
    }
    latents = {
        "latent": list(range(num_latents)),
        "pattern": [PATTERNS[p] for p in pattern_N.tolist()],
        "family": [found[c] if c >= 0 else None for c in classes_N],
        "family_f1": column("f1_N"),
        "family_f1_train": column("f1_train_N"),
        "family_precision": column("precision_N"),
        "family_recall": column("recall_N"),
        "family_threshold": column("threshold_N"),
    }
    proteins = {
        "id": chosen["id"],
        "length": [len(s) for s in chosen["sequence"].to_pylist()],
        "in_training": chosen["in_training"],
        "families": chosen["labels"],
        "families_half": ["test" if t else "train" for t in test_P.tolist()],
    }
    return [
        scope.write_json(AXIS, "result.json", result),
        scope.write_table(AXIS, "latents.parquet", latents),
        scope.write_table(AXIS, "proteins.parquet", proteins),
    ]


def _best_of_classes(match: Mapping[str, Any]) -> list[int]:
    """Of each class that is some latent's, the latent that fits it best on train; the first of equals."""
    best: dict[int, int] = {}
    f1_N = match["f1_train_N"].tolist()
    for n, c in enumerate(match["class_N"].tolist()):
        if c >= 0 and (c not in best or f1_N[n] > f1_N[best[c]]):
            best[c] = n
    return list(best.values())


def _histogram(values: Any) -> list[int]:
    """Numbers of values in twenty bins of 0 to 1."""
    import torch

    counts: list[int] = torch.bincount((values * 20).long().clamp(0, 19), minlength=20).tolist()
    return counts
