"""The axis `steering`: choose latents, steer along each by piece, test over proteins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.axes import concepts
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.runtime.task import Context, Result, Task
from plmsae_cli.store.fs import join

if TYPE_CHECKING:
    import torch

    from plmsae_cli.config.evaluation import Steering
    from plmsae_cli.evaluation.steering.edits import Steer
    from plmsae_cli.evaluation.steering.readout import Batch

AXIS = "steering"
FOLDER = "eval.steering.esmfold"


def plan(scope: Scope) -> tuple[list[Task], Mapping[str, Any]]:
    """The tasks, and figures for people."""
    options = scope.options.steering
    assert options is not None
    scope.require_same_model("remove eval.steering")
    inputs = scope.contents(fasta=options.fasta)
    if options.fasta is not None:
        from plmsae_cli.evaluation.proteins import require_proteins

        require_proteins(scope.store.local(options.fasta))
    if options.esmfold is not None:
        from plmsae_cli.evaluation.structure.esmfold import identity as folder_identity

        weights = scope.experiment.model.weights
        inputs["esmfold"] = folder_identity(options.esmfold, weights, scope.store, FOLDER)
    chosen_by = concepts.plan(scope)[0][-1] if options.latents == "concepts" else None
    if chosen_by is not None:
        inputs["concepts"] = chosen_by.id
    identity = scope.identity(AXIS, options.science(), inputs)
    first = scope.task(AXIS, identity, "prepare")
    if chosen_by is not None:
        first = replace(first, needs=(chosen_by.id,))
    pieces = scope.pieces(AXIS, identity, "part", options.tasks, 20.0, ["prepare"])
    steps = [piece.args["step"] for piece in pieces]
    tasks = [first, *pieces, scope.task(AXIS, identity, "report", ["prepare", *steps], of=options.tasks)]
    latents = options.latents if isinstance(options.latents, str) else f"{len(options.latents)} listed"
    return tasks, {"latents": latents, "mode": options.mode, "proteins": options.fasta or "held out"}


def work(task: Task, scope: Scope, context: Context) -> Result:
    options = scope.options.steering
    assert options is not None
    if task.args["step"] == "prepare":
        return _prepare(scope, options, context)
    if task.args["step"] == "report":
        from plmsae_cli.evaluation.steering.outcome import report

        return report(scope, options, task.args["of"])
    return _part(scope, options, task.args["index"], task.args["of"], context)


def _proteins(scope: Scope, options: Steering) -> tuple[list[str], list[str], list[bool]]:
    """Ids, sequences, and which were in training."""
    from plmsae_cli.evaluation.proteins import choose, read_any
    from plmsae_cli.store.proteins import read_proteins

    if options.fasta is not None:
        entries = read_any(scope.store.local(options.fasta))
        chosen = choose(entries, scope.store, scope.dataset, options.max_length, leave_out=False)
        kept = chosen.entries[: options.proteins]
        found = [e.accession for e in kept], [e.sequence for e in kept], chosen.trained_P[: options.proteins].tolist()
    else:
        table = read_proteins(scope.store, join(scope.dataset, "proteins.parquet"), split="heldout")
        pairs = zip(table["id"].to_pylist(), table["sequence"].to_pylist(), strict=True)
        short = [(name, text) for name, text in pairs if 0 < len(text) <= options.max_length][: options.proteins]
        found = [name for name, _ in short], [text for _, text in short], [False] * len(short)
    if len(found[0]) < 2:
        raise UserError(
            f"eval.steering compares over proteins, of which there are {len(found[0])}",
            "name more in eval.steering.fasta, raise max_length, or hold out more (embed.holdout)",
        )
    return found


def _prepare(scope: Scope, options: Steering, context: Context) -> Result:
    """Densities on the proteins, the latents that are steered, and what each is compared with."""
    import torch

    from plmsae_cli.evaluation.rows import Rows
    from plmsae_cli.evaluation.steering.edits import equal_density
    from plmsae_cli.runtime.saved import load_sae_with_facts

    ids, sequences, trained = _proteins(scope, options)
    rows = Rows(scope, options.batch_tokens, context.check_stop)
    sae = load_sae_with_facts(scope.folder, scope.store).model.to(rows.device)
    fired_N = torch.zeros(sae.num_latents, dtype=torch.float64, device=rows.device)
    for _, latents in rows.encoded(sae, sequences):
        fired_N.index_add_(0, latents.indices_BK.flatten(), (latents.acts_BK > 0).flatten().double())
    density_N = fired_N.cpu() / sum(len(s) for s in sequences)
    alive_N = sae.maximum_N.cpu() > 0
    usable_N = density_N.masked_fill(~alive_N, 0.0)
    chosen = _choose(scope, options, usable_N, alive_N.tolist())
    body = {
        "latents": chosen,
        "density": [float(density_N[n]) for n in chosen],
        "other": [equal_density(usable_N, n, set(chosen)) for n in chosen],
    }
    about = {"id": ids, "length": [len(s) for s in sequences], "in_training": trained}
    return Result(
        [
            scope.write_json(AXIS, "chosen.json", body),
            scope.write_table(AXIS, "sequences.parquet", {"sequence": sequences}),
            scope.write_table(AXIS, "proteins.parquet", about),
        ]
    )


def _choose(scope: Scope, options: Steering, density_N: Any, alive_N: list[bool]) -> list[int]:
    """The latents steered. `density_N` is on the proteins, `alive_N` says which have a maximum."""
    number = len(density_N)
    if isinstance(options.latents, list):
        if (most := max(options.latents)) >= number:
            raise UserError(
                f"eval.steering.latents names {most}, the dictionary has {number:,}", f"the last is {number - 1}"
            )
        if dead := [n for n in options.latents if not alive_N[n]]:
            raise UserError(
                f"eval.steering.latents: {', '.join(map(str, dead))} never fired on training rows, so there is no maximum to"
                " steer by",
                "leave out what is dead: column `max` of eval/latents.parquet is 0",
            )
        found = list(options.latents)
    elif options.latents == "concepts":
        score = scope.read_table(concepts.AXIS, "latents.parquet")["concept_f1"].to_pylist()
        known = [n for n in range(number) if score[n] is not None and alive_N[n]]
        found = sorted(known, key=lambda n: -score[n])[: options.top]
    else:
        order = density_N.argsort(descending=True, stable=True).tolist()
        found = [n for n in order if density_N[n] > 0][: options.top]
    if not found:
        raise UserError("no latent to steer: none is alive on the proteins", "list some in eval.steering.latents")
    others = density_N > 0
    others[found] = False
    if not others.any():
        raise UserError(
            "every latent that fires on the proteins is steered, so none is left to compare with",
            "steer fewer (eval.steering.top or latents), or on more proteins",
        )
    return found


def _batches(
    sequences: list[str], options: Steering, plm: Any, layer: int, budget: int, device: Any
) -> Iterator[Batch]:
    """Packs in the proteins' order."""
    from plmsae_cli.evaluation.proteins import groups
    from plmsae_cli.evaluation.steering.readout import prepare
    from plmsae_cli.plm.alphabet import encode, pack
    from plmsae_cli.runtime.masked_scores import masks_of_pack

    for places in groups([len(s) + 2 for s in sequences], budget):
        packed = pack([encode(sequences[p]) for p in places])
        masked_T = masks_of_pack(packed, options.mask_rate).to(device)
        yield prepare(plm, packed.to(device), masked_T, layer)


