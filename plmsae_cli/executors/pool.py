"""Warm worker processes for tasks that one process does alone: one a GPU, or as many as asked on a CPU."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.worker import LocalContext, publish, work_on
from plmsae_cli.runtime.device import allow_gpus, visible_as
from plmsae_cli.runtime.environment import cpu_count
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.system_errors import as_user_error
from plmsae_cli.runtime.task import Interrupted, Pending, Task, TaskFailed
from plmsae_cli.store.memory import BUFFERS

ATTEMPTS = 2
_REST = "rest"
"""To a worker: there is nothing to do for now."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    task: Task | None = None
    writing: Task | None = None
    """Has worked; its files are still being written while the worker does another."""

    def let_go(self) -> list[Task]:
        """What is lost with the worker: first what it computed, if anything."""
        held = [task for task in (self.task, self.writing) if task is not None]
        self.writing = self.task = None
        return held


class Pool:
    """Slots that take the next task whose needs are met. A lost worker loses one task, which is tried again."""

    def __init__(self, experiment: Experiment, slots: int, gpus: Sequence[int]) -> None:
        self._experiment = experiment
        self._context = _clean_processes(bool(gpus))
        self._gpus = gpus
        self._slots = slots
        self._workers = [self._start(slot) for slot in range(slots)]

    def _start(self, slot: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        gpu = self._gpus[slot % len(self._gpus)] if self._gpus else None
        threads = max(1, cpu_count() // self._slots)
        arguments = (theirs, self._experiment.dump(), dict(os.environ), gpu, threads)
        process = self._context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def run(self, tasks: Sequence[Task], report: Callable[..., None]) -> None:
        """All tasks, in the order of their needs, dearest first.

        Raises:
            TaskFailed: a task raised, or lost its worker twice; running tasks end first.
            Interrupted: the user asked to stop.
        """
        waiting = sorted(tasks, key=lambda t: -t.cost)
        attempts = dict.fromkeys(((t.id, t.folders) for t in tasks), 0)
        done: set[str] = set()
        failure: Exception | None = None
        total, spent = sum(t.cost for t in tasks), 0.0
        running: dict[tuple[str, tuple[str, ...]], float] = {}
        while True:
            if failure is None and not STOP.requested():
                for slot, worker in enumerate(self._workers):
                    ready = next((t for t in waiting if done.issuperset(t.needs)), None)
                    if worker.task is not None or ready is None:
                        continue
                    if not worker.process.is_alive():
                        if worker.writing is not None:
                            continue  # its pipe is read first: that task is to be done again
                        worker = self._workers[slot] = self._start(slot)
                    waiting.remove(ready)
                    worker.task = ready
                    attempts[ready.id, ready.folders] += 1
                    with suppress(OSError):  # it died just now, as the end of its pipe will tell
                        worker.pipe.send(ready.to_json())
            busy = {w.pipe: w for w in self._workers if w.task is not None or w.writing is not None}
            if not busy:
                break
            for pipe in wait(list(busy), timeout=0.5):
                worker = busy[pipe]  # type: ignore[index]
                try:
                    kind, body = worker.pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    # Whoever computed is to blame; what was only being written is done again, too, and not counted.
                    blamed, *others = worker.let_go()
                    for lost in (blamed, *others):
                        running.pop((lost.id, lost.folders), None)
                    for lost in others:
                        attempts[lost.id, lost.folders] -= 1
                        waiting.insert(0, lost)
                    code = worker.process.exitcode
                    if attempts[blamed.id, blamed.folders] < ATTEMPTS:
                        report(None, None, note=f"{blamed.id}: its worker died ({code}); trying again")
                        waiting.insert(0, blamed)
                    else:
                        failure = TaskFailed(blamed.id, f"its worker died twice (exit {code})", lost=True)
                    continue
                of_writing = kind in ("published", "unwritten")
                task = worker.writing if of_writing else worker.task
                assert task is not None
                if kind == "progress":
                    running[task.id, task.folders] = task.cost * body["share"]
                    report(spent + sum(running.values()), total, **body["figures"])
                    continue
                if of_writing:
                    worker.writing = None
                else:
                    worker.task = None
                if kind == "worked":
                    worker.writing = task
                    continue
                running.pop((task.id, task.folders), None)
                if kind in ("done", "published"):
                    done.add(task.id)
                    spent += task.cost
                    report(spent + sum(running.values()), total)
                elif kind == "interrupted":
                    STOP.request()
                elif failure is None:
                    failure = body
            if STOP.requested():
                self._ask_to_stop()
        for worker in self._workers:
            with suppress(OSError):  # it is gone
                worker.pipe.send(_REST)
        if failure is not None:
            raise failure
        if STOP.requested():
            raise Interrupted

    def _ask_to_stop(self) -> None:
        for worker in self._workers:
            if worker.task is not None:
                with suppress(OSError):  # it died just now
                    worker.pipe.send(None)

    def close(self) -> None:
        for worker in self._workers:
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(10)
            if worker.process.is_alive():
                worker.process.kill()


def _clean_processes(gpus: bool) -> mp.context.ForkServerContext | mp.context.SpawnContext:
    """Processes that share no thread, CUDA context or S3 client with this one.

    On Linux they are forked from a server that has imported torch and done nothing else: the second to start is up at
    once, in later experiments of a queue too. With GPUs they are spawned: each must meet CUDA first in its own environment.
    """
    if gpus or sys.platform != "linux":
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _serve(
    pipe: Connection, experiment: dict[str, Any], environment: dict[str, str], gpu: int | None, threads: int
) -> None:
    """A worker process: tasks in, progress and outcomes out, gone with its parent."""
    os.environ.clear()  # the server's is from when it started
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C reaches the group; the parent decides
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_as([gpu])
        allow_gpus([0])  # the only one it sees
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # workers that share a CPU must not each take all of it
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    inbox: list[dict[str, Any]] = []
    arrived = threading.Condition()

    def listen() -> None:
        while True:
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                os._exit(0)
            if message is None:
                STOP.request()
                continue
            if message == _REST:
                BUFFERS.clear()
                continue
            with arrived:
                inbox.append(message)
                arrived.notify()

    threading.Thread(target=listen, daemon=True).start()

    sending = threading.Lock()

    def send(kind: str, body: Any = None) -> None:
        with sending:
            pipe.send((kind, body))

    def report(done: float, total: float, **figures: Any) -> None:
        send("progress", {"share": done / max(total, 1e-9), "figures": figures})

    def publish_later(task: Task, results: Pending) -> None:
        try:
            publish(task, context, results)
            send("published")
        except Exception as error:
            send("unwritten", failure_of(task, error))

    context = LocalContext(Experiment.model_validate(experiment), report)
    writing = threading.Thread()
    while True:
        with arrived:
            arrived.wait_for(lambda: bool(inbox))
            task = Task.from_json(inbox.pop(0))
        try:
            results = work_on(task, context)
            if writing.ident is not None:
                writing.join()
            if isinstance(results, Pending):
                send("worked")
                writing = threading.Thread(target=publish_later, args=(task, results), daemon=True)
                writing.start()
            else:
                publish(task, context, results)
                send("done")
        except Interrupted:
            send("interrupted")
        except Exception as error:
            send("failed", failure_of(task, error))


def failure_of(task: Task, error: Exception) -> Exception:
    """What is raised where the command was started: words for a user where there are some, else the error with its trace.

    To be called where the error is caught.
    """
    return as_user_error(error) or TaskFailed(task.id, f"{type(error).__name__}: {error}", traceback.format_exc())
