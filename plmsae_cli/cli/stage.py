"""The six stage verbs: one stage of one experiment."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plmsae_cli.cli.exits import DONE, INTERRUPTED, checked, failure
from plmsae_cli.cli.limits import refuse_beyond
from plmsae_cli.cli.options import Wishes
from plmsae_cli.cli.show import plan_json, plan_lines, print_json, settings

if TYPE_CHECKING:
    from plmsae_cli.config.experiment import Experiment
    from plmsae_cli.config.yaml import Loaded
    from plmsae_cli.runtime.task import Plan


def load_for(path: Path, sets: Sequence[str] | None, bugfix: bool) -> Loaded:
    """The experiment of a file, cut down for a smoke run if asked."""
    from plmsae_cli.config.yaml import load

    loaded = load(path, list(sets or []))
    return _cut_down(loaded) if bugfix else loaded


def _cut_down(loaded: Loaded) -> Loaded:
    """The smoke run of an experiment, with as many ranks as this machine can give it."""
    from dataclasses import replace

    from plmsae_cli.config.bugfix import bugfix
    from plmsae_cli.runtime.device import count_gpus

    experiment = bugfix(loaded.experiment, Path(__file__).resolve().parents[1] / "data")
    launch = experiment.launch
    if (gpus := count_gpus(launch)) and launch.ranks != "auto":
        launch = launch.model_copy(update={"ranks": min(launch.ranks, gpus)})
    return replace(loaded, experiment=experiment.model_copy(update={"launch": launch}))


def run_stage(stage: str, path: Path, wishes: Wishes) -> int:
    """One stage; with `--with-inputs` the stages before it as well, with `--tasks` a share of its tasks alone."""
    chosen: list[tuple[Loaded, list[str]]] = []

    def prepare() -> int:
        from plmsae_cli.config.errors import UserError
        from plmsae_cli.executors.pipeline import missing_inputs
        from plmsae_cli.executors.queue import smoke_folder
        from plmsae_cli.executors.share import Share
        from plmsae_cli.store.fs import Store

        if wishes.tasks is not None:
            Share.parse(wishes.tasks)
            if wishes.with_inputs or wishes.bugfix:
                raise UserError(
                    "--tasks is a share of one stage's tasks",
                    "leave out --with-inputs and --bugfix, run stage by stage",
                )
        loaded = load_for(path, wishes.sets, wishes.bugfix)
        experiment = loaded.experiment
        present = experiment.stages()
        # `train.saes` are what `plmsae train` trains, whichever way.
        chosen_stage = "sweep" if stage == "train" and experiment.swept and experiment.sweep is None else stage
        if chosen_stage not in present:
            of_sweep = stage == "train" and experiment.sweep is not None
            why = "its trials are trained by `plmsae sweep`" if of_sweep else f"add a section, {stage}:"
            raise UserError(f"{path} has no {stage} stage", why)
        stages = present[: present.index(chosen_stage) + 1] if wishes.with_inputs or wishes.bugfix else [chosen_stage]
        if wishes.dry_run:
            return dry([loaded], stages, wishes.json)
        if wishes.bugfix:
            stack.enter_context(smoke_folder(Path(experiment.root)))
        elif not wishes.with_inputs and (
            missing := missing_inputs(chosen_stage, experiment, Store(experiment.storage))
        ):
            listed = "\n".join(f"  {item}" for item in missing)
            raise UserError(
                f"{stage} needs what does not exist yet:\n{listed}",
                f"`plmsae run {path}` makes everything, `plmsae {stage} {path} --with-inputs` what this stage needs",
            )
        preflight(experiment, stages, fetch=True, yes=wishes.yes)
        chosen.append((loaded, stages))
        return DONE

    with ExitStack() as stack:
        if not wishes.dry_run:
            listen_for_signals()
        code = checked(prepare)
        if code or not chosen:
            return code
        if wishes.tasks is not None:
            return _execute_share(chosen[0][0].experiment, stage, wishes.tasks, wishes)
        return _execute(*chosen[0], wishes)


def _execute_share(experiment: Experiment, stage: str, tasks: str, wishes: Wishes) -> int:
    from plmsae_cli.executors.share import Share, run_share
    from plmsae_cli.runtime.progress import reporter

    shown = reporter(wishes.live)
    try:
        state, text = "done", run_share(experiment, stage, Share.parse(tasks), shown)
        code = DONE
    except Exception as error:
        code = failure(error)
        state, text = "interrupted" if code == INTERRUPTED else "failed", ""
    if wishes.json:
        print_json(state=state, tasks=tasks)
    elif text:
        shown.say(text)
    return code


def listen_for_signals() -> None:
    """From here on, the first Ctrl-C or SIGTERM is a wish that stages look at, the second is final."""
    from plmsae_cli.runtime.stop import STOP

    STOP.install()


def _execute(loaded: Loaded, stages: list[str], wishes: Wishes) -> int:
    """Run stages with progress; print where the results are."""
    from plmsae_cli.cli.tokens import ask, keyed
    from plmsae_cli.executors.pipeline import run_experiment
    from plmsae_cli.runtime.progress import reporter

    shown = reporter(wishes.live)
    body: dict[str, Any]
    try:
        ask([loaded.experiment])
        done = run_experiment(keyed(loaded.experiment), stages, shown, loaded.text, wishes.restart)
        code = DONE
        body = {"state": "done", "seconds": done.stages, **outcome(done.run.path)}
    except Exception as error:
        code = failure(error)
        run = f"{loaded.experiment.root}/{loaded.experiment.name}"
        body = {"state": "interrupted" if code == INTERRUPTED else "failed", "run": run}
    if wishes.json and os.environ.get("RANK", "0") == "0":
        print_json(**body)
    return code


def outcome(run: Path) -> dict[str, Any]:
    """Where a run's results are, and its headline figures."""
    from plmsae_cli.runtime.results import headline, of_models
    from plmsae_cli.runtime.run_folder import read_pointers

    scored = of_models(run)
    report = run / "report" / "index.html"
    return {
        "run": str(run),
        "artifacts": read_pointers(run),
        "figures": headline(run),
        **({"evaluation": scored} if scored else {}),
        "report": str(report) if report.exists() else None,
    }


