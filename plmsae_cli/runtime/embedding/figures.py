"""What an embedding took: how busy the device was, who waited for whom, how much was padding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields


@dataclass
class Figures:
    """Of one shard, or added up over several."""

    residues: int = 0
    tokens: int = 0
    """Computed, padding included."""
    pad_tokens: int = 0
    passes: int = 0
    seconds: float = 0.0
    """Of the process, from shard to shard."""
    busy_seconds: float = 0.0
    """In which the device computed."""
    wait_seconds: float = 0.0
    """In which it could not go on because rows had not left the ring of host buffers."""
    write_seconds: float = 0.0
    """In which the shard's files were written, beside the next shard's computation."""

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}

    def add(self, other: Mapping[str, float]) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + other.get(field.name, 0))


def summary(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Shares and rates over shards that each process made one after the other; empty without a shard's figures.

    `residues_per_second` is that of one process while it had work, `busy`, `waited` and `writing` are shares of its time,
    `padding` of the tokens.
    """
    total = Figures()
    for part in parts:
        total.add(part)
    if not total.tokens or not total.seconds:
        return {}
    return {
        "residues_per_second": round(total.residues / total.seconds, 1),
        "busy": round(total.busy_seconds / total.seconds, 4),
        "waited": round(total.wait_seconds / total.seconds, 4),
        "writing": round(total.write_seconds / total.seconds, 4),
        "padding": round(total.pad_tokens / total.tokens, 4),
        "passes": total.passes,
    }
