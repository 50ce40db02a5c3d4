"""`limits`: what a plan foretells, against what a start may take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plmsae_cli.cli.show import bytes_to_make, nested, size

if TYPE_CHECKING:
    from plmsae_cli.config.experiment import Experiment
    from plmsae_cli.config.launching import Price
    from plmsae_cli.runtime.task import Plan
    from plmsae_cli.store.fs import Store


@dataclass(frozen=True)
class Forecast:
    """What plans would take together."""

    gpu_hours: float
    bytes: int
    usd: float


def forecast(plans: Sequence[Plan], price: Price, gpus: int) -> Forecast:
    """Of what is not done yet; hours on `gpus` GPUs, as `embed` predicts them."""
    left = [plan for plan in plans if not plan.done]
    hours = gpus * sum(float(plan.figures.get("hours", 0.0)) for plan in left)
    made = bytes_to_make(left)
    requests = sum(usd for plan in left for usd in nested("usd_requests", plan.figures))
    usd = hours * (price.gpu_hour or 0.0) + made / 1e12 * (price.tb_day or 0.0) + requests
    return Forecast(hours, made, usd)


def beyond(experiment: Experiment, found: Forecast) -> list[str]:
    """A sentence for each limit that the forecast is beyond."""
    limits = experiment.limits
    told = []
    if limits.gpu_hours is not None and found.gpu_hours > limits.gpu_hours:
        told.append(f"{found.gpu_hours:,.4g} GPU hours are predicted, limits.gpu_hours is {limits.gpu_hours:,g}")
    if limits.bytes is not None and found.bytes > limits.bytes:
        told.append(f"{size(found.bytes)} of data would be made, limits.bytes is {size(limits.bytes)}")
    if limits.usd is not None and found.usd > limits.usd:
        told.append(f"{found.usd:,.2f} dollars are predicted, limits.usd is {limits.usd:,g}")
    return told


def refuse_beyond(experiment: Experiment, stages: Sequence[str]) -> None:
    """Plan the stages as they would run.

    Raises:
        UserError: a figure is beyond its limit.
    """
    from plmsae_cli.config.errors import UserError
    from plmsae_cli.config.launching import Limits
    from plmsae_cli.executors.pipeline import DATA_STAGES, plan_stage, wanted_layers
    from plmsae_cli.runtime.device import count_gpus
    from plmsae_cli.store.fs import Store

    if experiment.limits == Limits():
        return
    store = Store(experiment.storage)
    # Layers whose dataset is there are not embedded again; training has no forecast.
    plans = [plan_stage(s, experiment, store, wanted_layers(s, experiment, store)) for s in stages if s in DATA_STAGES]
    if told := beyond(experiment, forecast(plans, experiment.price, count_gpus(experiment.launch))):
        raise UserError(
            "\n".join([*told, *_nearest(experiment, [plan.stage for plan in plans if not plan.done], store)]),
            "`--dry-run` shows the plan; `--yes` starts it all the same, or raise the limit",
        )


def _nearest(experiment: Experiment, stages: Sequence[str], store: Store) -> list[str]:
    """Of the first artifact that is to be made: the one that is there and differs from it in the fewest settings."""
    from plmsae_cli.executors.pipeline import wanted_layers
    from plmsae_cli.runtime.run_folder import differences
    from plmsae_cli.store.fs import join
    from plmsae_cli.store.housekeeping import DATA_FOLDER, FREED
    from plmsae_cli.store.lineage import Lineage
    from plmsae_cli.store.manifest import MANIFEST

    stage = stages[0]
    ref = getattr(Lineage(experiment, store), stage)(wanted_layers(stage, experiment, store)[0])
    data = experiment.data_folder()
    found = []
    for name in sorted(store.list(data)):
        folder, _, record = name.partition("/")
        kind = DATA_FOLDER.fullmatch(folder)
        if kind is None or kind.group(1) != stage or record not in (MANIFEST, FREED):
            continue
        known = json.loads(store.read(join(data, name)))
        inputs = [f"another {what}" for what in ref.inputs if known["inputs"].get(what) != ref.inputs[what]]
        settings = differences(known["config"], json.loads(json.dumps(ref.config)))
        found.append((folder, [*(f"{stage}.{where}: {old!r} -> {new!r}" for where, old, new in settings), *inputs]))
    if not found:
        return []
    folder, changes = min(found, key=lambda one: len(one[1]))
    return [f"the nearest that is there, {join(data, folder)}, differs in {', '.join(changes)}"]
