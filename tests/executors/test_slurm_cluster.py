"""A real SLURM cluster: a training whose place is taken saves, waits for its turn again, and ends as if nothing had been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors import slurm
from plmsae_cli.executors.local import LocalExecutor
from plmsae_cli.executors.pipeline import plan_stage
from plmsae_cli.executors.slurm import SlurmExecutor
from plmsae_cli.runtime.processes import free_port
from plmsae_cli.store.fs import Store

pytest.importorskip("submitit")
ABSENT = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(ABSENT), reason=f"SLURM is not installed: no {', '.join(ABSENT)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd runs as root"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`sbatch` and `srun` of this process reach a cluster of its own."""
    folder = tmp_path_factory.mktemp("slurm")
    script = Path(__file__).with_name("slurm.sh")
    try:
        started = subprocess.run([str(script), str(folder), str(free_port())], capture_output=True, text=True)
        assert started.returncode == 0, started.stderr
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
            patch.setenv("OMP_NUM_THREADS", "1")
            yield
            end = time.monotonic() + 30  # steps outlive a node's daemon
            while subprocess.check_output(["squeue", "--noheader"]) and time.monotonic() < end:
                time.sleep(0.5)
    finally:
        for name in ("node", "controller", "munge"):
            with suppress(OSError, ValueError):
                os.kill(int((folder / f"{name}.pid").read_text()), signal.SIGTERM)


def test_a_training_whose_place_is_taken_goes_on_where_it_was(
    cluster: None,
    trained: Callable[..., Experiment],
    losses: Callable[[Experiment], list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slurm, "QUEUE_LOOK_S", 1.0)
    alone = trained("cluster-alone", "cluster", "128_000", ranks=2)
    LocalExecutor(alone).run(plan_stage("train", alone, Store()), lambda *_, **__: None)
    options = {"partition": "low", "cpus": 1, "time": 10}
    experiment = trained("cluster-gang", "cluster", "128_000", executor="slurm", ranks=2, slurm=options)
    notes: list[str] = []
    taken = threading.Event()

    def report(done: float | None, total: float | None, note: str | None = None, **figures: Any) -> None:
        notes.extend([] if note is None else [note])
        if done and not taken.is_set():
            taken.set()
            subprocess.Popen(["srun", "--partition=high", "--ntasks=4", "sleep", "5"])

    # The training finds no room at first.
    first = subprocess.Popen(["srun", "--partition=high", "--ntasks=4", "sleep", "8"])
    while not subprocess.check_output(["squeue", "--noheader", "--states=running"]):
        time.sleep(0.2)
    begun = time.monotonic()
    SlurmExecutor(experiment).run(plan_stage("train", experiment, Store()), report)
    assert time.monotonic() - begun > 5
    assert first.wait() == 0
    assert "waits in SLURM's queue: " in notes[0]
    [left] = [note for note in notes if "waits" not in note]
    assert "was told to leave and has saved; submitted again as" in left
    status = json.loads((Path(experiment.root) / "cluster-gang" / "status.json").read_text())
    assert status.get("waiting") is None
    assert losses(experiment) == losses(alone), "the same number of ranks: the same bits"
