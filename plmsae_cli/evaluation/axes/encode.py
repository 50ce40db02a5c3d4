"""The axis `encode`: a finished dictionary applied to somebody's own proteins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.runtime.task import Context, Result, Task
from plmsae_cli.store.fs import FileRecord, join

if TYPE_CHECKING:
    from torch import Tensor

    from plmsae_cli.config.evaluation import Encode
    from plmsae_cli.evaluation.strongest import Strongest
    from plmsae_cli.sae.interface import Latents

AXIS = "encode"


def plan(scope: Scope) -> tuple[list[Task], Mapping[str, Any]]:
    """The tasks, and figures for people."""
    from plmsae_cli.evaluation.proteins import require_proteins

    options = scope.options.encode
    assert options is not None
    scope.require_same_model("remove eval.encode")
    require_proteins(scope.store.local(options.fasta))
    identity = scope.identity(AXIS, options.science(), scope.contents(fasta=options.fasta))
    pieces = scope.pieces(AXIS, identity, "part", options.tasks, 20.0)
    steps = [piece.args["step"] for piece in pieces]
    return [*pieces, scope.task(AXIS, identity, "report", steps, steps=steps)], {"fasta": options.fasta}


def work(task: Task, scope: Scope, context: Context) -> Result:
    options = scope.options.encode
    assert options is not None
    if task.args["step"] != "report":
        return _part(scope, options, task.args["index"], task.args["of"], context)
    parts = scope.parts_of(task, task.args["steps"])
    files = [file.name for part in parts for file in part.files]
    body = {
        key: sum(part.facts[key] for part in parts) for key in ("proteins", "in_training", "cut", "residues", "active")
    }
    return Result([*_tables(scope, files), scope.write_json(AXIS, "result.json", body)], body)


def _part(scope: Scope, options: Encode, index: int, of: int, context: Context) -> Result:
    """Every `of`-th group of proteins: its active latents by residue, its strongest latents, and what it is."""
    import torch

    from plmsae_cli.evaluation.proteins import in_training, read_any
    from plmsae_cli.evaluation.rows import Rows
    from plmsae_cli.evaluation.strongest import strongest
    from plmsae_cli.runtime.saved import load_sae_with_facts

    entries = [entry for entry in read_any(scope.store.local(options.fasta)) if entry.sequence]
    known = in_training(scope.store, scope.dataset)
    rows = Rows(scope, options.batch_tokens, context.check_stop)
    sae = load_sae_with_facts(scope.folder, scope.store).model.to(rows.device)
    files: list[FileRecord] = []
    facts = {"proteins": 0, "in_training": 0, "cut": 0, "residues": 0, "active": 0}
    top: dict[str, list[Any]] = {name: [] for name in ("protein", "rank", "latent", "activation", "share", "residue")}
    about: dict[str, list[Any]] = {name: [] for name in ("id", "length", "in_training", "encoded")}
    sequences = [entry.sequence[: options.max_length] for entry in entries]
    for done, (places, latents) in enumerate(rows.encoded(sae, sequences, context.progress, index, of)):
        ids = [entries[p].accession for p in places]
        lengths = torch.tensor([len(sequences[p]) for p in places])
        protein_R = torch.arange(len(ids)).repeat_interleave(lengths)
        residue_R = torch.cat([torch.arange(1, int(length) + 1) for length in lengths])
        columns = _active(latents, sae.maximum_N, options.above, ids, protein_R, residue_R)
        files.append(scope.write_table(AXIS, f"activations/{index}of{of}-{done:05}.parquet", columns))
        _list(strongest(latents, sae.maximum_N, options.top, lengths), ids, top)
        for p in places:
            whole = entries[p].sequence
            about["id"].append(entries[p].accession)
            about["length"].append(len(whole))
            about["in_training"].append(known(whole))
            about["encoded"].append(len(sequences[p]))
            facts["cut"] += len(sequences[p]) < len(whole)
            facts["in_training"] += known(whole)
        facts["proteins"] += len(places)
        facts["residues"] += len(protein_R)
        facts["active"] += len(columns["latent"])
    files.append(scope.write_table(AXIS, f"top/{index}of{of}.parquet", top))
    files.append(scope.write_table(AXIS, f"about/{index}of{of}.parquet", about))
    return Result(files, facts)


def _active(
    latents: Latents, maximum_N: Tensor, above: float, ids: list[str], protein_R: Tensor, residue_R: Tensor
) -> dict[str, Any]:
    """A row for each activation strictly above the share `above` of its latent's maximum, by residue, then latent."""
    import pyarrow as pa

    order_RK = latents.indices_BK.argsort(dim=1)
    acts_RK, index_RK = latents.acts_BK.gather(1, order_RK), latents.indices_BK.gather(1, order_RK)
    row_Q, slot_Q = (acts_RK > above * maximum_N[index_RK]).nonzero(as_tuple=True)
    names = pa.DictionaryArray.from_arrays(pa.array(protein_R[row_Q.cpu()].int().numpy()), pa.array(ids))
    return {
        "protein": names,
        "residue": residue_R[row_Q.cpu()].int().numpy(),
        "latent": index_RK[row_Q, slot_Q].int().cpu().numpy(),
        "activation": acts_RK[row_Q, slot_Q].cpu().numpy(),
    }


def _list(found: Strongest, ids: list[str], top: dict[str, list[Any]]) -> None:
    """Append each protein's strongest latents, those that are active at all."""
    shares, latents, acts, residues = (
        t.tolist() for t in (found.share_PT, found.latent_PT, found.activation_PT, found.residue_PT)
    )
    for place, name in enumerate(ids):
        columns = zip(latents[place], acts[place], shares[place], residues[place], strict=True)
        for rank, (latent, activation, share, residue) in enumerate(columns, 1):
            if share <= 0:
                break
            for column, cell in zip(top.values(), (name, rank, latent, activation, share, residue), strict=True):
                column.append(cell)


def _tables(scope: Scope, names: list[str]) -> list[FileRecord]:
    """The pieces' tables of proteins and of strongest latents as one each."""
    import pyarrow as pa

    from plmsae_cli.store.tables import read_table

    def joined(kind: str) -> Any:
        found = sorted(name for name in names if f"/{kind}/" in name)
        tables = [read_table(scope.store, join(scope.folder, name)) for name in found]
        # Of a piece without proteins columns have no type.
        return pa.concat_tables([table for table in tables if len(table)] or tables[:1])

    order = [("id", "ascending")]
    return [
        scope.write_table(AXIS, "proteins.parquet", joined("about").sort_by(order)),
        scope.write_table(
            AXIS, "top_latents.parquet", joined("top").sort_by([("protein", "ascending"), ("rank", "ascending")])
        ),
    ]
