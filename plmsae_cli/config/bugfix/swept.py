"""Swept values, and the list `train.saes`: few of them, as small as the rest, distinct where they were."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from plmsae_cli.config.bugfix.layers import listed
from plmsae_cli.config.bugfix.sizes import (
    ANNOTATED,
    CAPPED_PLM,
    MOST_ACTIVE,
    MOST_EXPANSION,
    MOST_OF_SAE,
    MOST_TRIALS,
    NO_ANSWERS,
    PLM_BATCH,
    ROWS,
    SMALL_FEATURES,
    SMALL_LM,
    SMALL_PLM,
    SMALL_STEERING,
    STEPS,
    WIDEST,
)
from plmsae_cli.config.tree import entries

# Swept numbers -> the largest that a smoke run permits. Two values above it become half of it and it.
_CAPPED: dict[str, float] = {
    "train.sae.k": MOST_ACTIVE,
    **{f"train.sae.{field}": most for field, most in MOST_OF_SAE.items()},
    "train.sae.expansion": MOST_EXPANSION,
    "train.sae.num_latents": WIDEST,
    "train.lr_warmup_steps": STEPS // 4,
    "train.dead_tokens": 2 * ROWS,
    "eval.fidelity.proteins": 8,
    **{f"train.plm.{field}": most for field, most in CAPPED_PLM.items()},
}
# The same, but replaced in any case: these must suit each other and the two ranks.
_SET: dict[str, float] = {
    "train.tokens": STEPS * ROWS,
    "train.batch_tokens": ROWS,
    "optimize.block_rows": ROWS,
    **{f"train.plm.{field}": most for field, most in SMALL_PLM.items()},
}
# Axes that name inputs, sizes or machines: a smoke run has one of each.
_FIXED = (
    "data_root", "launch", "storage", "model", "wandb", "limits", "embed.fasta", "embed.imported", "embed.shard",
    "embed.ordered_rows", "embed.compute", "embed.batch_tokens", "embed.compile", "embed.max_length", "shuffle.memory",
    "optimize.chunk", "train.data", "train.imported", "train.kernels", "train.compile",
    "train.compute", "train.log_every", "train.checkpoint_every", "train.plm.fasta", "train.plm.bin", "train.plm.valid",
    "eval.fidelity.batch_tokens", *(f"eval.steering.{field}" for field in SMALL_STEERING), "eval.structure",
    *(f"eval.{axis}" for axis in (*ANNOTATED, "representations")),
    *(f"eval.lm.{field}" for field in (*SMALL_LM, "fasta", "models")),
    *(f"eval.features.{field}" for field in SMALL_FEATURES),
    *(f"eval.features.describe.{field}" for field in NO_ANSWERS),
)  # fmt: skip


def cut_saes(saes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first two of the list, their numbers cut as those of a grid."""
    cut = [dict(sae) for sae in saes[:MOST_TRIALS]]
    for name in dict.fromkeys(name for sae in cut for name in sae):
        having = [sae for sae in cut if name in sae]
        for sae, value in zip(
            having, _cut_values(f"train.sae.{name}", [s[name] for s in having], {}, False), strict=True
        ):
            sae[name] = value
    for sae in cut:
        if sae.get("num_latents") is not None:
            sae["expansion"] = None
    return _distinct(cut)


def cut_sweep(sweep: dict[str, Any], layers: Mapping[int, int], train: dict[str, Any]) -> None:
    cut = _cut_grid(listed(sweep), layers, train)
    if sweep["grid"] is not None:
        sweep["grid"] = cut
        return
    search = sweep["random"] or sweep["optuna"]
    search |= {"space": cut, "trials": min(search["trials"], MOST_TRIALS, math.prod(map(len, cut.values())))}


def _cut_grid(
    grid: Mapping[str, Sequence[Any]], layers: Mapping[int, int], train: dict[str, Any]
) -> dict[str, list[Any]]:
    axes: dict[str, list[Any]] = {}
    trials = 1
    for path, values in grid.items():
        fixed = any(path == name or path.startswith(f"{name}.") for name in _FIXED)
        if fixed or entries()[path].section is not None:
            continue
        kept = list(values[:2]) if 2 * trials <= MOST_TRIALS else list(values[:1])
        trials *= len(kept)
        axes[path] = _cut_values(path, kept, layers, train["kind"] == "plm")
    if "train.sae.num_latents" in axes:
        train["sae"]["expansion"] = None
    return axes or {"train.seed": [0, 1]}


def _cut_values(path: str, values: list[Any], layers: Mapping[int, int], is_plm: bool) -> list[Any]:
    if path == "train.layer":
        return _distinct([value if value is None else layers[value] for value in values])
    if path == "embed.layers":
        return _distinct([list(dict.fromkeys(layers[layer] for layer in value)) for value in values])
    most = _SET.get(path, _CAPPED.get(path))
    numbers = sorted({value for value in values if isinstance(value, (int, float))})
    if most is None or not numbers or (path in _CAPPED and numbers[-1] <= most):
        return values
    if is_plm and path in ("train.tokens", "train.batch_tokens"):
        most *= PLM_BATCH // ROWS
    small = [most / 2 if isinstance(most, float) else most // 2, most][-len(numbers) :]
    replaced = dict(zip(numbers, small, strict=True))
    return [replaced.get(value, value) if isinstance(value, (int, float)) else value for value in values]


def _distinct(values: list[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value not in values[:index]]
