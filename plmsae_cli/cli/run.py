"""`plmsae run`: every stage of one or many experiments, as a queue."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plmsae_cli.cli.ahead import lacks
from plmsae_cli.cli.exits import DONE, INTERRUPTED, QUEUE_FAILED, USAGE, checked, failure
from plmsae_cli.cli.options import Wishes
from plmsae_cli.cli.show import print_json, table
from plmsae_cli.cli.stage import dry, listen_for_signals, load_for, outcome, preflight
from plmsae_cli.cli.tokens import ask, keyed

if TYPE_CHECKING:
    from plmsae_cli.config.yaml import Loaded
    from plmsae_cli.executors.queue import Entry


def run_files(targets: list[Path], wishes: Wishes) -> int:
    """Validate all, then run all."""
    loaded: dict[Path, Loaded] = {}

    def prepare() -> int:
        from plmsae_cli.executors.queue import find, locked, smoke_folder

        paths = find(targets, wishes.watch)
        if code := read_all(paths, wishes.sets, wishes.bugfix, loaded):
            return code
        if wishes.dry_run:
            return dry(list(loaded.values()), None, wishes.json)
        ask(one.experiment for one in loaded.values())
        for folder in sorted({t for t in targets if t.is_dir()}):
            stack.enter_context(locked(folder))
        if wishes.bugfix and paths:
            stack.enter_context(smoke_folder(Path(loaded[paths[0]].experiment.root)))
        return DONE

    with ExitStack() as stack:
        if not wishes.dry_run:
            listen_for_signals()
        code = checked(prepare)
        if code or wishes.dry_run:
            return code
        return _Queue(targets, loaded, wishes).run()


def read_all(paths: Sequence[Path], sets: Sequence[str] | None, bugfix: bool, loaded: dict[Path, Loaded]) -> int:
    """Read every file before anything runs; every problem of every file is shown."""

    def read(path: Path) -> int:
        loaded[path] = load_for(path, sets, bugfix)
        return DONE

    for path in paths:
        loaded.pop(path, None)
    code = max((checked(lambda path=path: read(path)) for path in paths), default=DONE)  # type: ignore[misc]
    names: dict[str, list[Path]] = {}
    for path, one in loaded.items():
        names.setdefault(f"{one.experiment.root}/{one.experiment.name}", []).append(path)
    for run, owners in names.items():
        if len(owners) > 1 and set(owners) & set(paths):
            listed = ", ".join(map(str, owners))
            print(f"error: {listed} share the run folder {run}\nhint: give each its own name", file=sys.stderr)
            code = USAGE
    if code and len(paths) > 1:
        print(f"nothing was run: mend the above first ({len(paths)} experiments checked)", file=sys.stderr)
    return code


class _Queue:
    """The queue as the command shows it: every experiment, what became of it, the table at the end."""

    def __init__(self, targets: list[Path], loaded: dict[Path, Loaded], wishes: Wishes) -> None:
        from plmsae_cli.runtime.progress import reporter

        self._targets, self._loaded, self._wishes = targets, loaded, wishes
        self._shown = reporter(wishes.live)
        self._several = len(loaded) > 1 or any(target.is_dir() for target in targets)
        self._entries: list[Entry] = []
        self._codes: dict[Path, int] = {}
        self._results: dict[Path, dict[str, Any]] = {}

    def run(self) -> int:
        from plmsae_cli.executors.queue import run_queue
        from plmsae_cli.executors.trouble import Recovery

        # Whoever starts one experiment at a terminal wants to hear at once that a server does not answer.
        queue = self._several or self._wishes.watch
        recovery = Recovery(lambda text: self._shown.say(text), patient=queue or not sys.stderr.isatty())

        def again(entry: Entry) -> bool:
            if self._wishes.bugfix or entry.error is None or entry.path not in self._loaded:
                return False
            return recovery.again(entry.path, entry.error, self._loaded[entry.path].experiment, queue)

        with ExitStack() as stack:
            if self._several and self._wishes.live and sys.stderr.isatty():
                from plmsae_cli.cli.view import QueueView

                self._shown = stack.enter_context(QueueView(self._entries))
            if self._several:
                self._shown.say(_machine())
                if not self._wishes.bugfix:  # its inputs are bundled
                    self._look_ahead()
            run_queue(self._targets, self._one, again, self._wait if self._wishes.watch else None, self._entries)
        return self._end()

    def _look_ahead(self) -> None:
        """Say of every experiment at once what it would not start with now. Its turn decides: others may make what it lacks."""
        found = {path: lacks(one.experiment, self._wishes.yes) for path, one in self._loaded.items()}
        if not any(found.values()):
            return
        lines = [f"  {path.name}: {problem}" for path, problems in found.items() for problem in problems]
        stuck = sum(bool(problems) for problems in found.values())
        self._shown.say(
            "\n".join(
                [
                    f"{stuck} of {len(found)} experiments could not start now; each is looked at again at its turn:",
                    *lines,
                ]
            )
        )

    def _wait(self) -> None:
        folders = ", ".join(str(target) for target in self._targets if target.is_dir())
        self._shown.say(f"waiting for YAMLs in {folders} (--watch); Ctrl-C ends")

    def _one(self, entry: Entry) -> None:
        from plmsae_cli.config.errors import first_line
        from plmsae_cli.executors.pipeline import run_experiment

        if entry.path not in self._codes and not entry.path.exists():
            entry.state, entry.note = "skipped", "its file was taken away"
            return
        # What it says now counts: it may have been edited while others ran.
        if code := read_all([entry.path], self._wishes.sets, self._wishes.bugfix, self._loaded):
            self._loaded.pop(entry.path, None)
            entry.state, entry.note, self._codes[entry.path] = "failed", "invalid YAML: see the error above", code
            return
        one = self._loaded[entry.path]
        self._shown.say(f"== {entry.path}")
        stages = one.experiment.stages()

        def plan() -> int:
            try:
                preflight(one.experiment, stages, fetch=True, yes=self._wishes.yes)
            except Exception as error:
                entry.error = error
                raise
            return DONE

        if code := checked(plan):
            why = "" if entry.error is None else first_line(entry.error)
            entry.state, entry.note, self._codes[entry.path] = "failed", f"not started: {why}", code
            return
        # One that was done in this queue and was edited since is continued: a stray save must not begin it anew.
        again = entry.begun or entry.path in self._results
        restart, entry.begun = self._wishes.restart and not again, True
        try:
            waiting = [e.path for e in self._entries if e.state == "pending" and e.path in self._loaded]
            later = [self._loaded[path].experiment for path in waiting]
            done = run_experiment(keyed(one.experiment), stages, self._shown, one.text, restart, later)
        except Exception as error:
            entry.error, self._codes[entry.path] = error, failure(error)
            entry.state = "interrupted" if self._codes[entry.path] == INTERRUPTED else "failed"
            entry.note = str(Path(one.experiment.root) / str(one.experiment.name) / "status.json")
            return
        self._codes.pop(entry.path, None)
        entry.state = "done" if done.stages else "skipped"
        found = outcome(done.run.path)
        entry.note = found["report"] or found["run"]
        self._results[entry.path] = {
            "path": str(entry.path), "state": entry.state, "seconds": done.stages, **found
        }  # fmt: skip
        if not self._wishes.json:
            self._shown.say(_summary(done.run.path))

    def _end(self) -> int:
        if self._wishes.json:
            states = [{"path": str(e.path), "state": e.state, "seconds": round(e.seconds, 1)} for e in self._entries]
            print_json(queue=states, experiments=list(self._results.values()))
        elif self._entries:
            _print_table(self._entries)
        if any(entry.state in ("interrupted", "pending") for entry in self._entries):
            return INTERRUPTED
        if len(self._entries) == 1 and self._codes:
            return next(iter(self._codes.values()))
        return QUEUE_FAILED if self._codes else DONE


def _machine() -> str:
    """What the queue runs on."""
    from plmsae_cli.runtime.checks import driver
    from plmsae_cli.runtime.environment import cpu_count

    found = driver()
    if found is None:
        return f"{cpu_count()} CPU core(s), no GPU"
    names = Counter(found[1])
    return f"driver {found[0]}: " + ", ".join(f"{count} x {name}" for name, count in names.items())


def _summary(run: Path) -> str:
    """The figures of one run, a sweep's best trial, and what was predicted beside what came."""
    from plmsae_cli.cli.status import best_line, foretold_lines
    from plmsae_cli.report.table import summary

    rows = summary(run)
    width = max((len(name) for name, _ in rows), default=0)
    figures = [f"{name.ljust(width)}  {value}" for name, value in rows]
    return "\n".join(_indented([*figures, *best_line(run), *foretold_lines(run)]))


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _print_table(entries: Sequence[Entry]) -> None:
    from plmsae_cli.runtime.progress import clock

    rows = [[e.path.name, e.state, clock(e.seconds), e.note] for e in entries]
    print()
    print(table(rows, ["experiment", "state", "time", "see"]))