def dry(experiments: Sequence[Loaded], stages: Sequence[str] | None, as_json: bool) -> int:
    """Show each resolved YAML with the origin of each value, and each stage's plan; `stages` narrows them."""
    bodies = []
    for loaded in experiments:
        plans = plans_of(loaded.experiment, stages or loaded.experiment.stages())
        bodies.append({"experiment": loaded.experiment.dump(), "plans": [plan_json(plan) for plan in plans]})
        if not as_json:
            print("\n".join(settings(loaded.experiment.dump(), loaded.origins)))
            for plan in plans:
                print()
                print("\n".join(plan_lines(plan)))
            print()
    if as_json:
        print_json(**(bodies[0] if stages is not None else {"experiments": bodies}))
    else:
        print("nothing was touched (--dry-run)", file=sys.stderr)
    return DONE


def preflight(experiment: Experiment, stages: Sequence[str], fetch: bool, yes: bool = False) -> list[Plan]:
    """Plan everything before anything runs: what a later stage would refuse shows before an earlier one has worked.

    Args:
        fetch: work will follow: download published weights that are absent (otherwise an error), try writing to the bucket.
        yes: whatever `limits` say.

    Raises:
        UserError: an input is missing, settings do not fit each other, or a folder cannot be written.
    """
    from plmsae_cli.config.errors import UserError
    from plmsae_cli.store.fs import Store
    from plmsae_cli.store.weights import resolve_weights

    for why in unwritable(experiment):
        raise UserError(why, f"name another folder in {why.partition(':')[0]}")
    reach(experiment, write=fetch)
    for weights in experiment.published_weights() if fetch else []:
        resolve_weights(weights, Store(experiment.storage))
    plans = plans_of(experiment, stages)
    if not yes:
        refuse_beyond(experiment, stages)
    return plans


def unwritable(experiment: Experiment) -> Iterator[str]:
    """Which of the local folders that are written to cannot be, and why."""
    from plmsae_cli.runtime.checks import folders, nearest
    from plmsae_cli.store.fs import is_remote

    for field, place in folders(experiment).items():
        existing = nearest(Path(place))
        if not is_remote(place) and not (existing.is_dir() and os.access(existing, os.W_OK)):
            what = "cannot be written to" if existing.is_dir() else "is not a folder"
            yield f"{field}: {place} {what if existing == Path(place) else f'cannot be made, {existing} {what}'}"


def reach(experiment: Experiment, write: bool) -> None:
    """Find out in seconds whether the buckets answer: requests of the work itself are patient."""
    from plmsae_cli.store.fs import Store, is_remote

    places = {experiment.data_folder(): write}
    if experiment.train is not None and experiment.train.data is not None:
        places.setdefault(experiment.train.data, False)
    for place, writing in places.items():
        if is_remote(place):
            Store(experiment.storage).probe(place, writing)


def plans_of(experiment: Experiment, stages: Sequence[str]) -> list[Plan]:
    """What the stages would do; a sweep would train each of its trials."""
    from plmsae_cli.executors.pipeline import plan_stage
    from plmsae_cli.stages.sweep import foreseen
    from plmsae_cli.store.fs import Store

    store = Store(experiment.storage)
    swept = experiment.swept
    plans = [plan_stage(s, experiment, store) for s in stages if s != "sweep" and not (s == "eval" and swept)]
    if swept:
        ends = [s for s in ("train", "eval") if (s == "train" and "sweep" in stages) or (s == "eval" and s in stages)]
        each = [(trial, s, plan_stage(s, trial.experiment, store)) for trial in foreseen(experiment) for s in ends]
        if experiment.shares_stream and "train" in ends:
            from plmsae_cli.executors.shared import shared_plan

            plans.append(shared_plan([(t, plan) for t, s, plan in each if s == "train"], experiment.launch))
            each = [one for one in each if one[1] != "train"]
        plans += [plan for _, _, plan in each]
    return plans
