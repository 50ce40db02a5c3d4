"""Configurations of other tools as experiments of ours: a file here for each tool.

A module has `NAME`, `recognises(document)`, whether a parsed file is one of that tool, and `convert(text)`, the experiment as
YAML with a note for each setting that has no counterpart.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Protocol

from plmsae_cli.config import nodes
from plmsae_cli.config.errors import UserError


class Tool(Protocol):
    """What a module here offers."""

    NAME: str

    def recognises(self, document: Mapping[str, Any]) -> bool: ...
    def convert(self, text: str) -> tuple[str, list[str]]: ...


def tools() -> Iterator[Tool]:
    """Every tool whose configurations can be read, by the names of the files."""
    for found in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        module: Any = import_module(f"{__name__}.{found.name}")
        if hasattr(module, "recognises"):
            yield module


def parse(text: str) -> dict[str, Any]:
    """JSON or YAML. Raises UserError for what is neither, or no mapping."""
    try:
        document = json.loads(text)
    except ValueError:
        read = nodes.parse(text, "--from")
        if read.problems:
            raise UserError(f"neither JSON nor YAML: {read.problems[0].message}", "name the tool's own file") from None
        document = read.data
    if not isinstance(document, dict):
        raise UserError(
            "a configuration is a mapping of names to values, this file is none", "name the tool's own file"
        )
    return document


def convert(text: str) -> tuple[str, list[str]]:
    """The experiment as YAML, and notes. Raises UserError where no tool recognises the text."""
    document = parse(text)
    for tool in tools():
        if tool.recognises(document):
            return tool.convert(text)
    known = ", ".join(tool.NAME for tool in tools())
    raise UserError("no known tool has written this configuration", f"known: {known}")
