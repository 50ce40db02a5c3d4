"""The axis `probes`: prepare, features by piece, regressions by piece of the targets, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.evaluation import Probes
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.runtime.task import Context, Result, Task
from plmsae_cli.store.fs import FileRecord, join

if TYPE_CHECKING:
    from plmsae_cli.evaluation.probes.features import Sides

AXIS = "probes"


def plan(scope: Scope) -> tuple[list[Task], Mapping[str, Any]]:
    """The tasks, and figures for people."""
    options = scope.options.probes
    assert options is not None
    scope.require_same_model("remove eval.probes")
    inputs = scope.contents(proteins=options.proteins, labels=options.labels)
    if options.labels is not None:  # a file that cannot be read is known before training
        from plmsae_cli.evaluation.protein_labels import require_labels

        require_labels(scope.store.local(options.labels))
    identity = scope.identity(AXIS, {"format": 2, **options.science()}, inputs)
    embedding = scope.pieces(AXIS, identity, "embed", options.tasks, 20.0, ["prepare"])
    embedded = [task.args["step"] for task in embedding]
    of = min(options.tasks, options.targets)
    fitting = scope.pieces(AXIS, identity, "fit", of, 20.0, ["prepare", *embedded], steps=embedded)
    fitted = [task.args["step"] for task in fitting]
    tasks = [
        scope.task(AXIS, identity, "prepare"),
        *embedding,
        *fitting,
        scope.task(AXIS, identity, "report", ["prepare", *fitted], 0.1, steps=fitted),
    ]
    return tasks, {
        "proteins": options.proteins,
        "labels": options.labels or "residue annotations",
        "memory_bytes": _memory(scope, options),
    }


def _memory(scope: Scope, options: Probes) -> int:
    from plmsae_cli.evaluation.expected import expected_sample
    from plmsae_cli.evaluation.probes.planning import needed
    from plmsae_cli.evaluation.proteins import read_any

    entries = read_any(scope.store.local(options.proteins))
    sample = expected_sample(entries, options.residues, options.max_length)
    return needed(sample, options.labels is not None, *scope.shape())


def work(task: Task, scope: Scope, context: Context) -> Result:
    options = scope.options.probes
    assert options is not None
    step = task.args["step"].partition("-")[0]
    if step != "fit":
        _held.clear()
    if step == "prepare":
        return Result(_prepare(scope, options))
    if step == "report":
        return Result(_report(scope, options, scope.files_of(task, task.args["steps"])))
    index, of = task.args["index"], task.args["of"]
    if step == "embed":
        return Result(_embed(scope, options, index, of, context))
    return Result(_fit(scope, options, task, context))


def _prepare(scope: Scope, options: Probes) -> list[FileRecord]:
    """The sample of proteins, who tests, and the targets."""
    import numpy as np
    import torch

    from plmsae_cli.evaluation.clusters import SHOWN, choose_method, cluster, halves
    from plmsae_cli.evaluation.probes.planning import TEST_SHARE
    from plmsae_cli.evaluation.probes.targets import find_targets
    from plmsae_cli.evaluation.protein_labels import read_labels
    from plmsae_cli.evaluation.proteins import choose, read_any
    from plmsae_cli.store.tensorfile import write_tensors

    method = choose_method(options.clusters)
    labels = read_labels(scope.store.local(options.labels)) if options.labels is not None else None
    entries = read_any(scope.store.local(options.proteins))
    chosen = choose(entries, scope.store, scope.dataset, options.max_length, leave_out=True)
    sampled = _sample(chosen.hashes_P, [len(entry.sequence) for entry in chosen.entries], options.residues)
    kept = [chosen.entries[p] for p in sampled]
    if not any(entry.features or (labels is not None and labels.get(entry.accession)) for entry in kept):
        raise UserError(
            f"nothing is known of the {len(kept):,} sampled proteins of {options.proteins}",
            "a FASTA has no annotations: set eval.probes.labels to a table of ids and labels, or name a UniProt file"
            if labels is None
            else "check that ids in eval.probes.labels are those of the proteins",
        )
    sequences = [entry.sequence for entry in kept]
    lengths_P = np.array([len(s) for s in sequences], dtype=np.int64)
    test_P = halves(cluster(sequences, method), chosen.hashes_P[sampled], lengths_P, TEST_SHARE)
    targets = find_targets(kept, labels, torch.from_numpy(test_P), options.min_instances)[: options.targets]
    if not targets:
        raise UserError(
            f"no annotation and no label occurs {options.min_instances} times in {len(kept):,} sampled proteins,"
            " with and without it both in train and in test",
            "lower eval.probes.min_instances, raise residues, or name more proteins",
        )
    facts = {
        "split": SHOWN[method],
        "proteins": {**chosen.tally, "sampled": len(kept), "train": int((~test_P).sum()), "test": int(test_P.sum())},
        "residues": int(lengths_P.sum()),
        "targets": [[target.name, target.of] for target in targets],
    }
    columns = {
        "id": [entry.accession for entry in kept],
        "sequence": sequences,
        "hash": chosen.hashes_P[sampled],
        "test": test_P,
    }
    truth = {str(number): target.y_R for number, target in enumerate(targets)}
    return [
        scope.write_table(AXIS, "chosen.parquet", columns),
        write_tensors(scope.store, scope.path(AXIS, "targets.safetensors"), truth),
        scope.write_json(AXIS, "prepared.json", facts),
    ]


def _embed(scope: Scope, options: Probes, index: int, of: int, context: Context) -> list[FileRecord]:
    """Features of every `of`-th group of proteins, of the kinds that targets are of."""
    import numpy as np
    import torch

    from plmsae_cli.evaluation.probes.features import Writer, by_protein, by_residue
    from plmsae_cli.evaluation.rows import Rows, encode_rows
    from plmsae_cli.runtime.saved import load_sae_with_facts

    sequences = scope.read_table(AXIS, "chosen.parquet")["sequence"].to_pylist()
    kinds = {kind for _, kind in scope.read_json(AXIS, "prepared.json")["targets"]}
    begin_P = np.cumsum([0, *(len(sequence) for sequence in sequences)])
    rows = Rows(scope, options.batch_tokens, context.check_stop)
    sae = load_sae_with_facts(scope.folder, scope.store).model.to(rows.device)
    folder = scope.path(AXIS, "features")
    writers = {kind: Writer(scope.store, folder, kind, f"{index}of{of}") for kind in sorted(kinds)}
    for places, x_RD in rows.activations(sequences, context.progress, index, of):
        residues = by_residue(encode_rows(sae, x_RD), sae.maximum_N, x_RD)
        if "residue" in writers:
            writers["residue"].add(int(begin_P[places[0]]), residues)
        if "protein" in writers:
            lengths_P = torch.tensor([len(sequences[p]) for p in places])
            writers["protein"].add(places[0], by_protein(residues, lengths_P, sae.num_latents))
    for writer in writers.values():
        writer.close()
    return [file for writer in writers.values() for file in writer.files]


_held: dict[tuple[str, str, str], Sides] = {}
"""Features that this process read last, for the task that follows: of run, task and kind."""


def _fit(scope: Scope, options: Probes, task: Task, context: Context) -> list[FileRecord]:
    """Every `of`-th target."""
    import torch

    from plmsae_cli.evaluation.probes.evidence import permuted, rotated
    from plmsae_cli.evaluation.probes.features import read_sides
    from plmsae_cli.evaluation.probes.fits import null, one_thread, probe
    from plmsae_cli.evaluation.probes.planning import BOOTSTRAPS
    from plmsae_cli.runtime.saved import read_sae_facts
    from plmsae_cli.store.tensorfile import TensorFile

    chosen = scope.read_table(AXIS, "chosen.parquet")
    test_P = torch.from_numpy(chosen["test"].to_numpy(zero_copy_only=False).copy())
    lengths_P = torch.tensor([len(sequence) for sequence in chosen["sequence"].to_pylist()])
    hashes_P = chosen["hash"].to_numpy()
    owners = {"residue": torch.arange(len(test_P)).repeat_interleave(lengths_P), "protein": torch.arange(len(test_P))}
    num_latents = read_sae_facts(scope.folder, scope.store)["config"]["num_latents"]
    truth = TensorFile(scope.store, scope.path(AXIS, "targets.safetensors"))
    index, of = task.args["index"], task.args["of"]
    targets = list(enumerate(scope.read_json(AXIS, "prepared.json")["targets"]))[index::of]
    targets.sort(key=lambda one: one[1][1])  # so that features of one kind alone are held
    names = scope.files_of(task, task.args["steps"])
    found: dict[str, Any] = {}
    sides: Sides | None = None
    with one_thread():
        for done, (number, (name, kind)) in enumerate(targets):
            context.check_stop()
            key = (scope.folder, task.args["stem"], kind)
            if key not in _held:
                _held.clear()
                sides = None  # else those of the other kind stay while these are read
                paths = [join(scope.folder, file) for file in names if f"/features/{kind}-" in file]
                _held[key] = read_sides(scope.store, paths, owners[kind], test_P, num_latents)
            sides = _held[key]
            y_R = truth.read(str(number))
            of_chance = rotated(y_R, lengths_P, hashes_P) if kind == "residue" else permuted(y_R)
            found[str(number)] = {
                "target": name,
                "of": kind,
                **probe(sides, y_R, options.l2, BOOTSTRAPS),
                **null(sides, of_chance, options.l2),
            }
            context.progress(done + 1, len(targets))
    return [scope.write_json(AXIS, f"fits/{index}of{of}.json", found)]


def _report(scope: Scope, options: Probes, names: Sequence[str]) -> list[FileRecord]:
    import json

    import numpy as np

    from plmsae_cli.runtime.saved import read_sae_facts

    facts = scope.read_json(AXIS, "prepared.json")
    by_number: dict[str, Any] = {}
    for name in names:
        by_number |= json.loads(scope.store.read(join(scope.folder, name)))
    found = [by_number[str(number)] for number in range(len(facts["targets"]))]

    def mean(key: str) -> float | None:
        values = [row[key] for row in found if row[key] is not None]
        return float(np.mean(values)) if values else None

    means = ("auroc_single", "auroc_all", "auroc_raw", "auroc_single_null", "auroc_all_null")
    result = {
        **{key: facts[key] for key in ("split", "proteins", "residues")},
        "l2": options.l2,
        **{f"mean_{key}": mean(key) for key in means},
        "targets": found,
    }
    best_of: dict[int, list[str]] = {}
    for row in found:
        best_of.setdefault(row["latent"], []).append(row["target"])
    num_latents = read_sae_facts(scope.folder, scope.store)["config"]["num_latents"]
    latents = {
        "latent": list(range(num_latents)),
        "probe_targets": ["; ".join(best_of[n]) if n in best_of else None for n in range(num_latents)],
    }
    chosen = scope.read_table(AXIS, "chosen.parquet")
    proteins = {
        "id": chosen["id"],
        "length": [len(sequence) for sequence in chosen["sequence"].to_pylist()],
        "in_training": [False] * len(chosen),  # those were left out
        "probes_half": ["test" if t else "train" for t in chosen["test"].to_pylist()],
    }
    return [
        scope.write_json(AXIS, "result.json", result),
        scope.write_table(AXIS, "latents.parquet", latents),
        scope.write_table(AXIS, "proteins.parquet", proteins),
    ]


def _sample(hashes_P: Any, lengths: list[int], residues: int) -> list[int]:
    """Whole proteins in the order of their hashes, until so many residues are taken."""
    taken: list[int] = []
    used = 0
    for p in sorted(range(len(lengths)), key=lambda p: int(hashes_P[p])):
        if used >= residues:
            break
        taken.append(p)
        used += lengths[p]
    return taken
