"""The axis `contacts`: couplings of known structures by piece, then precision over all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.runtime.task import Context, Result, Task
from plmsae_cli.store.contact_head import contact_head_file, load_contact_head

if TYPE_CHECKING:
    import torch

    from plmsae_cli.config.evaluation import Contacts
    from plmsae_cli.evaluation.contacts.structure import Chain
    from plmsae_cli.plm.passes import Splice

AXIS = "contacts"
VARIANTS = ("original", "sae", "zero")


def plan(scope: Scope) -> tuple[list[Task], Mapping[str, Any]]:
    """The tasks, and figures for people."""
    from plmsae_cli.evaluation.chains import contents
    from plmsae_cli.evaluation.contacts.structure import require_biotite

    options = scope.options.contacts
    assert options is not None
    scope.require_same_model("remove eval.contacts")
    require_biotite()
    if "head" in options.methods:
        _require_head(scope)
    identity = scope.identity(AXIS, options.science(), contents(scope, options.structures))
    pieces = scope.pieces(AXIS, identity, "part", options.tasks, 30.0)
    report = scope.task(AXIS, identity, "report", [piece.args["step"] for piece in pieces])
    if not scope.recorded(report):  # a chain that is not there, or of no use, is known before training
        for structure in options.structures:
            _chain(scope, options, structure)
    return [*pieces, report], {"structures": len(options.structures), "methods": ", ".join(options.methods)}


def _chain(scope: Scope, options: Contacts, structure: str) -> Chain:
    """Raises UserError where it cannot be read, is too long, or has no pair of residues that counts."""
    from plmsae_cli.evaluation.chains import named_chain
    from plmsae_cli.evaluation.contacts.precision import SEPARATION, eligible

    chain = named_chain(scope, AXIS, structure, options.sequence, options.max_length)
    if not eligible(chain.known_L).any():
        raise UserError(
            f"{structure} has no two resolved residues that are {SEPARATION} apart", "leave it out: it is too short"
        )
    return chain


def _require_head(scope: Scope) -> None:
    """Raises UserError where the contact head sees nothing of the splice, or its weights are not here."""
    layer = scope.manifest["layer"] if scope.manifest else scope.experiment.training_layer()
    weights = scope.experiment.model.weights
    if layer == scope.lineage.num_layers:
        raise UserError(
            f"eval.contacts.methods: head reads the attention of all layers, and none reads layer {layer}, the last of"
            f" {scope.lineage.weights.name}, so a reconstruction spliced there changes nothing",
            "set methods: [jacobian]",
        )
    if contact_head_file(weights, scope.store) is None:
        load_contact_head(weights, scope.store, 0)  # says what is missing


def work(task: Task, scope: Scope, context: Context) -> Result:
    options = scope.options.contacts
    assert options is not None
    if task.args["step"] == "report":
        return _report(scope, options)
    files = []
    mine = range(task.args["index"], len(options.structures), task.args["of"])
    measure = _Measure(scope, options, context)
    for done, place in enumerate(mine):

        def progress(share: float, done: int = done) -> None:  # one Jacobian may take minutes
            context.progress(done + share, len(mine))

        row, pairs = measure.protein(options.structures[place], progress)
        files.append(scope.write_table(AXIS, f"pairs/{place:05}.parquet", pairs))
        files.append(scope.write_json(AXIS, f"proteins/{place:05}.json", row))
        progress(1.0)
    return Result(files)


class _Measure:
    """The language model with and without the dictionary, ready for one structure after the other."""

    def __init__(self, scope: Scope, options: Contacts, context: Context) -> None:
        import torch

        from plmsae_cli.evaluation.proteins import in_training
        from plmsae_cli.runtime.device import pick_device
        from plmsae_cli.runtime.embedding import Embedder
        from plmsae_cli.runtime.saved import load_sae_with_facts

        self.scope, self.options, self.check_stop = scope, options, context.check_stop
        compute = options.compute
        if compute == "auto":
            compute = "float16" if pick_device().type == "cuda" else "float32"
        weights = scope.experiment.model.weights
        embedder = Embedder.shared(weights, scope.store, compute)
        self.plm, self.device = embedder.model, embedder.device
        self.budget = embedder.budget(options.batch_tokens)
        self.layer: int = scope.made()["layer"]
        sae = load_sae_with_facts(scope.folder, scope.store).model.to(self.device)
        self.values: dict[str, Splice | None] = {
            "original": None,
            "sae": lambda x_TD: sae(x_TD.float()),
            "zero": torch.zeros_like,
        }
        self.head = None
        if "head" in options.methods:
            config = self.plm.config
            weight_M, bias = load_contact_head(weights, scope.store, config.num_layers * config.num_heads)
            self.head = weight_M.to(self.device), bias.to(self.device)
        self.trained = in_training(scope.store, scope.dataset)

    def protein(self, structure: str, progress: Callable[[float], None]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Its row, and a table of its long-range pairs; `progress` is told the share of the scores that are done."""
        import numpy as np

        from plmsae_cli.evaluation.contacts.precision import eligible, precision

        chain = _chain(self.scope, self.options, structure)
        contact_LL, pairs_LL = chain.contacts(), eligible(chain.known_L)
        i_P, j_P = np.nonzero(pairs_LL)
        pairs: dict[str, Any] = {
            "i": (i_P + 1).astype(np.int32),
            "j": (j_P + 1).astype(np.int32),
            "distance": chain.distances()[pairs_LL].astype(np.float32),
        }
        row: dict[str, Any] = {
            "id": chain.name,
            "length": len(chain.sequence),
            "in_training": self.trained(chain.sequence),
            "resolved": int(chain.known_L.sum()),
            "contacts": int(contact_LL[pairs_LL].sum()),
            "pairs": len(i_P),
            "precision": {},
        }
        for method in self.options.methods:
            row["precision"][method] = {}
            for variant, score_LL in self._scores(method, chain):
                row["precision"][method][variant] = precision(score_LL, contact_LL, chain.known_L)
                pairs[f"{method}_{variant}"] = score_LL[pairs_LL].astype(np.float32)
                done = sum(map(len, row["precision"].values()))
                progress(done / (len(self.options.methods) * len(VARIANTS)))
        return row, pairs

    def _scores(self, method: str, chain: Chain) -> Iterator[tuple[str, Any]]:
        """Each variant's scores [L, L]: one Jacobian is held at a time."""
        from plmsae_cli.evaluation.contacts.jacobian import coupling, jacobian
        from plmsae_cli.plm.alphabet import encode

        residues_L = encode(chain.sequence)
        for variant, value in self.values.items():
            self.check_stop()
            if method == "jacobian":
                score = coupling(
                    jacobian(self.plm, residues_L, self.layer, value, self.budget, self.device, self.check_stop)
                )
            else:
                score = self._head_scores(residues_L, value)
            yield variant, score.double().cpu().numpy()

    def _head_scores(self, residues_L: Any, value: Splice | None) -> torch.Tensor:
        import torch

        from plmsae_cli.evaluation.contacts.jacobian import same_length
        from plmsae_cli.evaluation.splices import at_residues
        from plmsae_cli.plm.alphabet import wrap
        from plmsae_cli.plm.contacts import attention_contacts
        from plmsae_cli.plm.esm2 import ESM2

        assert self.head is not None
        assert isinstance(self.plm, ESM2)  # no other model has a head
        tokens_T = torch.from_numpy(wrap(residues_L)).to(self.device)
        _, residue_T1 = same_length(tokens_T[None])
        splice = None if value is None else {self.layer: at_residues(residue_T1, value)}
        return attention_contacts(self.plm, tokens_T, *self.head, splice)


