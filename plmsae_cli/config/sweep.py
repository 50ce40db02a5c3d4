"""The section of many trainings on one dataset."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from plmsae_cli.config.base import Section


class Sweep(Section):
    """Many runs over one dataset: every combination of the listed values."""

    grid: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]
    """Dotted field -> values, such as `train.sae.k: [16, 32, 64]`; any field of the experiment."""
    stream: Literal["each", "shared"] = "each"
    """`each`: trials train one after the other, each reads the dataset. `shared`: SAEs that read the same blocks in the
    same order train side by side on one reading."""
