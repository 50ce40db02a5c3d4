"""The experiment's tree, walked: every dotted path with its type in words, its default and its help."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ByteSize
from pydantic.fields import FieldInfo

from plmsae_cli.config.base import Section
from plmsae_cli.config.experiment import Experiment

SIZE_WORDS = "a size such as 16GB or 512MiB"


@dataclass(frozen=True)
class Entry:
    """One field of the tree: a leaf, or a section where `section` is set."""

    path: str
    help: str
    annotation: Any
    metadata: tuple[Any, ...]
    required: bool
    default: Any
    section: type[Section] | None
    nullable: bool

    @property
    def free(self) -> bool:
        """Whether the field is a mapping whose keys the user chooses."""
        return any(get_origin(plain) is dict for plain, _ in options(self.annotation, self.metadata))

    def words(self) -> str:
        """The type for people, such as `a whole number of at least 1`."""
        return words(self.annotation, self.metadata)


@cache
def entries() -> dict[str, Entry]:
    """Every field by its dotted path, sections before their fields, in the order of the tree."""
    return {entry.path: entry for entry in _walk(Experiment, "")}


def describe() -> list[tuple[str, str, str, str]]:
    """Rows (path, type, default, help) of every field, for `init --full` and the docs."""
    rows = []
    for path, entry in entries().items():
        kind = entry.words() + (" or null" if entry.nullable and entry.section is None else "")
        rows.append((path, kind, "required" if entry.required else plain(entry.default), entry.help))
    return rows


def keys(section: str) -> list[str]:
    """The names a section holds; `""` is the top of the file."""
    prefix = f"{section}." if section else ""
    names = (path.removeprefix(prefix) for path in entries() if path.startswith(prefix))
    return [name for name in names if "." not in name]


def locate(dotted: str) -> tuple[str, ...] | None:
    """The keys that lead to a dotted path, or None where the tree has no such path.

    Below a mapping of free keys (`sweep.grid`, `train.plm.valid`) the rest is one key, dots included.
    """
    if dotted in entries():
        return tuple(dotted.split("."))
    for path, entry in entries().items():
        if entry.free and dotted.startswith(f"{path}.") and dotted != f"{path}.":
            return (*path.split("."), dotted.removeprefix(f"{path}."))
    return None


def field_of(path: Sequence[str | int]) -> tuple[str, ...]:
    """The longest beginning of `path` that is a field: list items and free keys are cut off."""
    for stop in range(len(path), 0, -1):
        if ".".join(str(part) for part in path[:stop]) in entries():
            return tuple(str(part) for part in path[:stop])
    return ()


def plain(value: Any) -> str:
    """A value as a user would write it in YAML, on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(plain(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {plain(item)}' for key, item in value.items())}}}"
    if isinstance(value, Section):
        return "{}"
    return str(value)


def words(annotation: Any, metadata: Sequence[Any] = (), bounds: bool = True) -> str:
    """A type for people; `bounds` adds the permitted range of numbers."""
    found = options(annotation, metadata)
    # Literals first and as one: `auto or a whole number` reads better than the reverse.
    choices = [choice for kind, _ in found if get_origin(kind) is Literal for choice in get_args(kind)]
    texts = [_one(kind, extra, bounds) for kind, extra in found if get_origin(kind) is not Literal]
    if choices:
        texts.insert(0, f"one of: {', '.join(map(str, choices))}" if len(choices) > 1 else str(choices[0]))
    return " or ".join(texts)


def limits(metadata: Sequence[Any]) -> str:
    """The permitted range of a number, such as `of at least 1`; empty where there is none."""
    found: dict[str, float] = {}
    for item in metadata:
        for name in ("ge", "gt", "le", "lt"):
            if getattr(item, name, None) is not None:
                found[name] = getattr(item, name)
    bound = {name: f"{value:g}" for name, value in found.items()}
    if len(bound) == 2:
        low = bound.get("ge", bound.get("gt"))
        high = bound.get("le", bound.get("lt"))
        start = "of at least" if "ge" in bound else "above"
        return f"{start} {low} and {'at most' if 'le' in bound else 'below'} {high}"
    text = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    return "".join(f"{text[name]} {value}" for name, value in bound.items())


def options(annotation: Any, metadata: Sequence[Any] = ()) -> list[tuple[Any, tuple[Any, ...]]]:
    """The alternatives of a type with the constraints of each; null left out."""
    if get_origin(annotation) is Annotated:
        kind, *extra = get_args(annotation)
        nested = [part.metadata if isinstance(part, FieldInfo) else [part] for part in extra]
        inner = [item for part in nested for item in part]
        return options(kind, (*metadata, *inner))
    if get_origin(annotation) in (Union, types.UnionType):
        return [option for part in get_args(annotation) for option in options(part, metadata)]
    return [] if annotation is type(None) else [(annotation, tuple(metadata))]


def _walk(section: type[Section], prefix: str) -> Iterator[Entry]:
    for name, info in section.model_fields.items():
        path = f"{prefix}{name}"
        kinds = [kind for kind, _ in options(info.annotation, info.metadata)]
        child = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
        yield Entry(
            path=path,
            help=" ".join((info.description or "").split()),
            annotation=info.annotation,
            metadata=tuple(info.metadata),
            required=info.is_required(),
            default=None if info.is_required() else info.get_default(call_default_factory=True),
            section=child,
            nullable=type(None) in get_args(info.annotation),
        )
        if child is not None:
            yield from _walk(child, f"{path}.")


def _one(kind: Any, metadata: Sequence[Any], bounds: bool) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is list:
        items = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts"}
        items["a mapping of names to values"] = "sections"
        if get_origin(args[0]) is Literal:
            return f"a list of these: {', '.join(map(str, get_args(args[0])))}"
        return "a list" if args[0] is Any else f"a list of {items[words(args[0], bounds=False)]}"
    if origin is dict:
        return "a mapping of names to values" if args[1] is not str else "a mapping of names to text"
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        ByteSize: SIZE_WORDS,
    }
    text = names.get(kind, "a section")
    return f"{text} {limits(metadata)}".strip() if bounds else text
