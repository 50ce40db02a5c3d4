"""Starting one task on several ranks with torchrun, and being such a rank.

torchrun turns every exit code into 1, so the truth is status.json, which rank 0 writes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.pool import TaskFailed
from plmsae_cli.executors.worker import LocalContext, run_task
from plmsae_cli.runtime.run_folder import RunFolder, cpu_count, read_json, write_json
from plmsae_cli.runtime.stop import FORCED, STOP
from plmsae_cli.runtime.system_errors import as_user_error
from plmsae_cli.runtime.task import Interrupted, Task

PARENT = "PLMSAE_PARENT_PID"


def launch_gang(task: Task, experiment: Experiment, report: Callable[..., None]) -> None:
    """Run a task on `task.resources.gang` ranks and wait.

    Raises:
        Interrupted: the ranks stopped at a checkpoint.
        TaskFailed, UserError: a rank failed; the message is its first error.
    """
    run = RunFolder(task.folders[0])
    (run.path / "logs").mkdir(parents=True, exist_ok=True)
    order = run.path / "logs" / "gang.json"
    write_json(order, {"task": task.to_json(), "experiment": experiment.dump()})
    gang_status = run.path / "logs" / "gang-status.json"
    gang_status.unlink(missing_ok=True)
    for old in (run.path / "logs").glob("error-rank-*.json"):
        old.unlink()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={task.resources.gang}", "--no-python",
        sys.executable, "-m", "plmsae_cli.executors.gang", str(order),
    ]  # fmt: skip
    environment = {**os.environ, PARENT: str(os.getpid())}
    # Ranks that share a CPU must not each take all of its cores.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // task.resources.gang)))
    with (run.path / "logs" / "torchrun.log").open("ab") as log:
        before = log.tell()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

        def kill() -> None:
            # Ranks have sessions of their own; they leave when torchrun is gone.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        asked, told = False, 0
        try:
            with STOP.before_forced_exit(kill):
                while process.poll() is None:
                    time.sleep(0.2)
                    state = read_json(gang_status)
                    if state is not None and "done" in state:
                        for note in state["notes"][told:]:
                            report(state["done"], state["total"], note=note)
                        told = len(state["notes"])
                        report(state["done"], state["total"], **state["figures"])
                    if STOP.requested() and not asked:
                        asked = True
                        run.stop_file.touch()  # torchrun would kill ranks 30 s after a SIGTERM; a file is not in haste
        finally:
            kill()
    run.stop_file.unlink(missing_ok=True)
    if process.returncode == 0:
        return
    if (read_json(gang_status) or {}).get("state") == "interrupted":
        raise Interrupted
    raise _first_error(task, run, process.returncode, before)


def _first_error(task: Task, run: RunFolder, code: int, before: int) -> Exception:
    """Which rank was killed, else the earliest error that a rank left behind.

    A killed rank leaves nothing, but the others then fail in their next collective: its death comes first.
    """
    path = run.path / "logs" / "torchrun.log"
    log = path.read_bytes()[before:].decode(errors="replace")
    for rank, number in re.findall(r"^\s*rank\s*:\s*(\d+).*\n\s*exitcode\s*:\s*-(\d+)", log, re.MULTILINE):
        name = signal.Signals(int(number)).name
        why = "; the system kills what exceeds its memory" if name == "SIGKILL" else ""
        return TaskFailed(task.id, f"rank {rank} was killed ({name}){why}. Its output is in {path}")
    errors = [body for file in (run.path / "logs").glob("error-rank-*.json") if (body := read_json(file)) is not None]
    if not errors:
        return TaskFailed(task.id, f"torchrun ended with code {code} and no rank said why; see {path}")
    first = min(errors, key=lambda body: body["time"])
    if first["user"]:
        return UserError(first["message"], first["hint"])
    return TaskFailed(task.id, f"rank {first['rank']}: {first['message']}", first["trace"])


def _watch_parents() -> None:
    """Leave when torchrun or the launcher is gone: whichever is killed, no orphan is left behind."""
    torchrun, launcher = os.getppid(), int(os.environ[PARENT])

    def watch() -> None:
        while os.getppid() == torchrun:
            try:
                os.kill(launcher, 0)
            except ProcessLookupError:
                break
            except PermissionError:
                pass
            time.sleep(1)
        os._exit(FORCED)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """One rank."""
    order: Mapping[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    task = Task.from_json(order["task"])
    rank = int(os.environ.get("RANK", "0"))
    run = RunFolder(task.folders[0])
    logs = run.path / "logs"
    STOP.install(quiet=True)
    STOP.watch(run.stop_file)
    _watch_parents()
    last = 0.0
    notes: list[str] = []

    def report(done: float, total: float, note: str | None = None, **figures: Any) -> None:
        nonlocal last
        notes.extend([] if note is None else [note])
        if rank == 0 and (note is not None or time.monotonic() - last > 0.5):
            last = time.monotonic()
            body = {"done": done, "total": total, "figures": figures, "notes": notes}
            write_json(logs / "gang-status.json", body)

    context = LocalContext(Experiment.model_validate(order["experiment"]), report)
    try:
        run_task(task, context, commit=rank == 0)
    except Interrupted:
        if rank == 0:
            write_json(logs / "gang-status.json", {"state": "interrupted"})
        sys.exit(75)
    except Exception as error:
        words = as_user_error(error)
        body = {
            "rank": rank,
            "time": time.time(),
            "user": words is not None,
            "message": words.message if words is not None else f"{type(error).__name__}: {error}",
            "hint": words.hint if words is not None else None,
            "trace": traceback.format_exc(),
        }
        write_json(logs / f"error-rank-{rank}.json", body)
        print(body["trace"], file=sys.stderr)
        os._exit(1)  # the others wait in a collective; leaving at once lets torchrun end them


if __name__ == "__main__":
    main()
