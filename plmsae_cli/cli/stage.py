"""The six stage verbs: one stage of one experiment."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plmsae_cli.cli.exits import DONE, complain, exit_code, failure

if TYPE_CHECKING:
    from plmsae_cli.config.experiment import Experiment
    from plmsae_cli.config.yaml import Loaded

SCHEMA_VERSION = 1


def load_for(path: Path, sets: Sequence[str] | None, bugfix: bool) -> Loaded:
    """The experiment of a file, cut down for a smoke run if asked."""
    from dataclasses import replace

    from plmsae_cli.config.yaml import load

    loaded = load(path, list(sets or []))
    if not bugfix:
        return loaded
    from plmsae_cli.config.bugfix import bugfix as cut_down

    return replace(loaded, experiment=cut_down(loaded.experiment, assets()))


def assets() -> Path:
    """Files that ship with the package."""
    return Path(__file__).resolve().parents[1] / "data"


def clear_smoke_runs(experiment: Experiment) -> None:
    """A smoke run proves something only if it runs: its scratch folder is emptied first."""
    import shutil

    assert "bugfix" in Path(experiment.root).name
    shutil.rmtree(Path(experiment.root), ignore_errors=True)


def run_stage(
    stage: str,
    path: Path,
    sets: Sequence[str] | None,
    dry_run: bool,
    bugfix: bool,
    as_json: bool,
    no_progress: bool,
    with_inputs: bool,
    restart: bool,
) -> int:
    """One stage, or with `with_inputs` the stages before it as well."""

    def prepare() -> int:
        from plmsae_cli.config.errors import UserError
        from plmsae_cli.executors.pipeline import missing_inputs, ordered
        from plmsae_cli.store.fs import Store

        loaded = load_for(path, sets, bugfix)
        experiment = loaded.experiment
        if stage not in experiment.stages():
            why = "its trials are trained by `plmsae sweep`" if stage == "train" and experiment.sweep else f"add a {stage}: section"
            raise UserError(f"{path} has no {stage} stage", why)
        present = experiment.stages()
        upstream = present[: present.index(stage) + 1] if with_inputs or bugfix else [stage]
        if dry_run:
            return dry(experiment, ordered(upstream), loaded.origins, as_json)
        if bugfix:
            clear_smoke_runs(experiment)
        elif not with_inputs and (missing := missing_inputs(stage, experiment, Store(experiment.storage))):
            listed = "\n".join(f"  {item}" for item in missing)
            raise UserError(
                f"{stage} needs what does not exist yet:\n{listed}",
                f"`plmsae run {path}` makes everything, `plmsae {stage} {path} --with-inputs` what this stage needs",
            )
        chosen.append((loaded, ordered(upstream)))
        return DONE

    chosen: list[tuple[Loaded, list[str]]] = []
    code = exit_code(prepare)
    if code or not chosen:
        return code
    loaded, stages = chosen[0]
    return execute(loaded, stages, no_progress, restart, as_json)


def execute(loaded: Loaded, stages: list[str], no_progress: bool, restart: bool, as_json: bool) -> int:
    """Run stages with progress and signals; print where the results are."""
    from plmsae_cli.executors.pipeline import run_experiment
    from plmsae_cli.runtime.progress import reporter
    from plmsae_cli.runtime.stop import STOP

    STOP.install()
    shown = reporter(live=not no_progress and not as_json)
    try:
        done = run_experiment(loaded.experiment, stages, shown, loaded.text, restart)
    except Exception as error:
        return failure(error)
    result = outcome(done.run.path)
    if as_json:
        print(json.dumps({"schema": SCHEMA_VERSION, "state": "done", "seconds": done.stages, **result}))
    return DONE


def outcome(run: Path) -> dict[str, Any]:
    """Where a run's results are, and its headline figures."""
    from plmsae_cli.runtime.results import headline
    from plmsae_cli.runtime.run_folder import read_json

    report = run / "report" / "index.html"
    return {
        "run": str(run),
        "artifacts": read_json(run / "artifacts.json") or {},
        "figures": headline(run),
        "report": str(report) if report.exists() else None,
    }


def dry(experiment: Experiment, stages: Sequence[str], origins: dict[str, str], as_json: bool) -> int:
    """Show the resolved YAML with the origin of each value, and each stage's plan."""
    from plmsae_cli.cli.show import plan_json, plan_lines
    from plmsae_cli.executors.pipeline import plan_stage
    from plmsae_cli.stages.sweep import trials
    from plmsae_cli.store.fs import Store

    store = Store(experiment.storage)
    plans = []
    points = trials(experiment) if "sweep" in stages else []
    for stage in stages:
        if stage == "sweep" or (stage == "eval" and points):
            continue
        plans.append(plan_stage(stage, experiment, store))
    for trial in points:
        plans.append(plan_stage("train", trial.experiment, store))
    if as_json:
        body = {"schema": SCHEMA_VERSION, "experiment": experiment.dump(), "plans": [plan_json(p) for p in plans]}
        print(json.dumps(body))
        return DONE
    flat = dict(_flat(experiment.dump()))
    width = max(len(f"{name}: {found}") for name, found in flat.items() if name in origins)
    for name, found in flat.items():
        if name in origins:
            print(f"{f'{name}: {found}':<{min(width, 72)}}  # {origins[name]}")
    for plan in plans:
        print()
        print("\n".join(plan_lines(plan)))
    if points:
        print(f"\nsweep: {len(points)} trials")
    print("\nnothing was touched (--dry-run)", file=sys.stderr)
    return DONE


def _flat(body: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, item in body.items():
        if isinstance(item, dict) and item:
            found += _flat(item, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", item))
    return found


__all__ = ["complain", "dry", "execute", "load_for", "run_stage"]
