"""One experiment file, read and judged: the experiment, or every problem with its place in the text."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plmsae_cli.config import nodes, overrides
from plmsae_cli.config.base import Section
from plmsae_cli.config.check import check
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.files import is_experiment
from plmsae_cli.config.nodes import Document
from plmsae_cli.config.problems import OVERRIDE, InvalidExperiment, Problem, dotted
from plmsae_cli.config.tree import locate
from plmsae_cli.config.wording import Finding, legal_name

__all__ = ["InvalidExperiment", "Loaded", "Problem", "load"]

_MAX_BYTES = 1_000_000  # a FASTA given in place of a YAML must not be read


@dataclass(frozen=True)
class Loaded:
    """An experiment, the text it was written as, and where each value came from."""

    experiment: Experiment
    text: str
    origins: dict[str, str]
    """Dotted path of every leaf -> `file:line`, `--set` or `default`."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read an experiment, with `path=value` overrides. Raises InvalidExperiment holding all problems."""
    source = str(path)
    text = _read(Path(path))
    document = nodes.parse(text, source)
    unreadable = document.data is None and document.problems
    changes, problems = _changes(overrides)
    problems += document.problems
    if unreadable:
        raise InvalidExperiment(problems)
    data = document.data
    if data is None and changes:
        data = {}
    if isinstance(data, dict):
        data, more = _applied(data, changes)
        problems += more
    experiment, findings = check(data, document.refused, document.empty)
    routes = [route for name in changes if (route := locate(name)) is not None]
    problems += [_placed(finding, document, routes) for finding in findings]
    if problems or experiment is None:
        raise InvalidExperiment(problems)
    if experiment.name is None:
        experiment = experiment.model_copy(update={"name": legal_name(Path(path).stem)})
    return Loaded(experiment, text, dict(_origins(experiment, data, document, routes)))


def _read(path: Path) -> str:
    def fail(message: str, hint: str | None = None) -> InvalidExperiment:
        return InvalidExperiment([Problem(0, 0, "", message, hint, str(path))])

    try:
        if path.is_dir():
            raise fail("is a folder, not an experiment file")
        if path.stat().st_size > _MAX_BYTES:
            size = path.stat().st_size / 1e6
            raise fail(f"{size:,.1f} MB are too many for an experiment file", "name the YAML, not the data")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise fail("no such file", _others(path)) from None
    except OSError as error:
        raise fail(f"cannot be read: {error.strerror}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        hint = "save the file as UTF-8; a compressed file is not an experiment"
        raise InvalidExperiment([Problem(line, column, "", message, hint, str(path))]) from None


def _others(path: Path) -> str | None:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist"
    names = sorted(file.name for file in path.parent.iterdir() if is_experiment(file))
    close = difflib.get_close_matches(path.name, names, 3, 0.5)
    if close:
        return f"did you mean {' or '.join(str(path.with_name(name)) for name in close)}?"
    return "`plmsae init` writes an example"


def _changes(arguments: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    changes: dict[str, Any] = {}
    problems: list[Problem] = []
    for argument in arguments:
        try:
            path, value = overrides.parse(argument)
        except UserError as error:
            problems.append(_set_problem(error))
            continue
        # The last of two wins, also in order: `a={}` behind `a.b=1` empties the section.
        changes.pop(path, None)
        changes[path] = value
    return changes, problems


def _applied(data: dict[str, Any], changes: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    problems: list[Problem] = []
    for path, value in changes.items():
        try:
            data = overrides.apply(data, {path: value})
        except UserError as error:
            problems.append(_set_problem(error))
    return data, problems


def _set_problem(error: UserError) -> Problem:
    path, separator, message = error.message.partition(": ")
    return Problem(0, 0, path if separator else "", message or path, error.hint, OVERRIDE)


def _placed(finding: Finding, document: Document, routes: Sequence[tuple[str, ...]]) -> Problem:
    if any(finding.path[: len(route)] == route for route in routes):
        return Problem(0, 0, dotted(finding.path), finding.message, finding.hint, OVERRIDE)
    if not finding.path:
        return document.problem_at((0, 0), (), finding.message, finding.hint)
    return document.problem(finding.path, finding.message, finding.hint, finding.at_key)


def _origins(
    experiment: Experiment, data: dict[str, Any], document: Document, routes: Sequence[tuple[str, ...]]
) -> Iterator[tuple[str, str]]:
    for path in _leaves(experiment, ()):
        at: Any = data
        given = True
        for key in path:
            given = given and isinstance(at, dict) and key in at
            at = at[key] if given else None
        name = ".".join(path)
        # An explicit null name is the default too.
        if not given or (name == "name" and at is None):
            yield name, "default"
        elif any(path[: len(route)] == route or route[: len(path)] == path for route in routes):
            yield name, OVERRIDE
        else:
            yield name, f"{document.source}:{document.problem(path, '', None).line}"


def _leaves(section: Section, prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _leaves(value, (*prefix, name))
        else:
            yield *prefix, name
