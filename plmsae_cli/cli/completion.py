"""What Tab offers: experiments, runs, fields and their values. Imported by every call, so it imports next to nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = "runs"
BASH = """
%(complete_func)s() {
    local IFS=$'\\n' words=() i
    for ((i = 0; i <= COMP_CWORD; i++)); do
        if ((i > 0)) && [[ ${COMP_WORDS[i]} == = || ${COMP_WORDS[i-1]} == = ]]; then
            words[-1]+=${COMP_WORDS[i]}
        else
            words+=("${COMP_WORDS[i]}")
        fi
    done
    COMPREPLY=( $( env COMP_WORDS="${words[*]}" COMP_CWORD=$((${#words[@]} - 1)) \
                   %(autocomplete_var)s=complete_bash $1 ) )
    if [[ ${words[-1]} == *=* && $COMP_WORDBREAKS == *=* ]]; then
        COMPREPLY=( "${COMPREPLY[@]#*=}" )
    fi
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=./] ]]; then
        compopt -o nospace
    fi
    return 0
}

complete -o default -F %(complete_func)s %(prog_name)s
"""
"""What bash is told instead of typer's script: it cuts words at =, and would end `train.` and `folder/` with a space."""


def yamls(incomplete: str) -> list[str]:
    """Experiment files, and folders on the way to some."""
    return [*_entries(incomplete, files=True)]


def runs(incomplete: str) -> list[str]:
    """Names of runs under runs/, trials of sweeps included; or folders, where a path is being written."""
    found = []
    for path in sorted(Path(_ROOT).glob("*/status.json")) + sorted(Path(_ROOT).glob("*/trials/*/status.json")):
        name = path.parent.relative_to(_ROOT).as_posix()
        # Trials only once their sweep is typed: there may be a thousand.
        if name.startswith(incomplete) and ("/" not in name or "/" in incomplete):
            found.append(name)
    return found or ([*_entries(incomplete, files=False)] if "/" in incomplete else [])


def runs_and_yamls(incomplete: str) -> list[str]:
    return [*runs(incomplete), *yamls(incomplete)]


def fields(incomplete: str) -> list[str]:
    """Dotted fields as `train.lr=`, a section at a time; behind the = the values, where they can be listed."""
    from plmsae_cli.config.tree import entries

    path, equals, typed = incomplete.partition("=")
    if equals:
        return [f"{path}={word}" for word in _values(path) if word.startswith(typed)]
    depth = incomplete.count(".")
    found = []
    for name, entry in entries().items():
        if name.startswith(incomplete) and name.count(".") == depth:
            found.append(f"{name}." if entry.section is not None else f"{name}=")
    return found


def sources(incomplete: str) -> list[str]:
    """What `plmsae fetch` knows."""
    from plmsae_cli.store.sources import sources as known

    return [name for name in known() if name.startswith(incomplete)]


def kinds(incomplete: str) -> list[str]:
    """Templates of `plmsae init`."""
    from plmsae_cli.config.templates import NAMES

    return [name for name in NAMES if name.startswith(incomplete)]


def _values(path: str) -> Iterator[str]:
    from typing import Literal, get_args, get_origin

    from plmsae_cli.config.tree import entries, options

    entry = entries().get(path)
    for kind, _ in [] if entry is None else options(entry.annotation, entry.metadata):
        if get_origin(kind) is Literal:
            yield from map(str, get_args(kind))
        elif kind is bool:
            yield from ("true", "false")
    if entry is not None and entry.nullable:
        yield "null"


def _entries(incomplete: str, files: bool) -> Iterator[str]:
    from plmsae_cli.config.files import is_experiment

    folder, name = os.path.split(incomplete)
    try:
        found = sorted(os.scandir(folder or "."), key=lambda each: each.name)
    except OSError:
        return
    for each in found:
        if not each.name.startswith(name) or (each.name.startswith(".") and not name):
            continue
        shown = os.path.join(folder, each.name)
        if each.is_dir():
            yield f"{shown}/"
        elif files and is_experiment(each.name):
            yield shown
