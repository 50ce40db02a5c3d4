"""Ranks started by torchrun: on this machine, or as this machine's part of several."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.gang import LOOK_S, Gang
from plmsae_cli.executors.rank import PARENT
from plmsae_cli.runtime.device import ALLOWED, chosen_gpus
from plmsae_cli.runtime.dist import PATIENCE
from plmsae_cli.runtime.environment import cpu_count
from plmsae_cli.runtime.progress import Reporter
from plmsae_cli.runtime.run_folder import RunFolder
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Task, TaskFailed

ONE_MACHINE = ("--standalone", "--local-addr=127.0.0.1")
"""By itself torchrun has ranks meet under the machine's name, which a container may not be able to resolve."""
MARGIN_S = 60
"""Collectives wait so much longer than the launcher, which can name the rank that is waited for."""


def launch_gang(task: Task, experiment: Experiment, report: Callable[..., None]) -> None:
    """Run a task on `task.resources.gang` ranks of this machine and wait.

    Raises:
        Interrupted: the ranks stopped at a checkpoint.
        TaskFailed, UserError: a rank failed; the message is its first error.
    """
    gang = Gang(RunFolder(task.folders[0]), task, experiment, report)
    _torchrun(gang, list(ONE_MACHINE), task.resources.gang, experiment)


def join_machines(
    experiment: Experiment, stages: Sequence[str], restart: bool, reporter: Reporter, text: str | None
) -> None:
    """This machine's ranks of a training on `launch.nodes` machines; returns when all are done.

    Raises:
        UserError: something else than `plmsae train` was started.
        Interrupted, TaskFailed, UserError: as `launch_gang`.
    """
    from plmsae_cli.stages.train import ranks

    launch = experiment.launch
    if list(stages) != ["train"] or restart:
        raise UserError(
            f"launch.nodes: {launch.nodes} is for `plmsae train` alone, and without --restart",
            "make the data on one machine (`plmsae optimize YAML --with-inputs`), then start `plmsae train YAML` on each",
        )
    run = RunFolder(os.path.join(experiment.root, str(experiment.name)))
    gang = Gang(run, None, experiment, reporter.update, text)
    rendezvous = [
        f"--nnodes={launch.nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={launch.rendezvous}",
        f"--rdzv-id={experiment.name}",
    ]
    reporter.begin(f"train on {launch.nodes} machines")
    try:
        _torchrun(gang, rendezvous, ranks(experiment) // launch.nodes, experiment)
    except BaseException:
        reporter.end("stopped" if gang.interrupted else "failed")
        raise
    reporter.end(str(run.path))


def _torchrun(gang: Gang, rendezvous: list[str], ranks: int, experiment: Experiment) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", *rendezvous, f"--nproc-per-node={ranks}", "--no-python",
        sys.executable, "-m", "plmsae_cli.executors.rank", str(gang.run.path),
    ]  # fmt: skip
    environment = {**os.environ, **gang.start, PARENT: str(os.getpid())}
    environment[PATIENCE] = str(experiment.launch.patience + MARGIN_S)
    environment[ALLOWED] = ",".join(map(str, chosen_gpus(experiment.launch)))
    # Ranks that share a CPU must not each take all of its cores.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // ranks)))
    path = gang.logs / "torchrun.log"
    with path.open("a+b") as log:
        before = log.tell()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

        def kill() -> None:
            # Ranks have sessions of their own; they leave when torchrun is gone.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        try:
            with STOP.before_forced_exit(kill):
                while process.poll() is None:
                    time.sleep(LOOK_S)
                    gang.look()
        finally:
            kill()
            process.wait()
        log.seek(before)
        said = log.read().decode(errors="replace")  # by name it may be gone, with its run
    gang.run.stop_file.unlink(missing_ok=True)
    if process.returncode == 0:
        return
    nobody = TaskFailed(gang.name, f"torchrun ended with code {process.returncode} and no rank said why; see {path}")
    gang.end(nobody, _killed(gang, said))


def _killed(gang: Gang, said: str) -> TaskFailed | None:
    """Which rank was killed, by torchrun's report: it leaves no word, but the others then fail in their next collective, or hang
    in it until torchrun ends them, whom its report then lists first."""
    ended = set(re.findall(r"Sending process (\d+) closing signal", said))
    entry = r"^\s*rank\s*:\s*(\d+).*\n\s*exitcode\s*:\s*-(\d+) \(pid: (\d+)\)"
    for rank, number, process in re.findall(entry, said, re.MULTILINE):
        if process in ended:
            continue
        name = signal.Signals(int(number)).name
        why = "; the system kills what exceeds its memory" if name == "SIGKILL" else ""
        where = f"Its output is in {gang.logs}/rank-{rank}.log"
        return TaskFailed(gang.name, f"rank {rank} was killed ({name}){why}. {where}", lost=True)
    return None
