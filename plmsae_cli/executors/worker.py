"""Running one task: find its stage's work, run it, commit what it wrote."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.faults import fault
from plmsae_cli.runtime.foretold import keep_peak
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted, Pending, Result, Task, Work
from plmsae_cli.stages.common import FINISH, made_parts
from plmsae_cli.store.fs import Store
from plmsae_cli.store.manifest import write_manifest, write_part

# Imported when first needed: a queue of embeddings never loads what evaluation needs.
STAGE_MODULES = {
    "embed": "plmsae_cli.stages.embed",
    "shuffle": "plmsae_cli.stages.shuffle",
    "optimize": "plmsae_cli.stages.optimize",
    "train": "plmsae_cli.stages.train",
    "eval": "plmsae_cli.stages.evaluate",
}


class LocalContext:
    """What a work sees in whatever process runs it."""

    def __init__(self, experiment: Experiment, report: Callable[..., None]) -> None:
        self.experiment = experiment
        self.store = Store(experiment.storage)
        self._report = report

    def progress(self, done: float, total: float, **figures: Any) -> None:
        self._report(done, total, **figures)

    def check_stop(self) -> None:
        if STOP.requested():
            raise Interrupted


def run_task(task: Task, context: LocalContext, commit: bool = True) -> None:
    """`work_on`, then `publish`.

    Args:
        commit: false on all ranks of a gang but the first.
    """
    results = work_on(task, context)
    if task.stage == "train":
        keep_peak(Path(task.folders[0]), int(os.environ.get("RANK", "0")))
    if commit:
        publish(task, context, results)


class Behind:
    """Runs tasks one after the other; one whose files are still being written is published after the next has worked."""

    def __init__(self) -> None:
        self._writing: tuple[Task, LocalContext, Pending] | None = None

    def run(self, task: Task, context: LocalContext) -> None:
        """`run_task`, but the record may come with the next call, or with `settle`."""
        if self._writing is not None and self._writing[0].id in task.needs:
            self.settle()
        results = work_on(task, context)
        try:
            self.settle()
        except BaseException:
            if isinstance(results, Pending):
                results.settle()  # whoever hears of the error may remove or retry what is being written here
            raise
        if isinstance(results, Pending):
            self._writing = (task, context, results)
        else:
            publish(task, context, results)

    def settle(self) -> None:
        """Wait for what is being written, and publish it."""
        if self._writing is not None:
            task, context, results = self._writing
            self._writing = None
            publish(task, context, results)

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, *error: object) -> None:
        from plmsae_cli.store.memory import BUFFERS

        try:
            self.settle()
        finally:
            BUFFERS.clear()
            # What comes next may want the device whole: a training in this process, ranks on the same GPU.
            if (loaded := sys.modules.get("plmsae_cli.runtime.embedding.embedder")) is not None:
                loaded.Embedder.forget()


def work_on(task: Task, context: LocalContext) -> Mapping[str, Result]:
    """The work alone; its results may be `Pending`."""
    work: Work = import_module(STAGE_MODULES[task.stage]).work
    fault(f"{task.stage}.{task.id}.begin")
    return work(task, context)


def publish(task: Task, context: LocalContext, results: Mapping[str, Result]) -> None:
    """Wait for what is still being written; then the part record in each folder, and the manifest after a finish."""
    if isinstance(results, Pending):
        results.settle()
    results = dict(results)
    fault(f"{task.stage}.{task.id}.written")
    for folder, result in results.items():
        write_part(context.store, folder, task.id, result.files, {} if task.id == FINISH else result.facts)
        if task.id == FINISH:
            fault(f"{task.stage}.manifest")
            parts = made_parts(task, context.store, folder)
            files = [
                {"name": f.name, "size": f.size, "xxh3": f.xxh3} for name in sorted(parts) for f in parts[name].files
            ]
            body = {**result.facts, "parts": sorted(parts), "files": files, "created": time.time()}
            write_manifest(context.store, folder, body)
    fault(f"{task.stage}.{task.id}.done")
