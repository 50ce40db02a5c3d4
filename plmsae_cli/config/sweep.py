"""The section of many trainings on one dataset."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from plmsae_cli.config.base import Count, Section, Whole, rule

Space = Annotated[dict[str, Any], Field(min_length=1)]
"""Dotted field -> values to choose from, or `{low, high, log}` to draw between; `config/space.py` reads it."""


class Random(Section):
    """Points drawn at random, known before the first is trained."""

    trials: Count = 20
    """Points to draw; more of them later keep the first."""
    seed: Whole = 0
    """Seed of the draws."""
    space: Space
    """Dotted field -> values such as `[16, 32, 64]`, or a range such as `{low: 1e-5, high: 1e-3, log: true}`."""


class Optuna(Section):
    """Points chosen one after the other from what those before gave (`pip install plmsae[optuna]`)."""

    trials: Count = 20
    """Points to try, failed and pruned ones included."""
    seed: Whole = 0
    """Seed of the choices: the same results lead to the same points."""
    space: Space
    """As in `random`: dotted field -> values such as `[16, 32, 64]`, or a range such as `{low: 1e-5, high: 1e-3, log: true}`."""
    metric: Literal["fvu", "cosine", "recovered_zero", "recovered_mean", "loss"] = "fvu"
    """What to improve: a figure of the evaluation; without an eval section `fvu` or `loss` at the end of training."""
    direction: Literal["auto", "minimize", "maximize"] = "auto"
    """`auto`: `fvu` and `loss` down, the others up."""
    startup_trials: Count = 5
    """Trials at the start that are drawn at random, and none pruned."""
    prune: Literal["none", "median"] = "none"
    """`median`: end a trial whose FVU (of a language model: loss) at a checkpoint is worse than the median of the
    trials before it at that step."""

    def goal(self) -> Literal["minimize", "maximize"]:
        """Which way is better."""
        if self.direction != "auto":
            return self.direction
        return "minimize" if self.metric in ("fvu", "loss") else "maximize"


class Sweep(Section):
    """Many runs over one dataset: every combination of listed values (`grid`), or a search (`random`, `optuna`)."""

    grid: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)] | None = None
    """Dotted field -> values, such as `train.sae.k: [16, 32, 64]`; any field of the experiment."""
    random: Random | None = None
    """Instead of `grid`: points drawn from a space."""
    optuna: Optuna | None = None
    """Instead of `grid`: points chosen by Optuna, each after the results of those before."""
    stream: Literal["each", "shared"] = "each"
    """`each`: each trial reads the dataset; on GPUs as many train at the same time as there are, one GPU each. `shared`:
    SAEs that read the same blocks in the same order train side by side on one reading."""

    @model_validator(mode="after")
    def _one_kind(self) -> Sweep:
        given = [name for name in ("grid", "random", "optuna") if getattr(self, name) is not None]
        if not given:
            raise rule("", "a sweep needs grid, random or optuna", "add `grid: {train.sae.k: [16, 32, 64]}`")
        if len(given) > 1:
            raise rule(given[1], f"{' and '.join(given)} both say what is tried", "keep one of them")
        if self.optuna is not None and self.stream == "shared":
            raise rule(
                "stream",
                "optuna chooses each trial after those before it, stream: shared trains all at once",
                "remove stream, or use random",
            )
        return self
