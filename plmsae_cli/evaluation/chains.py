"""The structures that axes name, `file` or `file:CHAIN`: what they are known by, and the chains that are read."""

from __future__ import annotations

from collections.abc import Sequence

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.contacts.structure import Chain, read_chain, split_chain
from plmsae_cli.evaluation.frame import Scope


def contents(scope: Scope, structures: Sequence[str]) -> dict[str, str]:
    """The content and the chain of each, by name, for an axis's identity."""
    named = [split_chain(structure) for structure in structures]
    return {f"structure-{n}": f"{scope.content(file)}:{chain or ''}" for n, (file, chain) in enumerate(named)}


def named_chain(scope: Scope, axis: str, structure: str, sequence: str, max_length: int) -> Chain:
    """One of them, as `contacts.structure.read_chain` has it.

    Raises:
        UserError: as that says; the chain is longer than `max_length` of the axis.
    """
    file, name = split_chain(structure)
    chain = read_chain(scope.store.local(file), file, name, sequence)
    if len(chain.sequence) > max_length:
        raise UserError(
            f"{structure} has {len(chain.sequence)} residues, more than eval.{axis}.max_length",
            "raise max_length, or leave it out",
        )
    return chain
