"""`plmsae run`: every stage of one or many experiments, as a queue."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from plmsae_cli.cli.exits import DONE, INTERRUPTED, QUEUE_FAILED, USAGE, exit_code, failure
from plmsae_cli.cli.stage import SCHEMA_VERSION, clear_smoke_runs, dry, load_for, outcome

if TYPE_CHECKING:
    from plmsae_cli.config.yaml import Loaded
    from plmsae_cli.executors.queue import Entry


def run_files(
    targets: list[Path], sets: Sequence[str] | None, dry_run: bool, bugfix: bool, as_json: bool, no_progress: bool, restart: bool
) -> int:
    """Validate all, then run all."""
    loaded: dict[Path, Loaded] = {}
    with ExitStack() as stack:

        def prepare() -> int:
            from plmsae_cli.executors.queue import find, locked

            paths = find(targets)
            code = validate(paths, sets, bugfix, loaded)
            if code or dry_run:
                for path in paths if not code else []:
                    code = code or dry(loaded[path].experiment, loaded[path].experiment.stages(), loaded[path].origins, as_json)
                return code
            for folder in sorted({t for t in targets if t.is_dir()}):
                stack.enter_context(locked(folder))
            if bugfix:
                clear_smoke_runs(loaded[paths[0]].experiment)
            return DONE

        code = exit_code(prepare)
        if code or dry_run:
            return code
        return _queue(targets, loaded, sets, bugfix, as_json, no_progress, restart)


def validate(paths: Sequence[Path], sets: Sequence[str] | None, bugfix: bool, loaded: dict[Path, Loaded]) -> int:
    """Read and check every file before anything runs; every problem of every file is shown."""

    def check(path: Path) -> int:
        loaded[path] = load_for(path, sets, bugfix)
        return DONE

    code = max(exit_code(lambda path=path: check(path)) for path in paths)  # type: ignore[misc]
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
) -> int:
    from plmsae_cli.executors.pipeline import run_experiment
    from plmsae_cli.executors.queue import run_queue
    from plmsae_cli.runtime.progress import reporter
    from plmsae_cli.runtime.stop import STOP

    STOP.install()
    shown = reporter(live=not no_progress and not as_json)
    codes: list[int] = []
    results = []

    def run_one(entry: Entry) -> None:
        if entry.path not in loaded and exit_code(lambda: validate([entry.path], sets, bugfix, loaded)):
            entry.state, entry.note = "failed", "invalid YAML"
            codes.append(USAGE)
            return
        one = loaded[entry.path]
        shown.say(f"== {entry.path}")
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
    if any(e.state == "interrupted" for e in entries):
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