def _report(scope: Scope, options: Contacts) -> Result:
    from plmsae_cli.evaluation.contacts.precision import CUTS, summary

    rows = [scope.read_json(AXIS, f"proteins/{place:05}.json") for place in range(len(options.structures))]
    # A chain may be named twice, with its letter and without.
    rows = [row for n, row in enumerate(rows) if row not in rows[:n]]
    body = {
        "sequence": options.sequence,
        "chance": sum(row["contacts"] / row["pairs"] for row in rows) / len(rows),
        "in_training": sum(row["in_training"] for row in rows),
        "methods": {
            method: summary([row["precision"][method] for row in rows], options.bootstraps)
            for method in options.methods
        },
        "proteins": rows,
    }
    table: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in ("id", "length", "in_training")}
    table |= {"residues_resolved": [row["resolved"] for row in rows], "contacts": [row["contacts"] for row in rows]}
    for method in options.methods:
        for variant in VARIANTS:
            table[f"contacts_{method}_{variant}"] = [
                row["precision"][method][variant][next(iter(CUTS))] for row in rows
            ]
    figures = {f"{method}_p_at_l": body["methods"][method]["L"]["sae"] for method in options.methods}
    return Result(
        [scope.write_json(AXIS, "result.json", body), scope.write_table(AXIS, "proteins.parquet", table)], figures
    )
