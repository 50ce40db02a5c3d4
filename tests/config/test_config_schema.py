"""The editor schema: fresh, draft-07, and of one mind with the loader."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.nodes import parse
from plmsae_cli.config.schema import FILE, json_schema, text
from plmsae_cli.config.templates import NAMES, full_template, template
from plmsae_cli.config.tree import entries

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "experiments").rglob("*.yaml"))


def errors(document: Any) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    return [error.message for error in jsonschema.Draft7Validator(json_schema()).iter_errors(document)]


def test_the_committed_schema_is_fresh() -> None:
    committed = (ROOT / FILE).read_text(encoding="utf-8")
    assert committed == text(), "run: python -m plmsae_cli.config.schema"


def test_it_is_draft_07_and_nothing_newer() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft7Validator.check_schema(json_schema())
    assert not re.search(r'\$defs|x-science|"title": "(?!plmsae experiment)', text())
    references = set(re.findall(r'"#/definitions/(\w+)"', text()))
    assert references == set(json_schema()["definitions"])


def test_every_field_is_described() -> None:
    def walk(node: dict[str, Any], prefix: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, body in node["properties"].items():
            found[f"{prefix}{name}"] = body["description"]
            options = [body, *body.get("anyOf", []), *body.get("allOf", [])]
            for reference in (option["$ref"] for option in options if "$ref" in option):
                found |= walk(json_schema()["definitions"][reference.rpartition("/")[2]], f"{prefix}{name}.")
        return found

    assert walk(json_schema(), "") == {path: entry.help for path, entry in entries().items()}


@pytest.mark.parametrize("name", [*NAMES, "full"])
def test_templates_satisfy_it(name: str) -> None:
    assert errors(parse(full_template() if name == "full" else template(name), name).data) == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_satisfy_it(path: Path) -> None:
    assert errors(parse(path.read_text(encoding="utf-8"), path.name).data) == []


@pytest.mark.parametrize(
    "broken",
    [
        "wibble: 1", "embed: {fasta: x, layer: [1]}", "embed: {layers: [1]}", "embed: {fasta: x, layers: 1}",
        "wandb: {mode: 3}", "shuffle: {memory: big}", "train: {sae: {k: 0}}", "train: {lr: fast}", "name: A B",
        "sweep: {grid: {train.k: [1]}}", "sweep: {grid: {train.sae.k: []}}",
        "embed: {fasta: x, layers: [1], holdout: 1}",
    ],
)  # fmt: skip
def test_it_refuses_what_the_loader_refuses(broken: str, tmp_path: Path) -> None:
    from plmsae_cli.config.yaml import InvalidExperiment, load

    assert errors(parse(broken, "x").data)
    file = tmp_path / "exp.yaml"
    file.write_text(broken)
    with pytest.raises(InvalidExperiment):
        load(file)


@pytest.mark.parametrize("size", ["16GB", "512MiB", "1.5 TB", "16g", 1_000_000])
def test_sizes_that_the_loader_takes(size: str | int, tmp_path: Path) -> None:
    from plmsae_cli.config.yaml import load

    text = json.dumps({"embed": {"fasta": "x", "layers": [1], "shard": size}})
    file = tmp_path / "exp.yaml"
    file.write_text(text)
    assert load(file).experiment.embed is not None
    assert errors(json.loads(text)) == []
