"""The axis `probes`: one task, which embeds a sample of the proteins and fits regressions on their latents."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.evaluation import Probes
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.runtime.task import Context, Result, Task

if TYPE_CHECKING:
    from torch import Tensor

    from plmsae_cli.evaluation.probes.logistic import Sparse

AXIS = "probes"
TEST_SHARE = 0.2
BOOTSTRAPS = 1000
"""Draws of test proteins for the intervals."""
ENTRY, ACTIVE = 80, 64
"""Bytes of an active latent of a residue (row, column and value, once more by half, and as compressed rows both ways), and how
many are reckoned with, in the plan."""


def plan(scope: Scope) -> tuple[list[Task], Mapping[str, Any]]:
    """The task, and figures for people."""
    options = scope.options.probes
    assert options is not None
    scope.require_same_model("remove eval.probes")
    inputs = scope.contents(proteins=options.proteins, labels=options.labels)
    identity = scope.identity(AXIS, options.science(), inputs)
    shown = {
        "proteins": options.proteins,
        "labels": options.labels or "residue annotations",
        "memory_bytes": ENTRY * ACTIVE * options.residues,
    }
    return [scope.task(AXIS, identity, cost=10.0)], shown


@dataclass(frozen=True)
class Target:
    """A yes or no about rows: residues, or proteins."""

    name: str
    of: str
    y_R: Tensor


def work(task: Task, scope: Scope, context: Context) -> Result:
    import numpy as np
    import torch

    from plmsae_cli.evaluation.clusters import SHOWN, choose_method, cluster, halves
    from plmsae_cli.evaluation.probes.evidence import permuted, rotated
    from plmsae_cli.evaluation.proteins import choose, read_any
    from plmsae_cli.runtime.saved import load_sae_with_facts

    options = scope.options.probes
    assert options is not None
    entries = read_any(scope.store.local(options.proteins))
    chosen = choose(entries, scope.store, scope.dataset, options.max_length, leave_out=True)
    sampled = _sample(chosen.hashes_P, [len(entry.sequence) for entry in chosen.entries], options.residues)
    kept = [chosen.entries[p] for p in sampled]
    sequences = [entry.sequence for entry in kept]
    method = choose_method(options.clusters)
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    hashes_P = chosen.hashes_P[sampled]
    test_P = torch.from_numpy(halves(cluster(sequences, method), hashes_P, lengths, TEST_SHARE))
    sae = load_sae_with_facts(scope.folder, scope.store).model
    targets = _targets(scope, options, kept, sequences)
    lengths_P = torch.from_numpy(lengths)
    owners = {"residue": torch.arange(len(kept)).repeat_interleave(lengths_P), "protein": torch.arange(len(kept))}
    features = _features(scope, sae, sequences, {target.of for target in targets}, options, context)
    sides = {of: _Sides.cut(x, owners[of], test_P) for of, x in features.items()}
    found = []
    best_of: dict[int, list[str]] = {}
    for done, target in enumerate(targets):
        context.check_stop()
        side = sides[target.of]
        row = _probe(side, target.y_R, options.l2)
        if row is not None:
            of_chance = rotated(target.y_R, lengths_P, hashes_P) if target.of == "residue" else permuted(target.y_R)
            null = _probe(side, of_chance, options.l2, draws=0) or {}
            nulls = {f"{key}_null": null.get(key) for key in ("auroc_single", "auroc_all")}
            found.append({"target": target.name, "of": target.of, **row, **nulls})
            best_of.setdefault(row["latent"], []).append(target.name)
        context.progress(1 + (done + 1) / len(targets), 2)
    if not found:
        raise UserError(
            f"none of {len(targets)} targets has both kinds of rows in train and in test",
            "lower eval.probes.min_instances, raise residues, or name more proteins",
        )

    def mean(key: str) -> float | None:
        values = [row[key] for row in found if row[key] is not None]
        return float(np.mean(values)) if values else None

    result = {
        "split": SHOWN[method],
        "proteins": {**chosen.tally, "sampled": len(kept), "train": int((~test_P).sum()), "test": int(test_P.sum())},
        "residues": int(lengths.sum()),
        "l2": options.l2,
        "mean_auroc_single": mean("auroc_single"),
        "mean_auroc_all": mean("auroc_all"),
        "mean_auroc_single_null": mean("auroc_single_null"),
        "mean_auroc_all_null": mean("auroc_all_null"),
        "targets": found,
    }
    latents = {
        "latent": list(range(sae.num_latents)),
        "probe_targets": ["; ".join(best_of[n]) if n in best_of else None for n in range(sae.num_latents)],
    }
    return Result([scope.write_json(AXIS, "result.json", result), scope.write_table(AXIS, "latents.parquet", latents)])


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


def _features(
    scope: Scope, sae: Any, sequences: list[str], kinds: Collection[str], options: Probes, context: Context
) -> dict[str, Sparse]:
    """Of the kinds asked for: activation / maximum of each residue [R, N] (`residue`), the largest in each protein [P, N]
    (`protein`)."""
    import torch

    from plmsae_cli.evaluation.probes.logistic import Sparse
    from plmsae_cli.evaluation.rows import Rows

    rows = Rows(scope, options.batch_tokens, context.check_stop)
    sae = sae.to(rows.device)
    scale_N = torch.where(sae.maximum_N > 0, sae.maximum_N, 1.0)
    parts: dict[str, list[tuple[Tensor, ...]]] = {kind: [] for kind in kinds}
    first = 0

    def progress(done: float, total: float) -> None:  # embedding is the first half of the task
        context.progress(done / total, 2)

    for places, latents in rows.encoded(sae, sequences, progress):
        value_RK = (latents.acts_BK / scale_N[latents.indices_BK]).double().cpu()
        index_RK = latents.indices_BK.cpu()
        row_Q, slot_Q = (value_RK > 0).nonzero(as_tuple=True)
        entries = (row_Q + first, index_RK[row_Q, slot_Q], value_RK[row_Q, slot_Q])
        first += len(value_RK)
        if "residue" in parts:
            parts["residue"].append(entries)
        if "protein" not in parts:
            continue
        lengths = torch.tensor([len(sequences[p]) for p in places])
        owner_Q = torch.arange(len(places)).repeat_interleave(lengths)[row_Q]
        best = torch.zeros(len(places), sae.num_latents, dtype=torch.float64)
        best.view(-1).scatter_reduce_(0, owner_Q * sae.num_latents + entries[1], entries[2], "amax")
        protein_Q, latent_Q = best.nonzero(as_tuple=True)
        parts["protein"].append((protein_Q + places[0], latent_Q, best[protein_Q, latent_Q]))

    rows_of = {"residue": first, "protein": len(sequences)}
    joined = {}
    for kind, many in parts.items():
        row_Q, latent_Q, value_Q = (torch.cat(column) for column in zip(*many, strict=True))
        joined[kind] = Sparse(row_Q, latent_Q, value_Q, rows_of[kind], sae.num_latents)
    return joined


def _targets(scope: Scope, options: Probes, kept: list[Any], sequences: list[str]) -> list[Target]:
    """Kinds of annotation by residue, labels by protein: the most frequent."""
    import numpy as np
    import torch

    from plmsae_cli.evaluation.concepts.vocabulary import find_concepts
    from plmsae_cli.evaluation.protein_labels import classes, labels_of, read_labels

    labels = find_concepts(kept, "strict", options.min_instances)
    offset_P = np.cumsum([0, *(len(s) for s in sequences)])
    counted: list[tuple[int, Target]] = []
    for number, concept in enumerate(labels.concepts):
        if concept.name not in (concept.kind, f"{concept.kind}: any"):
            continue
        y_R = torch.zeros(int(offset_P[-1]), dtype=torch.bool)
        mine = np.flatnonzero(labels.concept_M == number)
        for m in mine:
            first = int(offset_P[labels.protein_M[m]])
            y_R[first + int(labels.start_M[m]) : first + int(labels.stop_M[m])] = True
        counted.append((len(np.unique(labels.instance_M[mine])), Target(concept.kind, "residue", y_R)))
    if options.labels is not None:
        table = read_labels(scope.store.local(options.labels))
        names, y_PL = classes(labels_of([entry.accession for entry in kept], table), options.min_instances)
        counted += [
            (int(y_PL[:, number].sum()), Target(name, "protein", torch.from_numpy(y_PL[:, number].copy())))
            for number, name in enumerate(names)
        ]
    counted.sort(key=lambda one: -one[0])
    if not counted:
        raise UserError(
            f"no annotation and no label occurs {options.min_instances} times in {len(kept):,} sampled proteins",
            "lower eval.probes.min_instances, or raise residues",
        )
    return [target for _, target in counted[: options.targets]]


@dataclass(frozen=True)
class _Sides:
    """Features of train and of test rows, which all targets of a kind share."""

    test_R: Tensor
    train: Sparse
    test: Sparse
    protein_R: Tensor
    """Of each test row, from 0."""

    @classmethod
    def cut(cls, x: Sparse, owner_R: Tensor, test_P: Tensor) -> _Sides:
        """`owner_R` is each row's protein."""
        test_R = test_P[owner_R]
        return cls(test_R, x.some(~test_R), x.some(test_R), (test_P.cumsum(0) - 1)[owner_R[test_R]])


