"""What an experiment would lack if it started now: looked at for all of a queue before the first begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plmsae_cli.config.experiment import Experiment


def lacks(experiment: Experiment, yes: bool) -> list[str]:
    """Each thing in a line: a folder that cannot be written, a bucket that does not answer, weights or inputs that are not there.

    Nothing is written or downloaded. Published weights that are absent are no problem: they are fetched at its turn.

    Args:
        yes: whatever `limits` say.
    """
    from plmsae_cli.cli.stage import reach, unwritable

    found = list(unwritable(experiment))
    remote = _refusal(lambda: reach(experiment, write=False))
    if remote is not None:  # what is behind it would be asked for with more patience
        return [*found, remote]
    plans = dict[str, None]()
    remaining = _refusal(lambda: plans.update((why, None) for why in _plans(experiment, yes)))
    return [*found, *plans, *([] if remaining is None else [remaining])]


def _plans(experiment: Experiment, yes: bool) -> Iterator[str]:
    """What each stage's plan refuses: inputs that are not there, settings that do not fit them."""
    from plmsae_cli.cli.limits import refuse_beyond
    from plmsae_cli.executors.pipeline import plan_stage
    from plmsae_cli.stages.sweep import foreseen
    from plmsae_cli.store.fs import Store
    from plmsae_cli.store.weights import PUBLISHED, resolve_weights

    store = Store(experiment.storage)
    for weights in experiment.published_weights():
        why = _refusal(lambda weights=weights: resolve_weights(weights, store, download=False))  # type: ignore[misc]
        if why is not None:
            if weights not in PUBLISHED:
                yield why
            return
    stages = [stage for stage in experiment.stages() if stage != "sweep"]
    own = [(stage, experiment) for stage in stages if not (stage == "eval" and experiment.swept)]
    if experiment.swept:
        first = foreseen(experiment)[0].experiment  # its turn plans them all
        own += [(stage, first) for stage in first.stages() if stage in ("train", "eval")]
    for stage, one in own:
        why = _refusal(lambda stage=stage, one=one: plan_stage(stage, one, store))  # type: ignore[misc]
        if why is not None:
            yield why
    if not yes and (why := _refusal(lambda: refuse_beyond(experiment, stages))) is not None:
        yield why


def _refusal(look: Callable[[], object]) -> str | None:
    """What a user is told; other errors are no matter of the experiment's, and come again at its turn."""
    from plmsae_cli.runtime.system_errors import as_user_error

    try:
        look()
    except Exception as error:
        words = as_user_error(error)
        return str(error) if words is None else words.message
    return None
