"""`plmsae run`: every stage of one or many experiments, as a queue."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plmsae_cli.cli.exits import DONE, INTERRUPTED, QUEUE_FAILED, USAGE, checked, failure
from plmsae_cli.cli.stage import SCHEMA_VERSION, dry, listen_for_signals, load_for, outcome, preflight

if TYPE_CHECKING:
    from plmsae_cli.config.yaml import Loaded
    from plmsae_cli.executors.queue import Entry


def run_files(
    targets: list[Path],
    sets: Sequence[str] | None,
    dry_run: bool,
    bugfix: bool,
    as_json: bool,
    no_progress: bool,
    restart: bool,
    yes: bool = False,
) -> int:
    """Validate all, then run all."""
    loaded: dict[Path, Loaded] = {}

    def prepare() -> int:
        from plmsae_cli.executors.queue import find, locked, smoke_folder

        paths = find(targets)
        if code := read_all(paths, sets, bugfix, loaded):
            return code
        if dry_run:
            return dry(list(loaded.values()), None, as_json)
        for folder in sorted({t for t in targets if t.is_dir()}):
            stack.enter_context(locked(folder))
        if bugfix:
            stack.enter_context(smoke_folder(Path(loaded[paths[0]].experiment.root)))
        return DONE

    with ExitStack() as stack:
        if not dry_run:
            listen_for_signals()
        code = checked(prepare)
        if code or dry_run:
            return code
        return _queue(targets, loaded, sets, bugfix, as_json, no_progress, restart, yes)


def read_all(paths: Sequence[Path], sets: Sequence[str] | None, bugfix: bool, loaded: dict[Path, Loaded]) -> int:
    """Read every file before anything runs; every problem of every file is shown."""

    def read(path: Path) -> int:
        loaded[path] = load_for(path, sets, bugfix)
        return DONE

    code = max(checked(lambda path=path: read(path)) for path in paths)  # type: ignore[misc]
    names: dict[str, list[Path]] = {}
    for path, one in loaded.items():
        names.setdefault(f"{one.experiment.root}/{one.experiment.name}", []).append(path)
    for run, owners in names.items():
        if len(owners) > 1:
            listed = ", ".join(map(str, owners))
            print(f"error: {listed} share the run folder {run}\nhint: give each its own name", file=sys.stderr)
            code = USAGE
    if code and len(paths) > 1:
        print(f"nothing was run: mend the above first ({len(paths)} experiments checked)", file=sys.stderr)
    return code


def _queue(
    targets: list[Path],
    loaded: dict[Path, Loaded],
    sets: Sequence[str] | None,
    bugfix: bool,
    as_json: bool,
    no_progress: bool,
    restart: bool,
    yes: bool,
) -> int:
    from plmsae_cli.executors.pipeline import run_experiment
    from plmsae_cli.executors.queue import run_queue
    from plmsae_cli.runtime.progress import reporter

    shown = reporter(live=not no_progress and not as_json)
    codes: list[int] = []
    results: list[dict[str, Any]] = []

    def run_one(entry: Entry) -> None:
        if entry.path not in loaded and (code := read_all([entry.path], sets, bugfix, loaded)):
            entry.state, entry.note = "failed", "invalid YAML"
            codes.append(code)
            return
        one = loaded[entry.path]
        shown.say(f"== {entry.path}")

        def plan() -> int:
            preflight(one.experiment, one.experiment.stages(), fetch=True, yes=yes)
            return DONE

        if code := checked(plan):
            entry.state, entry.note = "failed", "not started: see the error above"
            codes.append(code)
            return
        try:
            done = run_experiment(one.experiment, one.experiment.stages(), shown, one.text, restart)
        except Exception as error:
            codes.append(failure(error))
            entry.state = "interrupted" if codes[-1] == INTERRUPTED else "failed"
            entry.note = str(Path(one.experiment.root) / str(one.experiment.name) / "status.json")
            return
        entry.state = "done" if done.stages else "skipped"
        found = outcome(done.run.path)
        entry.note = found["report"] or found["run"]
        results.append({"path": str(entry.path), "state": entry.state, "seconds": done.stages, **found})
        if not as_json:
            _print_summary(done.run.path)

    entries = run_queue(targets, run_one)
    if as_json:
        states = [{"path": str(e.path), "state": e.state, "seconds": round(e.seconds, 1)} for e in entries]
        print(json.dumps({"schema": SCHEMA_VERSION, "queue": states, "experiments": results}))
    else:
        _print_table(entries)
    if any(e.state in ("interrupted", "pending") for e in entries):
        return INTERRUPTED
    if len(entries) == 1 and codes:
        return codes[0]
    return QUEUE_FAILED if codes else DONE


def _print_summary(run: Path) -> None:
    """The figures of one run, and where its page is."""
    from plmsae_cli.report.table import summary

    rows = summary(run)
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"  {name.ljust(width)}  {value}")


def _print_table(entries: Sequence[Entry]) -> None:
    from plmsae_cli.cli.show import table
    from plmsae_cli.runtime.progress import clock

    rows = [[e.path.name, e.state, clock(e.seconds), e.note] for e in entries]
    print()
    print(table(rows, ["experiment", "state", "time", "see"]))
