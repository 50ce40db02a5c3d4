"""YAML text to plain values that remember where they stood: texts, numbers, lists and mappings only."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from plmsae_cli.config import credentials
from plmsae_cli.config.problems import Problem, dotted, printable

KeyPath = tuple[str | int, ...]

_MOST_VALUES = 100_000  # aliases of aliases grow exponentially
_TAG = "tag:yaml.org,2002:"
_LINE_END = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # what YAML counts as one


@dataclass(frozen=True)
class Place:
    """Where a value stood: (line, column) of its key and of itself, from 0."""

    key: tuple[int, int]
    value: tuple[int, int]


@dataclass
class Document:
    """A YAML file read: its data, where each part stood, what is wrong with the text itself."""

    source: str
    data: Any = None
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    """The lines as they may be shown: secrets starred out."""
    empty: set[KeyPath] = field(default_factory=set)
    """Keys with nothing behind the colon."""
    refused: set[KeyPath] = field(default_factory=set)
    """Paths whose value is not in `data`, because a problem was found in it."""

    def problem(self, path: KeyPath, message: str, hint: str | None, at_key: bool = False) -> Problem:
        """A problem at `path`, or at the nearest part of it that the file contains."""
        stop = len(path)
        while stop and path[:stop] not in self.places:
            stop -= 1
        place = self.places.get(path[:stop], Place((0, 0), (0, 0)))
        # A section's own first line is its key's; where it begins is its first field.
        at_key = at_key or stop < len(path) or place.value[0] != place.key[0]
        spot = place.key if at_key else place.value
        return self.problem_at(spot, path, message, hint)

    def problem_at(self, spot: tuple[int, int], path: KeyPath, message: str, hint: str | None) -> Problem:
        """A problem at a (line, column) counted from 0."""
        line, column = spot
        snippet = printable(self.lines[line]) if line < len(self.lines) else ""
        return Problem(line + 1, column + 1, dotted(path), message, hint, self.source, snippet)


def parse(text: str, source: str) -> Document:
    """Read YAML 1.2. Problems of the text are collected; the data hold what could be read."""
    document = Document(source)
    lines = _LINE_END.split(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a re-used anchor name is harmless
            root = YAML(typ="safe", pure=True).compose(text)
        if root is None:
            document.lines = credentials.masked(lines)
            return document
        reader = _Reader(document, root)
        document.lines = credentials.masked(lines, reader.hidden.values())
        document.data = reader.value(root, ())
    except _Endless:
        message, hint = "anchors refer to each other without end", "write the values out"
        document.problems.append(Problem(0, 0, "", message, hint, source))
    except RecursionError:
        document.problems.append(Problem(0, 0, "", "nested too deeply to be an experiment", None, source))
    except YAMLError as error:
        document.lines = credentials.masked_unparsed(lines)
        document.problems.append(_syntax(document, error, text))
    return document


class _Endless(Exception):
    pass


class _Reader:
    """Turns composed nodes into plain values and notes every place and every problem on the way."""

    def __init__(self, document: Document, root: Node) -> None:
        self.document = document
        self.constructor = YAML(typ="safe", pure=True).constructor
        self.hidden: dict[int, credentials.Span] = {}
        self.budget = _MOST_VALUES
        self.open: set[int] = set()
        self._find_secrets(root, False, set())

    def value(self, node: Node, path: KeyPath) -> Any:
        """The plain value of a node, None where it is refused."""
        self.budget -= 1
        if self.budget < 0 or id(node) in self.open:
            raise _Endless
        self.open.add(id(node))
        try:
            if isinstance(node, MappingNode) and node.tag == f"{_TAG}map":
                return self._mapping(node, path)
            if isinstance(node, SequenceNode) and node.tag == f"{_TAG}seq":
                return [self._item(child, (*path, index)) for index, child in enumerate(node.value)]
            if isinstance(node, ScalarNode):
                return self._scalar(node, path)
        finally:
            self.open.discard(id(node))
        return self._foreign(node, path)

    def _item(self, node: Node, path: KeyPath) -> Any:
        self.document.places[path] = Place(_start(node), _start(node))
        return self.value(node, path)

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        own: dict[str, Node] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, path)
            if key is None:
                continue
            if key in lines:
                message = f"written twice, first on line {lines[key]}"
                self._complain(key_node, (*path, key), message, "keep one of the two")
                continue
            lines[key] = key_node.start_mark.line + 1
            if key_node.tag == f"{_TAG}merge":
                merged = self._merge(value_node, path)
                continue
            own[key] = value_node
            at_key, at_value = _start(key_node), _start(value_node)
            blank = isinstance(value_node, ScalarNode) and not value_node.value and value_node.style is None
            self.document.places[*path, key] = Place(at_key, at_key if blank else at_value)
            if blank:
                self.document.empty.add((*path, key))
        result = {key: value for key, value in merged.items() if key not in own}
        for key, value_node in own.items():
            if credentials.is_secret(key) or id(value_node) in self.hidden:
                self._report_secret((*path, key))
            else:
                result[key] = self.value(value_node, (*path, key))
        return result

    def _key(self, node: Node, path: KeyPath) -> str | None:
        if isinstance(node, ScalarNode) and node.tag in {f"{_TAG}str", f"{_TAG}merge"}:
            return str(node.value)
        if isinstance(node, ScalarNode):
            self._complain(node, path, f"the key {node.value} is not text", "put it in quotes")
        else:
            self._complain(node, path, "a key must be text", None)
        return None

    def _merge(self, node: Node, path: KeyPath) -> dict[str, Any]:
        parts = node.value if isinstance(node, SequenceNode) else [node]
        result: dict[str, Any] = {}
        for part in parts:
            values = self.value(part, path) if isinstance(part, MappingNode) else None
            if values is None:
                self._complain(part, path, "`<<` merges sections only", "as in `<<: *base`")
                continue
            result = {**values, **result}
        return result

    def _scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        kind = str(node.tag).removeprefix(_TAG)
        # Dates have no field here, and `=` is YAML 1.1: both are the text that the user sees.
        if kind in {"str", "timestamp", "value"}:
            if credentials.in_address(node.value):
                self._report_secret(path)
                return credentials.clean_address(node.value)
            return str(node.value)
        if kind not in {"null", "bool", "int", "float"}:
            return self._foreign(node, path)
        if kind == "int" and not re.search(r"\d", node.value):
            return str(node.value)  # ruamel takes `-_` for a number, then fails on it
        try:
            value = self.constructor.construct_object(node)
        except (ValueError, KeyError, YAMLError):
            self._refuse(node, path, f"not a value of type {kind}", None)
            return None
        if isinstance(value, float) and not math.isfinite(value):
            self._refuse(node, path, f"must be a finite number, found {node.value}", None)
            return None
        return value

    def _foreign(self, node: Node, path: KeyPath) -> None:
        self._refuse(node, path, "YAML tags have no meaning here", "remove the word that begins with `!`")

    def _complain(self, node: Node, path: KeyPath, message: str, hint: str | None) -> None:
        self.document.problems.append(self.document.problem_at(_start(node), path, message, hint))

    def _refuse(self, node: Node, path: KeyPath, message: str, hint: str | None) -> None:
        self._complain(node, path, message, hint)
        self.document.refused.add(path)

    def _report_secret(self, path: KeyPath) -> None:
        self.document.problems.append(self.document.problem(path, credentials.MESSAGE, credentials.HINT, at_key=True))
        self.document.refused.add(path)

    def _find_secrets(self, node: Node, inside: bool, seen: set[tuple[int, bool]]) -> None:
        # Nodes, not paths: an alias elsewhere leads to the same node.
        if (id(node), inside) in seen:
            return
        seen.add((id(node), inside))
        if inside or (isinstance(node, ScalarNode) and credentials.in_address(node.value)):
            start, end = node.start_mark, node.end_mark
            span = (start.line, start.column, end.line, end.column)
            self.hidden.update({id(node): span} if inside else {-id(node): span})
        if isinstance(node, SequenceNode):
            for child in node.value:
                self._find_secrets(child, inside, seen)
        elif isinstance(node, MappingNode):
            for key, child in node.value:
                named = isinstance(key, ScalarNode) and credentials.is_secret(str(key.value))
                self._find_secrets(child, inside or named, seen)


def _start(node: Node) -> tuple[int, int]:
    return node.start_mark.line, node.start_mark.column


def _syntax(document: Document, error: YAMLError, text: str) -> Problem:
    if isinstance(error, ReaderError):
        before = text[: error.position]
        spot = (before.count("\n"), len(before) - before.rfind("\n") - 1)
        return document.problem_at(spot, (), "a control character cannot stand in YAML", "delete it")
    assert isinstance(error, MarkedYAMLError), error
    problem, mark = error.problem or error.context or "", error.problem_mark or error.context_mark
    message, hint = f"not valid YAML: {problem.removeprefix('but ')}", None
    for sign, (words, advice, at_opening) in _SYNTAX.items():
        if sign in problem:
            message, hint = words, advice
            mark = error.context_mark or mark if at_opening else mark
            break
    return document.problem_at((mark.line, mark.column), (), message, hint)


_SYNTAX = {
    "character '\\t'": ("a tab cannot stand here", "use spaces", False),
    "cannot start any token": ("a value cannot begin with this character", "put the value in quotes", False),
    "mapping values are not allowed": (
        "a key cannot stand here",
        "one `key: value` a line, keys of a section in one column; quote a value that contains `: `",
        False,
    ),
    "could not find expected ':'": ("this line has no colon", "write `key: value`", False),
    "expected ',' or ']'": ("a list is not closed", "end it with `]`, with commas between the values", True),
    "expected ',' or '}'": ("a section in braces is not closed", "end it with `}`, commas in between", True),
    "unexpected end of stream": ("a quote is not closed", "end the text with the quote that began it", True),
    "expected <block end>": (
        "the indentation does not fit the lines above",
        "keys of one section start in the same column",
        False,
    ),
    "undefined alias": (
        "no anchor of this name stands above",
        "define it with `&name`, or quote the value",
        False,
    ),
    "another document": ("a second document begins here", "one experiment a file", False),
}
