"""The proteins of `eval.structure`, and the experimental structures that there are of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.structure import Structure
from plmsae_cli.evaluation import chains
from plmsae_cli.evaluation.annotations.entries import Entry
from plmsae_cli.evaluation.contacts.structure import ENDINGS, Chain, Coordinates, onto, read_chain
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.evaluation.proteins import choose, in_training, read_any
from plmsae_cli.evaluation.structure.metrics import FEWEST
from plmsae_cli.store.fs import join

_MOST_PIECES = 32


@dataclass(frozen=True)
class Protein:
    """One to be folded."""

    id: str
    sequence: str
    in_training: bool
    reference_L3: Coordinates | None
    """CA of the experimental structure, NaN where not resolved."""


def contents(scope: Scope, options: Structure) -> dict[str, str]:
    """Hashes of the files that decide the result, by name."""
    found = scope.contents(fasta=options.fasta) | chains.contents(scope, options.structures)
    if options.references is not None:
        found |= {f"reference-{name}": scope.content(path) for name, path in _references(scope, options).items()}
    return found


def pieces(scope: Scope, options: Structure) -> int:
    """Tasks; found without looking at the dataset, which may not exist yet."""
    if options.tasks != "auto":
        return options.tasks
    most = min(_MOST_PIECES, options.proteins or _MOST_PIECES)
    number = len(options.structures)
    if options.ids is not None:
        number += len(options.ids)
    elif options.fasta is not None:
        number += sum(1 for _ in islice(read_any(scope.store.local(options.fasta)), most))
    return max(1, min(number, most))


def require_named(scope: Scope, options: Structure) -> None:
    """Raises UserError, before anything is trained, where `proteins` will not find what `structures` and `ids` name."""
    for structure in options.structures:
        _chain(scope, options, structure)
    if options.ids is not None:
        _entries(scope, options)


def proteins(scope: Scope, options: Structure) -> list[Protein]:
    """Those of `structures`, then those of `fasta`, each sequence once.

    Raises:
        UserError: a structure cannot be read, is too long or of another protein, an id is not in the file, or no protein is left.
    """
    trained = in_training(scope.store, scope.dataset)
    found = [_of_structure(scope, options, structure, trained) for structure in options.structures]
    if options.fasta is not None:
        found += _of_fasta(scope, options)
    once: dict[str, Protein] = {}
    for protein in found:
        once.setdefault(protein.sequence, protein)
    folded = [protein for protein in once.values() if len(protein.sequence) >= FEWEST][: options.proteins]
    if not folded:
        raise UserError(f"eval.structure has no protein of at least {FEWEST} residues", "name others")
    return folded


def _chain(scope: Scope, options: Structure, structure: str) -> Chain:
    return chains.named_chain(scope, "structure", structure, options.sequence, options.max_length)


def _of_structure(scope: Scope, options: Structure, structure: str, trained: Callable[[str], bool]) -> Protein:
    chain = _chain(scope, options, structure)
    return Protein(chain.name, chain.sequence, trained(chain.sequence), chain.alpha_L3)


def _entries(scope: Scope, options: Structure) -> Iterable[Entry]:
    """Those of `fasta`, or those of them that `ids` names."""
    assert options.fasta is not None
    entries = read_any(scope.store.local(options.fasta))
    if options.ids is None:
        return entries
    wanted = set(options.ids)
    kept = [entry for entry in entries if entry.accession in wanted]
    if absent := sorted(wanted - {entry.accession for entry in kept}):
        raise UserError(f"eval.structure.ids: {options.fasta} has no {', '.join(absent)}", "remove it from ids")
    return kept


def _of_fasta(scope: Scope, options: Structure) -> list[Protein]:
    chosen = choose(_entries(scope, options), scope.store, scope.dataset, options.max_length, leave_out=False)
    known = _references(scope, options) if options.references is not None else {}
    found = []
    for entry, trained in zip(chosen.entries, chosen.trained_P.tolist(), strict=True):
        reference = None
        if (path := known.get(entry.accession)) is not None:
            chain = read_chain(scope.store.local(path), path, None, "resolved")
            try:
                reference = onto(chain, entry.sequence).alpha_L3
            except UserError as error:
                raise UserError(
                    f"{path} is no structure of {entry.accession}: residues of its first chain have no place in that sequence",
                    "take it out of eval.structure.references, or give it the name of its protein",
                ) from error
        found.append(Protein(entry.accession, entry.sequence, trained, reference))
    return found


def _references(scope: Scope, options: Structure) -> dict[str, str]:
    """Path of each structure in the folder by its stem. Raises UserError where there is none."""
    assert options.references is not None
    found = {}
    for name in sorted(scope.store.list(options.references)):
        plain = name.removesuffix(".gz")
        if plain.endswith(ENDINGS) and "/" not in name:
            found[plain.rpartition(".")[0]] = join(options.references, name)
    if not found:
        raise UserError(
            f"eval.structure.references: {options.references} holds no structure",
            "it is a folder of <id>.pdb or <id>.cif",
        )
    return found
