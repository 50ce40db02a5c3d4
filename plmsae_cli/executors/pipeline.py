"""One experiment through its stages: plan, run, record. Make semantics: what exists and fits is never made again."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from plmsae_cli.config.errors import UserError, first_line
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.language_models import TRAINED
from plmsae_cli.executors.executor import Executor, PlanChanged, open_executor, plain_http
from plmsae_cli.executors.keep import free_unkept
from plmsae_cli.executors.locks import locked
from plmsae_cli.executors.torchrun import join_machines
from plmsae_cli.executors.trials import each_trial
from plmsae_cli.executors.worker import STAGE_MODULES, LocalContext, run_task
from plmsae_cli.runtime.device import count_gpus
from plmsae_cli.runtime.dist import in_gang
from plmsae_cli.runtime.foretold import dollars_a_second, foretell
from plmsae_cli.runtime.progress import LoggedReporter, Reporter, clock, keep
from plmsae_cli.runtime.run_folder import RunDiffers, RunFolder, beating
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted, Plan
from plmsae_cli.runtime.wandb_results import publish
from plmsae_cli.stages.sweep import trials
from plmsae_cli.store.fs import Store
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import read_manifest
from plmsae_cli.store.weights import resolve_weights

DATA_STAGES = ("embed", "shuffle", "optimize")
_PAIR = ("embed", "shuffle")


@dataclass(frozen=True)
class Done:
    """What a pass over an experiment did."""

    run: RunFolder
    stages: dict[str, float]
    """Stage -> seconds, of the stages that had something to do."""


def plan_stage(stage: str, experiment: Experiment, store: Store, layers: Sequence[int] | None = None) -> Plan:
    """The plan of one stage; `layers` narrows the data stages."""
    module = import_module(STAGE_MODULES[stage])
    plan: Plan = module.plan(experiment, store, layers) if stage in DATA_STAGES else module.plan(experiment, store)
    return plan


def wanted_layers(stage: str, experiment: Experiment, store: Store) -> list[int]:
    """Layers for which a data stage must run: those whose wanted artifact further down does not exist yet."""
    assert experiment.embed is not None
    lineage = Lineage(experiment, store)
    later = [s for s in DATA_STAGES[DATA_STAGES.index(stage) + 1 :] if getattr(experiment, s) is not None]
    return [
        layer
        for layer in experiment.embed.layers
        if not any(read_manifest(store, getattr(lineage, s)(layer).folder) for s in later)
    ]


def missing_inputs(stage: str, experiment: Experiment, store: Store) -> list[str]:
    """What a stage alone would lack: the folders that the stage before it has yet to finish."""
    lineage = Lineage(experiment, store)
    if stage in ("embed",) or (stage == "train" and experiment.train is not None and experiment.train.kind == "plm"):
        return []
    if stage in ("shuffle", "optimize"):
        assert experiment.embed is not None
        if experiment.embed.layout == "bucketed":  # embed makes what both read
            upstreams = [
                (layer, name, "embed") for layer in wanted_layers("embed", experiment, store) for name in _PAIR
            ]
        else:
            before = {"shuffle": "embed", "optimize": "shuffle"}[stage]
            upstreams = [(layer, before, before) for layer in wanted_layers(before, experiment, store)]
        folders = [(getattr(lineage, name)(layer).folder, maker) for layer, name, maker in upstreams]
        return [f"{folder} ({maker})" for folder, maker in folders if read_manifest(store, folder) is None]
    if stage in ("train", "sweep"):
        if experiment.train is not None and experiment.train.data is not None:
            return []
        dataset = lineage.dataset()
        return [] if read_manifest(store, dataset.folder) else [f"{dataset.folder} (optimize)"]
    if not experiment.has_dictionary:
        return _missing_language_models(experiment, store)
    if experiment.swept:
        exports = {f"{trial.run}/sae/sae.json": "sweep" for trial in trials(experiment)}
    else:
        exports = {f"{lineage.run_folder()}/sae/sae.json": "train"}
    return [f"{export} ({upstream})" for export, upstream in exports.items() if not store.exists(export)]


def _missing_language_models(experiment: Experiment, store: Store) -> list[str]:
    """The models that this experiment has yet to train, where its evaluation wants them."""
    assert experiment.eval is not None
    if not any(TRAINED in experiment.language_models(axis) for axis in experiment.eval.of_models()):
        return []
    owners = [trial.experiment for trial in trials(experiment)] if experiment.swept else [experiment]
    upstream = "sweep" if experiment.swept else "train"
    wanted = [f"{Lineage(owner, store).run_folder()}/plm/config.json" for owner in owners]
    return [f"{path} ({upstream})" for path in wanted if not store.exists(path)]


def run_experiment(
    experiment: Experiment,
    stages: Sequence[str],
    reporter: Reporter,
    text: str | None = None,
    restart: bool = False,
    later: Sequence[Experiment] = (),
) -> Done:
    """Run the given stages in order, skipping what is done.

    Args:
        later: experiments that the same queue has yet to start; data that they read stay, whatever `keep` says.

    Raises:
        Locked, UserError, TaskFailed, Interrupted.
    """
    store = Store(experiment.storage)
    run = RunFolder(Lineage(experiment, store).run_folder())
    several = experiment.launch.executor == "local" and experiment.launch.nodes > 1
    if several and {"train", "sweep"} & set(stages) and not in_gang():
        begun = time.monotonic()
        join_machines(experiment, stages, restart, reporter, text)
        return Done(run, {"train": round(time.monotonic() - begun, 2)})
    if in_gang():
        if list(stages) != ["train"] or restart:
            raise UserError(
                "torchrun and srun may start `plmsae train` alone, and without --restart",
                "start everything else once: it uses all GPUs of the machine by itself",
            )
        if int(os.environ["RANK"]) > 0:
            _train_along(experiment, store)
            return Done(run, {})
    seconds: dict[str, float] = {}
    if (warning := plain_http(experiment)) is not None:
        reporter.say(warning)
    with locked(run):
        if restart and (old := run.archive()) is not None:
            reporter.say(f"archived the old run as {old}")
        try:
            if experiment.train is not None and run.identity.exists():
                run.claim_identity(Lineage(experiment, store).run_identity())
            run.begin(experiment, text)
            reporter = LoggedReporter(reporter, run.log)
            with (
                STOP.watching(run.stop_file),
                STOP.before_forced_exit(lambda: run.status(state="killed")),
                beating([run]),
            ):
                _run_stages(experiment, stages, store, run, reporter, seconds, later)
        except RunDiffers:
            raise  # the run that is there stays as it is
        except Interrupted:
            run.status(state="interrupted")
            raise
        except Exception as error:
            with suppress(OSError):  # what could not be written is in `error`
                keep(run.log, f"failed: {error}\n{getattr(error, 'trace', '')}")
                run.status(state="failed", error=first_line(error))
            raise
    return Done(run, seconds)


def _run_stages(
    experiment: Experiment,
    stages: Sequence[str],
    store: Store,
    run: RunFolder,
    reporter: Reporter,
    seconds: dict[str, float],
    later: Sequence[Experiment],
) -> None:
    """The stages and the report; `seconds` gets the time of each that had something to do."""
    run.status(state="running", stage=None, error=None)
    for weights in experiment.published_weights():
        resolve_weights(weights, store)  # downloads them, once
    if experiment.train is not None and experiment.train.data is not None:
        ref = Lineage(experiment, store).dataset()
        rows = (read_manifest(store, ref.folder) or {}).get("rows", 0)
        run.point({"optimize": {"folder": ref.folder, "key": ref.key, "rows": rows}})
    executor = open_executor(experiment)
    try:
        for stage in stages:
            if STOP.requested():
                raise Interrupted
            run.status(stage=stage)
            begun, worked = time.monotonic(), True
            try:
                if stage == "sweep":
                    worked = each_trial(experiment, None, run, executor, reporter)
                elif stage == "eval" and experiment.swept:
                    worked = "sweep" not in stages and each_trial(experiment, ["eval"], run, executor, reporter)
                else:
                    worked = _stage(stage, experiment, store, run, executor, reporter)
            finally:  # what was stopped has taken its time too
                if worked:
                    seconds[stage] = round(time.monotonic() - begun, 2)
                    run.status(stage_seconds={stage: seconds[stage]})
            if stage in ("optimize", "sweep"):
                free_unkept(experiment, store, reporter, later)
    finally:
        executor.close()
    report_run(experiment, stages, run, bool(seconds), reporter)
    if seconds:
        publish(experiment, run.path)
    run.status(state="done", stage=None)


def _pointers(plan: Plan) -> dict[str, Any]:
    """Where the run finds what the plan makes: by the stage it is of, with the role where that stage has several.

    What a stage makes in another one's stead is named as that one will name it.
    """
    stages = {role: a.of or plan.stage for role, a in plan.artifacts.items()}
    several = {stage for stage, count in Counter(stages.values()).items() if count > 1}
    names = {role: f"{s}-{role.removeprefix('sorted-')}" if s in several else s for role, s in stages.items()}
    return {names[role]: {"folder": a.folder, "key": a.key, "rows": a.rows} for role, a in plan.artifacts.items()}


def _stage(
    stage: str, experiment: Experiment, store: Store, run: RunFolder, executor: Executor, reporter: Reporter
) -> bool:
    """Run one stage; false if it had nothing to do."""
    layers = wanted_layers(stage, experiment, store) if stage in DATA_STAGES else None
    if stage == "train":
        run.claim_identity(Lineage(experiment, store).run_identity())
    plan = plan_stage(stage, experiment, store, layers)
    # Before the work: `clean` must know what a run under way uses.
    run.point({name: pointer for name, pointer in _pointers(plan).items() if pointer["folder"] != str(run.path)})
    own = [a for a in plan.artifacts.values() if a.done and a.folder != str(run.path)]
    if any(read_manifest(store, a.folder) is None for a in own):
        plan = plan_stage(stage, experiment, store, layers)  # another run's `keep` was quicker than the pointer
    if plan.done:
        why = f" ({plan.note})" if plan.note else ""
        reporter.say(f"{stage}: nothing to do, {_where(plan) or 'a later artifact exists'}{why}")
        return False
    gpus = plan.figures.get("ranks", executor.slots) if any(task.resources.gpus for task in plan.tasks) else 0
    gpus = gpus if count_gpus(experiment.launch) else 0
    foretell(run.path, stage, plan.figures, gpus, experiment.price.gpu_hour)
    begun, rate = time.monotonic(), dollars_a_second(gpus, experiment.price.gpu_hour)

    def progress(done: float | None, total: float | None, **figures: Any) -> None:
        spent = {} if rate is None else {"cost": f"${rate * (time.monotonic() - begun):,.2f}"}
        reporter.update(done, total, **figures, **spent)

    reporter.begin(stage)
    for attempt in range(3):
        try:
            executor.run(plan, progress)
            break
        except PlanChanged:
            assert attempt < 2, "plan.json keeps changing"
            plan = plan_stage(stage, experiment, store, layers)
        except BaseException as error:
            reporter.end("stopped" if isinstance(error, Interrupted) else "failed")
            raise
    reporter.end(f"{clock(time.monotonic() - begun)}, {_where(plan)}")
    return True


def _where(plan: Plan) -> str:
    return ", ".join(a.folder for a in plan.artifacts.values())


def _train_along(experiment: Experiment, store: Store) -> None:
    """A rank behind the first of a gang that torchrun or srun started: wait for what training needs, then train.

    All else (locks, data, status, the report) is the first rank's; should it fail, the launcher ends this one.
    """
    run = RunFolder(Lineage(experiment, store).run_folder())
    while True:
        # Before the first rank has claimed the run, what is done may be an earlier end of it that is to go on.
        claimed = run.claimed(Lineage(experiment, store).run_identity())
        plan = plan_stage("train", experiment, store)
        if claimed and plan.done:
            return
        if claimed and [task.id for task in plan.tasks] == ["train"]:
            run_task(plan.tasks[0], LocalContext(experiment, lambda *_, **__: None), commit=False)
            return
        if STOP.requested():
            raise Interrupted
        time.sleep(1)


def report_run(experiment: Experiment, stages: Sequence[str], run: RunFolder, worked: bool, reporter: Reporter) -> None:
    """The HTML page, made anew when something changed."""
    shows = [s for s in stages if s in ("train", "sweep", "eval")]
    if not shows or not (worked or not run.report.exists()):
        return
    from plmsae_cli.report.build import build_report
    from plmsae_cli.report.sweep import build_sweep_report

    path = build_sweep_report(run.path) if experiment.swept else build_report(run.path)
    reporter.say(f"report: {path}")
