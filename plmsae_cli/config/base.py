"""What every section of the YAML shares: strictness, the science mark, and the small types."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field
from pydantic_core import PydanticCustomError

# A field with this mark changes results, so it enters the key of the artifact its section makes (or, under
# `train`, the identity of the run). Paths, names, memory, workers and other comforts never carry it.
SCIENCE = Field(json_schema_extra={"x-science": True})

ADDED = Field(json_schema_extra={"x-science": True, "x-added": True})
"""Science that came later: absent from keys at its default, so that what was made before keeps its own."""

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Rate = Annotated[float, Field(gt=0.0, lt=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Bytes = Annotated[ByteSize, Field(json_schema_extra={"type": "string"}, examples=["16GB", "512MiB"])]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class Section(BaseModel):
    """A section of the experiment: unknown keys are errors, nothing is converted in silence."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=False
    )

    def changed(self, name: str) -> bool:
        """Whether the field has another value than its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def require_each_once(self, *names: str) -> Self:
        """Itself. Raises a rule's error where one of these fields is a list that names something twice."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, list) and len(set(value)) != len(value):
                raise rule(name, f"{name} names one twice: {value}", "list each once")
        return self

    def science(self) -> dict[str, Any]:
        """The marked fields, nested sections included, as plain JSON values."""
        chosen: dict[str, Any] = {}
        for name, info in type(self).model_fields.items():
            extra = info.json_schema_extra
            if not (isinstance(extra, dict) and extra.get("x-science")):
                continue
            if extra.get("x-added") and not self.changed(name):
                continue
            value = getattr(self, name)
            chosen[name] = value.science() if isinstance(value, Section) else value
        return chosen


def rule(field: str, message: str, hint: str) -> PydanticCustomError:
    """A broken cross-field rule, to be raised in a section's validator; `field` (relative, dotted) places it."""
    # pydantic formats the template with the context, so braces in user text must not reach it.
    return PydanticCustomError("rule", "{text}", {"text": message, "field": field, "hint": hint})


def digest(value: Any) -> str:
    """Sixteen hex digits that stand for a JSON value: the key of an artifact or a run."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
