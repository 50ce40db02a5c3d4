"""All that is wrong with an experiment's data at once, cross-field rules and sweep values included."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Set
from typing import Any

from pydantic import ValidationError

from plmsae_cli.config import space
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.nodes import KeyPath
from plmsae_cli.config.overrides import members, points, trial, unknown
from plmsae_cli.config.problems import dotted
from plmsae_cli.config.tree import entries, field_of, locate, plain
from plmsae_cli.config.wording import TOP, Finding, explain

MAX_TRIALS = 1000
_NOT_SWEPT = ("name", "root", "data_root", "sweep")  # the sweep itself sets them


def check(
    data: Any, refused: Set[KeyPath] = frozenset(), empty: Set[KeyPath] = frozenset()
) -> tuple[Experiment | None, list[Finding]]:
    """Validate raw data: the experiment, or every finding.

    `refused` are paths whose value was already reported, `empty` keys with nothing behind the colon.
    """
    if data is None:
        return None, [Finding((), "the file is empty", TOP)]
    blanks = [Finding(path, *_blank(path)) for path in sorted(empty) if _is_blank_section(data, path)]
    try:
        experiment = Experiment.model_validate(data)
    except ValidationError as error:
        findings = explain(error.errors(include_url=False))
        guessed = {f.meant for f in findings}
        blamed = {f.path for f in blanks}
        certain = [
            f
            for f in findings
            if not f.rule
            and f.path not in blamed
            and not _below(f.path, refused)
            # `layer` written for `layers` is one mistake, not a missing and an unknown key.
            and not (f.at_key and f.meant is None and ".".join(map(str, f.path)) in guessed)
        ]
        rules = [f for f in findings if f.rule and not _names_any(f, {*refused, *blamed})]
        wrong = {*refused, *blamed, *(f.path for f in certain)}
        rules += [f for f in _hidden_rules(data, findings) if f not in rules and not _names_any(f, wrong)]
        return None, blanks + certain + rules
    if blanks:
        return None, blanks
    findings = list(_many(experiment)) if experiment.swept else []
    return (None, findings) if findings else (experiment, [])


def _is_blank_section(data: Any, path: KeyPath) -> bool:
    entry = entries().get(".".join(map(str, path)))
    for key in path:
        data = data.get(key) if isinstance(data, dict) else None
    # A value given by --set fills the blank.
    return entry is not None and entry.section is not None and data is None


def _blank(path: KeyPath) -> tuple[str, str]:
    name = path[-1]
    entry = entries()[".".join(map(str, path))]
    assert entry.section is not None
    required = [key for key, info in entry.section.model_fields.items() if info.is_required()]
    if required:
        return "is empty", f"give it {' and '.join(required)}, or remove the line"
    return "is empty", f"write `{name}: {{}}` for its defaults, or remove the line"


def _hidden_rules(data: Any, findings: list[Finding]) -> list[Finding]:
    """Rules of sections that pydantic skipped because of a wrong field in them: try again without it."""
    mended = copy.deepcopy(data)
    for finding in findings:
        if finding.rule:
            continue
        field = finding.path if finding.at_key else field_of(finding.path)
        at: Any = mended
        for key in field[:-1]:
            at = at.get(key) if isinstance(at, dict) else None
        if not isinstance(at, dict) or not field or field[-1] not in at:
            return []
        value = at.pop(field[-1])
        if finding.meant is not None and finding.meant.rpartition(".")[0] == ".".join(map(str, field[:-1])):
            at.setdefault(finding.meant.rpartition(".")[2], value)
    try:
        Experiment.model_validate(mended)
    except ValidationError as error:
        return [f for f in explain(error.errors(include_url=False)) if f.rule]
    return []


def _names_any(rule: Finding, wrong: Iterable[KeyPath]) -> bool:
    """Whether a rule may be broken only by a value that is wrong anyway. Rules name the fields they read."""
    named = set(re.findall(r"\w+", f"{dotted(rule.path)} {rule.message} {rule.hint}"))
    return any(str(path[-1]) in named for path in map(_owner, wrong) if path)


def _owner(path: KeyPath) -> KeyPath:
    """The field that a list item or a free key belongs to; an unknown key is its own."""
    path = path[:-1] if path and isinstance(path[-1], int) else path
    above = entries().get(".".join(map(str, path[:-1])))
    return path[:-1] if above is not None and above.free else path


def _below(path: KeyPath, tops: Iterable[KeyPath]) -> bool:
    return any(path[: len(top)] == top for top in tops)


def _many(experiment: Experiment) -> Iterator[Finding]:
    """What is wrong with the values of a sweep and of `train.saes`, and with what they make."""
    found = [*_fields(experiment), *_saes(experiment)]
    yield from found
    num_saes = len(members(experiment)) or 1
    top = _top(experiment) or ("train", "saes")
    if (count := num_saes * _num_trials(experiment)) > MAX_TRIALS:
        yield Finding(
            top,
            f"makes {count:,} trials, more than {MAX_TRIALS:,}",
            "lower trials" if top[-1] == "space" else "list fewer values",
        )
        return
    if any(finding.at_key for finding in found):
        return
    if (few := _too_few(experiment)) is not None:
        yield few
        return
    seen: set[KeyPath] = set()
    for point in points(experiment):
        try:
            trial(experiment, point)
        except ValidationError as error:
            for finding in explain(error.errors(include_url=False)):
                placed = _at_axis(finding, experiment, point)
                if placed.path not in seen:
                    seen.add(placed.path)
                    yield placed


def _axes(experiment: Experiment) -> dict[str, Any]:
    """What each swept field is to take, as written."""
    sweep = experiment.sweep
    if sweep is None:
        return {}
    search = sweep.random or sweep.optuna
    return (sweep.grid or {}) if search is None else search.space


def _top(experiment: Experiment) -> KeyPath:
    """Where the swept fields are written; empty without a sweep."""
    sweep = experiment.sweep
    if sweep is None:
        return ()
    return ("sweep", "grid") if sweep.grid else ("sweep", "random" if sweep.random else "optuna", "space")


def _num_trials(experiment: Experiment) -> int:
    sweep = experiment.sweep
    if sweep is None or sweep.grid is not None:
        return math.prod(map(len, _axes(experiment).values()))
    search = sweep.random or sweep.optuna
    assert search is not None
    return search.trials


def _fields(experiment: Experiment) -> Iterator[Finding]:
    top = _top(experiment)
    for name, values in _axes(experiment).items():
        if locate(name) is None:
            yield Finding((*top, name), "unknown path", unknown(name), at_key=True)
        elif name.split(".")[0] in _NOT_SWEPT or name == "train.saes":
            yield Finding((*top, name), f"{name} cannot be swept", "sweep a field of train", at_key=True)
        elif top[-1] == "space":
            try:
                space.axis(name, values)
            except UserError as error:
                yield Finding((*top, name), error.message, error.hint, at_key=True)
        else:
            for index, value in enumerate(values):
                if value in values[:index]:
                    yield Finding((*top, name, index), f"{plain(value)} is listed twice", "list each value once")


def _too_few(experiment: Experiment) -> Finding | None:
    """A search that asks for more trials than its space has points."""
    if (top := _top(experiment))[-1:] != ("space",):
        return None
    most = space.num_points(space.axes(_axes(experiment)))
    if most is None or most >= _num_trials(experiment):
        return None
    return Finding(
        (*top[:-1], "trials"),
        f"asks for {_num_trials(experiment)} trials of a space of {most} points",
        f"lower trials to {most}, or use grid, which tries them all",
    )


def _saes(experiment: Experiment) -> Iterator[Finding]:
    own = members(experiment)
    for index, values in enumerate(own):
        top: KeyPath = ("train", "saes", index)
        if values in own[:index]:
            yield Finding(top, "is listed twice", "list each SAE once")
        for name in values:
            key = name.removeprefix("train.sae.")
            if name not in entries():
                yield Finding((*top, key), "unknown key", unknown(name), at_key=True)
            elif name in _axes(experiment):
                yield Finding(
                    (*top, key),
                    f"{'.'.join(map(str, _top(experiment)))} lists {name} too",
                    "keep one of the two",
                    at_key=True,
                )


def _at_axis(finding: Finding, experiment: Experiment, point: dict[str, Any]) -> Finding:
    """A trial's finding, at the value of the axis or of the SAE that it names, else at the axes or the list."""
    axes, own, top = _axes(experiment), members(experiment), _top(experiment)
    text = f"in the trial {', '.join(f'{name}={plain(value)}' for name, value in point.items())}"
    ours = {name: value for name, value in point.items() if name not in axes}
    for name, value in point.items():
        route = locate(name)
        if route is not None and finding.path[: len(route)] == route:
            path: KeyPath = ()
            if name in axes:
                path = (*top, name, axes[name].index(value)) if isinstance(axes[name], list) else (*top, name)
            if name in ours:
                path = ("train", "saes", own.index(ours), name.removeprefix("train.sae."))
            if not finding.rule:
                return Finding(path, finding.message, finding.hint)
            return Finding(path, f"{finding.message} ({text})", finding.hint)
    if ours and finding.rule and finding.path[:2] == ("train", "sae") and len(finding.path) == 3:
        key = finding.path[2]
        message = f"with what train.sae gives: {finding.message}"
        return Finding(("train", "saes", own.index(ours)), message, f"`{key}: null` here unsets it, or {finding.hint}")
    return Finding(top or ("train", "saes"), f"{finding.message} ({text})", finding.hint)
