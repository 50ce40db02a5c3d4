"""pydantic's findings in words for people."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import ByteSize
from pydantic_core import ErrorDetails

from plmsae_cli.config import names
from plmsae_cli.config.nodes import KeyPath
from plmsae_cli.config.tree import Entry, entries, field_of, keys, limits, options, plain, words

_BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
_UNITS = {"%": 0.01, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


@dataclass(frozen=True)
class Finding:
    """A mistake in the data; `rule`: about several fields, `meant`: the path an unknown key stood for."""

    path: KeyPath
    message: str
    hint: str | None
    at_key: bool = False
    rule: bool = False
    meant: str | None = None


def explain(errors: Sequence[ErrorDetails]) -> list[Finding]:
    """One finding a path: the branches of a union fail one by one, the user made one mistake."""
    found: dict[KeyPath, Finding] = {}
    for error in errors:
        finding = _explain(error)
        found.setdefault(finding.path, finding)
    return list(found.values())


def _explain(error: ErrorDetails) -> Finding:
    kind, loc = error["type"], error["loc"]
    if kind == "rule":
        context = error.get("ctx", {})
        field = tuple(part for part in str(context["field"]).split(".") if part)
        return Finding((*loc, *field), context["text"], context["hint"], rule=True)
    if kind == "extra_forbidden":
        advice, guesses = names.unknown(".".join(map(str, loc[:-1])), str(loc[-1]))
        return Finding(loc, "unknown key", advice, at_key=True, meant=guesses[0] if guesses else None)
    field = field_of(loc)
    if not field:
        return Finding((), f"must be a mapping of keys, found {_found(error['input'])}", TOP)
    entry = entries()[".".join(field)]
    # Behind the field come list indices and free keys, then the names of union branches, which nobody wrote.
    rest = loc[len(field) :]
    kept = tuple(part for i, part in enumerate(rest) if isinstance(part, int) or (entry.free and i == 0))
    path = (*field, *kept)
    if kind == "missing":
        sentence = entry.help.partition(". ")[0].rstrip(".")
        what = sentence if len(sentence) < 80 else entry.words()
        return Finding(path, "is missing", f"add `{field[-1]}`: {what}", at_key=True)
    message, hint = _mismatch(entry, kept, kind, error)
    return Finding(path, message, hint)


def _mismatch(entry: Entry, inner: KeyPath, kind: str, error: ErrorDetails) -> tuple[str, str | None]:
    annotation, metadata, value = entry.annotation, entry.metadata, error["input"]
    if inner:
        annotation, metadata = _item(entry, inner), ()
    if entry.section is not None:
        return f"must be a section, found {_found(value)}", f"its keys: {', '.join(keys(entry.path))}"
    choices = options(annotation, metadata)
    if kind == "string_pattern_mismatch":
        text = "must be 1 to 64 of a-z 0-9 . _ - and begin with a letter or a digit"
        return f"{text}, found {_found(value)}", f"write {legal_name(str(value))}"
    if kind in {"too_short", "too_long"}:
        return _length(error)
    if kind in _BOUNDS and len(choices) == 1:
        bound = limits(choices[0][1]).removeprefix("of ")
        return f"must be {bound}, found {plain(value)}", _share(choices[0][1], value)
    hint = _hint(choices, value)
    if value is None and not entry.required and not inner:
        hint = f"remove the line for the default: {plain(entry.default)}"
    if any(option is ByteSize for option, _ in choices):
        return f"must be a size, found {_found(value)}", hint
    text = words(annotation, metadata, bounds=len(choices) > 1)
    if all(get_origin(option) is Literal for option, _ in choices):
        return f"must be {text}", hint
    return f"must be {text}, found {_found(value)}", hint


def legal_name(text: str) -> str:
    """The nearest legal name of a run: lower case, bad characters to `-`."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).lstrip("._-")[:64].rstrip("-") or "experiment"


TOP = "a file begins with keys such as `embed:` and `train:`; `plmsae init` writes an example"


def _item(entry: Entry, inner: KeyPath) -> Any:
    annotation = entry.annotation
    for _ in inner:
        kind = next(option for option, _ in options(annotation) if get_origin(option) in (list, dict))
        annotation = get_args(kind)[-1]
    return annotation


def _length(error: ErrorDetails) -> tuple[str, str | None]:
    context = error.get("ctx", {})
    bound = context.get("min_length", context.get("max_length"))
    if bound == 1:
        return "must not be empty", "write at least one, or remove the line"
    return f"must hold {bound} values, found {context['actual_length']}", None


def _share(metadata: Sequence[Any], value: float) -> str | None:
    upper = [getattr(item, name) for item in metadata for name in ("lt", "le") if hasattr(item, name)]
    return f"a share: write {value / 100:g} for {value:g} %" if upper == [1.0] and 1 < value < 100 else None


def _hint(choices: Sequence[tuple[Any, Any]], value: Any) -> str | None:
    kinds = [option for option, _ in choices]
    if ByteSize in kinds:
        return "write a size such as 16GB or 512MiB"
    literals = [str(word) for option in kinds if get_origin(option) is Literal for word in get_args(option)]
    if isinstance(value, str):
        near = difflib.get_close_matches(value.lower(), literals, 1, 0.5)
        if near:
            return f"did you mean {near[0]}?"
        if bool in kinds:
            return "YAML 1.2 knows true and false only"
        return _number_in(value, whole=float not in kinds) if int in kinds or float in kinds else None
    if isinstance(value, float) and int in kinds and value.is_integer():
        return f"write {int(value):_}"
    if str in kinds and isinstance(value, (int, float)):
        return f'put it in quotes: "{plain(value)}"'
    if any(get_origin(option) is list for option in kinds) and isinstance(value, (str, int, float)):
        return f"write [{plain(value)}]"
    return None


def _number_in(text: str, whole: bool) -> str | None:
    """How to write the number that a text seems to mean: quotes, `10M`, thousands with commas."""
    match = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?)\s*([kmbgt%]?)", text.strip().replace(",", "").lower())
    try:
        number = float(match.group(1)) * _UNITS.get(match.group(2), 1) if match else None
    except ValueError:
        return None
    if number is None or (whole and not number.is_integer()):
        return None
    return f"write {int(number):_}" if number.is_integer() else f"write {number:g}"


def _found(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 60 else f"{value[:57]}...", ensure_ascii=False)
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a section"
    return plain(value)