def _probe(sides: _Sides, y_R: Tensor, l2: float, draws: int = BOOTSTRAPS) -> dict[str, Any] | None:
    """The best single latent by its loss on train, and all latents, both scored on test; None where a side has one kind.

    With `draws`, areas have intervals over test proteins.
    """
    from plmsae_cli.evaluation.probes.evidence import auroc_interval
    from plmsae_cli.evaluation.probes.logistic import fit_all, fit_each, log_loss, ranking

    train, test = sides.train, sides.test
    y_train, y_test = y_R[~sides.test_R], y_R[sides.test_R]
    if not all(bool(y.any()) and not bool(y.all()) for y in (y_train, y_test)):
        return None
    w_N, b_N, loss_N = fit_each(train, y_train, l2)
    latent = int(loss_N.argmin())
    weights_N, intercept = fit_all(train, y_train, l2)
    row: dict[str, Any] = {
        "rows_train": len(y_train),
        "rows_test": len(y_test),
        "positives_train": int(y_train.sum()),
        "positives_test": int(y_test.sum()),
        "latent": latent,
        "weight": float(w_N[latent]),
    }
    of_each = {"single": w_N[latent] * test.column(latent) + b_N[latent], "all": test.csr @ weights_N + intercept}
    for kind, z_R in of_each.items():
        row[f"auroc_{kind}"], row[f"auprc_{kind}"] = ranking(z_R, y_test)
        row[f"loss_{kind}"] = log_loss(z_R, y_test)
        if draws:
            row[f"interval_auroc_{kind}"] = auroc_interval(z_R, y_test, sides.protein_R, draws)
    return row
