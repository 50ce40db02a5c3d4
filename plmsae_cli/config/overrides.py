"""Changes from outside the file: `--set train.lr=1e-4`, and the points of a sweep."""

from __future__ import annotations

import copy
import difflib
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from plmsae_cli.config import credentials, names, nodes, space
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.problems import OVERRIDE
from plmsae_cli.config.tree import entries, locate

__all__ = ["apply", "members", "parse", "points", "trial"]


def parse(argument: str) -> tuple[str, Any]:
    """Read one `path=value`, the value as YAML 1.2.

    Raises UserError, which never repeats the value, for a malformed argument or an unknown path.
    """
    path, equals, text = argument.partition("=")
    path = path.strip()
    # What is not a path may be anything, a secret too.
    shown = f"{path}: " if re.fullmatch(r"[\w.-]+", path) else ""
    if credentials.is_secret(path):
        raise UserError(f"{shown}{credentials.MESSAGE}", credentials.HINT)
    if not equals or not path:
        raise UserError(f"{shown}must be path=value", "as in --set train.lr=1e-4")
    if locate(path) is None:
        raise UserError(f"{shown}unknown path", unknown(path))
    if not text.strip():
        raise UserError(f"{path}: no value behind the =", "null takes the default, or switches a section off")
    document = nodes.parse(text, OVERRIDE)
    if document.problems:
        problem = document.problems[0]
        raise UserError(f"{path}: {problem.message}", problem.hint)
    return path, document.data


def apply(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an experiment's raw data with the values at dotted paths replaced; absent sections appear.

    None stands for itself where the field or section permits it and unsets the field elsewhere. Raises
    UserError for a path that the tree does not have or that leads through something other than a section.
    """
    result = copy.deepcopy(dict(data))
    for path, value in overrides.items():
        route = locate(path)
        if route is None:
            raise UserError(f"{path}: unknown path", unknown(path))
        at = result
        for key in route[:-1]:
            if at.get(key) is None:
                at[key] = {}
            at = at[key]
            if not isinstance(at, dict):
                raise UserError(f"{path}: {key} is not a section in this experiment")
        entry = entries().get(path)
        if value is None and not (entry and entry.nullable):
            at.pop(route[-1], None)
        else:
            at[route[-1]] = copy.deepcopy(value)
    return result


def unknown(path: str) -> str:
    """The hint for a dotted path that does not exist."""
    parts = path.split(".")
    depth = next(n for n in range(len(parts) - 1, -1, -1) if n == 0 or ".".join(parts[:n]) in entries())
    section = ".".join(parts[:depth])
    if section and entries()[section].section is None:
        return f"did you mean {section}?"
    hint, guesses = names.unknown(section, parts[depth])
    rest = ".".join(parts[depth + 1 :])
    whole = [f"{guess}.{rest}" for guess in guesses if rest and f"{guess}.{rest}" in entries()]
    if whole:
        return f"did you mean {' or '.join(whole)}?"
    if rest or not (guesses or section):
        close = difflib.get_close_matches(path, list(entries()), 1, 0.7)
        return f"did you mean {close[0]}?" if close else hint
    return hint


def points(experiment: Experiment) -> Iterator[dict[str, Any]]:
    """What is trained, as values by dotted path: `train.saes` in their order, for each the sweep's points.

    A grid's last axis is the fastest. What Optuna will choose is not known: the corners of its space stand for it.
    """
    for own in members(experiment) or [{}]:
        for values in _searched(experiment):
            yield {**values, **own}


def _searched(experiment: Experiment) -> Iterator[dict[str, Any]]:
    sweep = experiment.sweep
    if sweep is None:
        yield {}
    elif sweep.random is not None:
        yield from space.draw(sweep.random.space, sweep.random.trials, sweep.random.seed)
    elif sweep.optuna is not None:
        yield from space.corners(sweep.optuna.space)
    else:
        axes = sweep.grid or {}
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values, strict=True))


def members(experiment: Experiment) -> list[dict[str, Any]]:
    """What each of `train.saes` has of its own, by dotted path."""
    assert experiment.train is not None
    return [{f"train.sae.{name}": value for name, value in own.items()} for own in experiment.train.saes or ()]


def trial(experiment: Experiment, point: Mapping[str, Any]) -> Experiment:
    """The experiment of one point of the sweep, without the sweep. Raises pydantic's ValidationError."""
    alone = {"sweep": None, **({"train.saes": None} if members(experiment) else {})}
    return Experiment.model_validate(apply(experiment.dump(), {**point, **alone}))
