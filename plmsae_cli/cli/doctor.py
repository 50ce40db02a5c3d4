"""`doctor`: what this machine can do, before an experiment finds out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from plmsae_cli.cli.exits import DONE, FAILED, checked
from plmsae_cli.cli.show import print_json, size

if TYPE_CHECKING:
    from plmsae_cli.config.experiment import Experiment
    from plmsae_cli.runtime.checks import Check, State

PACKAGES = ("plmsae", "torch", "numpy", "pyarrow", "obstore", "wandb", "ray", "submitit", "litdata", "transformers")
ALL_REDUCE_S = 120
_GPU_BYTES, _CPU_BYTES, _DISK_BYTES = 256 << 20, 4 << 20, 128 << 20
_LITTLE_MEMORY = 4 << 30
_SLOW_DISK = 100e6
"""Bytes a second, below which a GPU would wait for its data."""


def examine(path: Path | None, as_json: bool) -> int:
    """A line for each check; exit code 1 if one fails."""
    found: list[Check] = []

    def work() -> int:
        from plmsae_cli.cli.stage import load_for
        from plmsae_cli.config.experiment import Embed, Experiment

        if path is None:
            experiment = Experiment(embed=Embed(fasta="proteins.fasta", layers=[0]))  # what is asked of it is defaults
        else:
            experiment = load_for(path, None, False).experiment
        for check in _checks(experiment):
            found.append(check)
            if not as_json:
                print(f"{check.state:<4}  {check.name}: {check.text}", flush=True)
                if check.remedy and check.state != "ok":
                    print(f"      hint: {check.remedy}", flush=True)
        if as_json:
            print_json(checks=[asdict(check) for check in found])
        return FAILED if any(check.state == "fail" for check in found) else DONE

    return checked(work)


def _checks(experiment: Experiment) -> Iterator[Check]:
    """In the order in which one thing rests on another."""
    from plmsae_cli.runtime.checks import bucket, folders, gpus_compute, nearest, space
    from plmsae_cli.store.fs import is_remote

    yield _versions()
    yield _gpus()
    if _visible():
        yield gpus_compute()
        yield _compiler()
    yield _all_reduce(experiment)
    yield _memory()
    places = folders(experiment)
    there = {field: place for field, place in reversed(places.items()) if not is_remote(place)}
    local = {nearest(Path(place)).stat().st_dev: (field, place) for field, place in there.items()}
    for field, place in reversed(local.values()):
        yield space(field, place)
        yield _disk(field, place)
    for place in dict.fromkeys(place for place in places.values() if is_remote(place)):
        yield bucket(experiment, place, write=True)
    if experiment.train is not None and experiment.train.data is not None and is_remote(experiment.train.data):
        yield bucket(experiment, experiment.train.data, write=False)
    yield _wandb(experiment)


def _versions() -> Check:
    from plmsae_cli.runtime.checks import Check

    found = [f"Python {sys.version.split()[0]}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return Check("versions", "ok", ", ".join(found))


def _visible() -> int:
    from plmsae_cli.runtime.device import visible_gpus

    return visible_gpus()


def _gpus() -> Check:
    import torch

    from plmsae_cli.runtime.checks import Check, driver

    found, seen = driver(), _visible()
    built = torch.version.cuda
    if found is None:
        text = f"none (torch {torch.__version__}" + (f", built for CUDA {built})" if built else ", a CPU build)")
        return Check(
            "GPUs", "ok" if not built else "warn", text, "nvidia-smi is absent or fails: is the driver installed?"
        )
    number, names = found
    text = f"driver {number}, {len(names)} GPU(s): {', '.join(dict.fromkeys(names))}; torch built for CUDA {built}"
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        text += f"; CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}"
    elif seen < len(names):
        remedy = "./setup.sh installs the wheel that the driver can run; --torch-index URL names another"
        return Check("GPUs", "fail", f"{text}; torch can use {seen}", remedy)
    return Check("GPUs", "ok", text)


def _compiler() -> Check:
    """What Triton builds the launchers of GPU kernels with, on the machine that runs them."""
    from plmsae_cli.runtime.checks import Check

    named = os.environ.get("CC")
    found = shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if found is None or not headers.is_file():
        missing = f"CC is {named}, which is no program," if named else "no C compiler,"
        lacking = missing if found is None else f"{headers} is not there,"
        remedy = "on Debian and Ubuntu: apt-get install gcc python3-dev"
        return Check("compiler", "fail", f"{lacking} and kernels on GPUs want it", remedy)
    return Check("compiler", "ok", found)


def _all_reduce(experiment: Experiment) -> Check:
    """Over the GPUs present by NCCL, else over two ranks of the CPU by gloo."""
    from plmsae_cli.executors.torchrun import ONE_MACHINE
    from plmsae_cli.runtime.checks import Check

    gpus = _visible() if experiment.launch.gpus != 0 else 0
    ranks, amount, by = (gpus, _GPU_BYTES, "NCCL") if gpus > 1 else (2, _CPU_BYTES, "gloo")
    name = f"all-reduce ({by}, {ranks} {'GPUs' if by == 'NCCL' else 'ranks on the CPU'})"
    command = [
        sys.executable, "-m", "torch.distributed.run", *ONE_MACHINE, f"--nproc-per-node={ranks}",
        "-m", "plmsae_cli.runtime.all_reduce", str(amount),
    ]  # fmt: skip
    chosen = ",".join(map(str, range(ranks))) if by == "NCCL" else ""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PLMSAE_GPUS": chosen, "PLMSAE_PATIENCE": "60"}
    remedy = "NCCL_DEBUG=INFO says more; in a container --ipc=host or --shm-size=8g" if by == "NCCL" else None
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ALL_REDUCE_S, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return Check(name, "fail", f"no end in {ALL_REDUCE_S} s", remedy)
    if done.returncode or (rate := re.search(r"all-reduce: (\d+)", done.stdout)) is None:
        lines = [line for line in done.stderr.splitlines() if re.match(r"(\[rank\d+\]: *)?\w*(Error|Exception)", line)]
        return Check(name, "fail", (lines or done.stderr.strip().splitlines() or ["no words"])[-1], remedy)
    return Check(name, "ok", f"{size(float(rate[1]))}/s past each")


def _memory() -> Check:
    from plmsae_cli.runtime.checks import Check

    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists() and (said := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        free = int(said[1]) * 1024
    state: State = "ok" if free > _LITTLE_MEMORY else "warn"
    return Check("memory", state, f"{size(free)} available", "lower shuffle.memory and launch.workers")


def _disk(field: str, place: str) -> Check:
    """The speed at which a file is written to the disk and read back from it, not from memory."""
    from plmsae_cli.runtime.checks import Check, nearest

    existing = nearest(Path(place))
    trial = existing / f".doctor-{os.getpid()}.tmp"
    name = f"{field}, speed"
    block = os.urandom(1 << 20)
    try:
        with trial.open("wb") as file:
            begun = time.perf_counter()
            for _ in range(_DISK_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = _DISK_BYTES / (time.perf_counter() - begun)
        with trial.open("rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begun = time.perf_counter()
            while file.read(1 << 20):
                pass
            came = _DISK_BYTES / (time.perf_counter() - begun)
    except OSError as error:
        return Check(name, "fail", f"{existing}: {error.strerror}", f"name another folder in {field}")
    finally:
        with suppress(OSError):  # of a file system that nothing can be written to nothing can be removed either
            trial.unlink(missing_ok=True)
    state: State = "ok" if min(written, came) > _SLOW_DISK else "warn"
    return Check(name, state, f"writes {size(written)}/s, reads {size(came)}/s", "a local NVMe disk is faster")


def _wandb(experiment: Experiment) -> Check:
    from plmsae_cli.cli.tokens import WANDB_KEY, wandb_login
    from plmsae_cli.runtime.checks import Check

    source, mode = wandb_login(), experiment.wandb.mode
    if source is not None:
        return Check("W&B", "ok", f"a key is there ({source}); wandb.mode: {mode}")
    state: State = "warn" if mode == "online" else "ok"
    return Check("W&B", state, f"nobody is logged in; wandb.mode: {mode}", f"`wandb login`, or set {WANDB_KEY}")
