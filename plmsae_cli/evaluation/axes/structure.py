"""The axis `structure`: every protein folded in every way, by piece, then means over proteins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.frame import Scope, csv_of
from plmsae_cli.evaluation.structure.outcome import FIGURES, KEYS, finite, summary
from plmsae_cli.runtime.task import Context, Result, Task
from plmsae_cli.store.fs import FileRecord, join

if TYPE_CHECKING:
    from plmsae_cli.config.structure import Structure
    from plmsae_cli.evaluation.structure.esmfold import Fold
    from plmsae_cli.evaluation.structure.proteins import Protein

AXIS = "structure"
FIELD = "eval.structure.esmfold"
PLAIN = "plain"
"""The mode of a fold with all hidden states as they are."""
COLUMNS = ("id", "length", "in_training", *KEYS, *FIGURES)
"""Of folds.parquet and folds.csv."""


def plan(scope: Scope) -> tuple[list[Task], Mapping[str, Any]]:
    """The tasks, and figures for people."""
    from plmsae_cli.evaluation.structure.esmfold import identity as folder_identity
    from plmsae_cli.evaluation.structure.proteins import contents, pieces, require_named

    options = scope.options.structure
    assert options is not None
    scope.require_same_model("remove eval.structure")
    _require_sweeps(scope, options)
    model = folder_identity(options.esmfold, scope.experiment.model.weights, scope.store, FIELD)
    identity = scope.identity(AXIS, options.science(), {"esmfold": model, **contents(scope, options)})
    parts = scope.pieces(AXIS, identity, "part", pieces(scope, options), 60.0)
    report = scope.task(AXIS, identity, "report", [part.args["step"] for part in parts], of=len(parts))
    if not scope.recorded(report):
        require_named(scope, options)
    sources = [*options.structures, *([options.fasta] if options.fasta else [])]
    return [*parts, report], {
        "proteins of": ", ".join(sources),
        "esmfold": options.esmfold,
        "modes": ", ".join(options.modes),
    }


def _require_sweeps(scope: Scope, options: Structure) -> None:
    """Raises UserError, before anything is trained, where the dictionary will have no k or no nested groups."""
    train = scope.experiment.train
    if train is None or train.imported is not None:  # known once it is read
        return
    architecture = train.autoencoder().architecture
    if options.k and "topk" not in architecture:
        raise UserError(f"eval.structure.k: {architecture} has no number of active latents", "remove k")
    if options.prefixes and not architecture.startswith("matryoshka"):
        raise UserError(f"eval.structure.prefixes: {architecture} has no nested groups", "remove prefixes")


def work(task: Task, scope: Scope, context: Context) -> Result:
    options = scope.options.structure
    assert options is not None
    if task.args["step"] == "report":
        return _report(scope, options, task.args["of"])
    return _part(scope, options, task.args["index"], task.args["of"], context)


def _part(scope: Scope, options: Structure, index: int, of: int, context: Context) -> Result:
    """Every `of`-th protein: a row a fold."""
    from plmsae_cli.evaluation.structure.proteins import proteins

    mine = list(enumerate(proteins(scope, options)))[index::of]
    rows: list[dict[str, Any]] = []
    files: list[FileRecord] = []
    if mine:
        measure = _Measure(scope, options, context)
        for done, (place, protein) in enumerate(mine):
            found = list(measure.protein(protein, place, files))
            about = {"id": protein.id, "length": len(protein.sequence), "in_training": protein.in_training}
            rows += [{"place": place, **about, **row} for row in found]
            context.progress(done + 1, len(mine))
    body = {"rows": rows, "spliced_identity": measure.identity if mine else None}
    return Result([*files, scope.write_json(AXIS, f"parts/{index}of{of}.json", body)])


class _Measure:
    """The folding model and everything that is spliced into it."""

    def __init__(self, scope: Scope, options: Structure, context: Context) -> None:
        from plmsae_cli.evaluation.structure.esmfold import shared
        from plmsae_cli.evaluation.structure.replacements import replacements
        from plmsae_cli.runtime.saved import load_sae_with_facts
        from plmsae_cli.store.activations import Statistics

        self.scope, self.options, self.check_stop = scope, options, context.check_stop
        self.layer: int = scope.made()["layer"]
        weights = scope.experiment.model.weights
        self.folder = shared(options.esmfold, weights, scope.store, options.recycles, self.layer, FIELD)
        device = self.folder.device
        sae = load_sae_with_facts(scope.folder, scope.store).model.to(device)
        mean_D = Statistics.read(scope.store, join(scope.dataset, "stats.safetensors")).mean_D.float().to(device)
        self.replacements = replacements(sae, mean_D, options.k, options.prefixes)
        self.identity: bool | None = None

    def protein(self, protein: Protein, place: int, files: list[FileRecord]) -> Iterator[dict[str, Any]]:
        """A row a fold; predictions as they are and with the dictionary become PDB files, added to `files`."""
        import numpy as np
        import torch

        from plmsae_cli.evaluation.structure.splicing import spliced

        original = self.folder.fold(protein.sequence)
        yield self._row(PLAIN, "original", None, original, original, protein)
        files.append(self._save(place, "original", original))
        if self.identity is None:
            with spliced(self.folder.trunk, self.layer, "propagated", torch.clone):
                again = self.folder.fold(protein.sequence)
            self.identity = bool(np.array_equal(again.alpha_L3, original.alpha_L3))
        for mode in self.options.modes:
            for variant, number, value in self.replacements:
                if variant == "original" and mode != "isolated":  # which is the prediction as it is
                    continue
                self.check_stop()
                with spliced(self.folder.trunk, self.layer, mode, value):
                    fold = self.folder.fold(protein.sequence)
                row = self._row(mode, variant, number, fold, original, protein)
                yield row | {"fvu": getattr(value, "fvu", None), "l0": getattr(value, "l0", None)}
                if variant == "sae":
                    files.append(self._save(place, f"{mode}.sae", fold))

    def _row(
        self, mode: str, variant: str, number: int | None, fold: Fold, original: Fold, protein: Protein
    ) -> dict[str, Any]:
        from plmsae_cli.evaluation.structure.metrics import METRICS, compare

        figures: dict[str, Any] = finite(compare(fold.alpha_L3, original.alpha_L3))
        figures["plddt"] = float(fold.plddt_L.mean())
        if protein.reference_L3 is None:
            figures |= {f"reference_{name}": None for name in METRICS}
        else:
            near = finite(compare(fold.alpha_L3, protein.reference_L3))
            figures |= {f"reference_{name}": value for name, value in near.items()}
        return {"mode": mode, "variant": variant, "number": number, **figures, "fvu": None, "l0": None}

    def _save(self, place: int, name: str, fold: Fold) -> FileRecord:
        path = self.scope.path(AXIS, f"pdb/{place:05}.{name}.pdb")
        return self.scope.store.write(path, [self.folder.pdb(fold).encode()])


def _report(scope: Scope, options: Structure, of: int) -> Result:
    from plmsae_cli.evaluation.structure.esmfold import RANDOM

    parts = [scope.read_json(AXIS, f"parts/{index}of{of}.json") for index in range(of)]
    rows = sorted((row for part in parts for row in part["rows"]), key=lambda row: row["place"])
    plain = [row for row in rows if row["mode"] == PLAIN]
    folds = summary(rows, options.bootstraps)
    body = {
        "esmfold": options.esmfold,
        "demo": options.esmfold == RANDOM,
        "layer": scope.made()["layer"],
        "modes": options.modes,
        "proteins": len(plain),
        "references": sum(row["reference_rmsd"] is not None for row in plain),
        "in_training": sum(row["in_training"] for row in plain),
        "spliced_identity": "exact" if all(part["spliced_identity"] is not False for part in parts) else "differs",
        "folds": folds,
        "dictionary": {fold["mode"]: fold for fold in folds if fold["variant"] == "sae"},
    }
    table: dict[str, list[Any]] = {name: [row[name] for row in plain] for name in ("id", "length", "in_training")}
    table["plddt"] = [row["plddt"] for row in plain]
    table["reference_rmsd"] = [row["reference_rmsd"] for row in plain]
    for mode in options.modes:
        table[f"rmsd_{mode}"] = [row["rmsd"] for row in rows if (row["mode"], row["variant"]) == (mode, "sae")]
    files = [
        scope.write_json(AXIS, "result.json", body),
        scope.write_table(AXIS, "proteins.parquet", table),
        scope.write_table(AXIS, "folds.parquet", {name: [row[name] for row in rows] for name in COLUMNS}),
        scope.store.write(scope.path(AXIS, "folds.csv"), [csv_of(COLUMNS, rows)]),
    ]
    return Result(files, {f"{mode}_rmsd": fold["rmsd"] for mode, fold in body["dictionary"].items()})