def _part(scope: Scope, options: Steering, index: int, of: int, context: Context) -> Result:
    """Every `of`-th steer: its read-outs of every protein."""
    import torch

    from plmsae_cli.evaluation.steering.edits import steers
    from plmsae_cli.evaluation.steering.readout import measure, steerable
    from plmsae_cli.runtime.embedding import Embedder
    from plmsae_cli.runtime.saved import load_sae_with_facts

    sequences = scope.read_table(AXIS, "sequences.parquet")["sequence"].to_pylist()
    compute = "float32" if options.compute == "auto" else options.compute
    embedder = Embedder.shared(scope.experiment.model.weights, scope.store, compute)
    sae = load_sae_with_facts(scope.folder, scope.store).model.to(embedder.device)
    layer = scope.made()["layer"]
    mine = steers(scope.read_json(AXIS, "chosen.json"), options.strengths)[index::of]
    positions = options.residues if isinstance(options.residues, list) else None
    found = []
    done = 0
    budget = embedder.budget(options.batch_tokens)
    with torch.inference_mode():
        # There may be more tasks than steers.
        for batch in _batches(sequences if mine else [], options, embedder.model, layer, budget, embedder.device):
            context.check_stop()
            where_T1 = steerable(batch, positions)
            only_active = options.residues == "active"
            found.append(
                measure(embedder.model, sae, batch, mine, options.mode, where_T1, only_active, context.check_stop)
            )
            done += len(batch.packed.lengths)
            context.progress(done, len(sequences))
    columns: dict[str, Any] = {}
    files = []
    if mine:
        values_SVPR = torch.cat(found, dim=2)
        if options.esmfold is not None:
            shapes, folded_SVPR = _folds(scope, options, sae, mine, sequences, context)
            values_SVPR = torch.cat([values_SVPR, folded_SVPR], dim=3)
            files.append(scope.write_json(AXIS, f"folds/{index}of{of}.json", {"proteins": shapes}))
        columns["values"] = [row.ravel() for row in values_SVPR.numpy()]
    return Result([*files, scope.write_table(AXIS, f"values/{index}of{of}.parquet", columns)])


def _folds(
    scope: Scope, options: Steering, sae: Any, mine: list[Steer], sequences: list[str], context: Context
) -> tuple[list[dict[str, float]], torch.Tensor]:
    """What the untouched folds are, and the read-outs [steers, variants, P, read-outs] of the steered ones."""
    import torch

    from plmsae_cli.evaluation.steering.folds import measure_folds
    from plmsae_cli.evaluation.structure.esmfold import shared

    assert options.esmfold is not None
    layer = scope.made()["layer"]
    weights = scope.experiment.model.weights
    folder = shared(options.esmfold, weights, scope.store, options.recycles, layer, FOLDER)
    positions = options.residues if isinstance(options.residues, list) else None
    shapes, found = [], []
    for done, sequence in enumerate(sequences):
        base, values_SVR = measure_folds(
            folder,
            sae,
            layer,
            sequence,
            mine,
            options.mode,
            positions,
            options.residues == "active",
            context.check_stop,
        )
        shapes.append({"sasa": base.sasa, "sasa_mean": base.sasa / len(sequence), "plddt": base.plddt})
        found.append(values_SVR)
        context.progress(done + 1, len(sequences))
    return shapes, torch.stack(found, dim=2)
