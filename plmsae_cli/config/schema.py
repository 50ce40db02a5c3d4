"""The tree as JSON schema, for editors. `python -m plmsae_cli.config.schema` writes the committed file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.tree import entries

__all__ = ["FILE", "json_schema", "text"]

FILE = "plmsae.schema.json"

_SIZE = r"^\s*\d*\.?\d+\s*([kKmMgGtT]?i?[bB]?)\s*$"
_AXIS = {
    "anyOf": [
        {"type": "array", "minItems": 1},
        {
            "type": "object",
            "required": ["low", "high"],
            "additionalProperties": False,
            "properties": {"low": {"type": "number"}, "high": {"type": "number"}, "log": {"type": "boolean"}},
        },
    ]
}
# What pydantic adds and editors do not need; `title` would hide the description in some.
_NOISE = {"title", "x-science"}


def json_schema() -> dict[str, Any]:
    """The experiment as JSON schema draft-07, in the subset that yaml-language-server understands."""
    raw = Experiment.model_json_schema()
    definitions = raw.pop("$defs")
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "plmsae experiment",
        **_converted(raw),
        "definitions": {name: _converted(body) for name, body in definitions.items()},
    }
    # Completion inside the grid: its keys are the tree's own paths.
    fields = {"anyOf": [{"enum": list(entries())}, {"pattern": r"^train\.plm\.valid\."}]}
    schema["definitions"]["Sweep"]["properties"]["grid"]["anyOf"][0]["propertyNames"] = fields
    for search in ("Random", "Optuna"):
        space = schema["definitions"][search]["properties"]["space"]
        space |= {"propertyNames": fields, "additionalProperties": _AXIS}
    # Any part of an SAE section: `sae` says the rest.
    schema["definitions"]["Train"]["properties"]["saes"]["anyOf"][0]["items"] = {"$ref": "#/definitions/SAE"}
    schema["definitions"]["Embed"]["anyOf"] = [{"required": ["fasta"]}, {"required": ["imported"]}]
    return schema


def text() -> str:
    """The committed file's content."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def _converted(node: Any, names: bool = False) -> Any:
    """Draft 2020-12 to draft-07; `names` says that the keys of `node` are fields, not keywords."""
    if isinstance(node, list):
        return [_converted(item) for item in node]
    if not isinstance(node, dict):
        return node
    if names:
        return {name: _converted(body) for name, body in node.items()}
    result = {}
    for key, value in node.items():
        if key == "default":
            result[key] = value
        elif key == "description":
            result[key] = " ".join(value.split())
        elif key not in _NOISE:
            result[key] = _converted(value, names=key == "properties")
    if "$ref" in result:
        # Draft-07 ignores whatever stands beside $ref, so the reference moves into allOf.
        reference = {"$ref": result.pop("$ref").replace("#/$defs/", "#/definitions/")}
        result = {"allOf": [reference], **result} if result else reference
    if result.get("examples") and "anyOf" in result:
        result.pop("type", None)
        result["anyOf"] = [{"type": "string", "pattern": _SIZE}, {"type": "integer", "minimum": 0}]
    return result


def main() -> None:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else FILE)
    target.write_text(text(), encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
