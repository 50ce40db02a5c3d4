"""`doctor` and `logs` on what is there, and on what is broken."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.cli import doctor
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.trouble import failing_check
from plmsae_cli.runtime import checks, device
from plmsae_cli.runtime.run_folder import write_json

Plmsae = Callable[..., Any]
Write = Callable[..., Path]
usage = namedtuple("usage", "total used free")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_DISK_BYTES", 4 << 20)


def _python_behind(command: list[str], folder: Path) -> str:
    """An interpreter that is started by `command`."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {shlex.join([*command, sys.executable])} "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_a_sound_machine_passes_and_leaves_nothing_behind(
    plmsae: Plmsae,
    write: Write,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The all-reduce really runs: a wrong sum would fail its ranks. So would their meeting under the machine's name, where
    nobody can resolve it, as in some containers."""
    renamed = ["unshare", "--uts", "sh", "-c", 'hostname no-such-name.invalid; exec "$@"', "-"]
    if subprocess.run([*renamed, "true"], capture_output=True, check=False).returncode == 0:  # root may
        monkeypatch.setattr(sys, "executable", _python_behind(renamed, tmp_path_factory.mktemp("renamed")))
    monkeypatch.setenv("WANDB_API_KEY", "0123456789secret")
    path = write("one.yaml")
    told = plmsae("doctor", path, "--json")
    assert told.code == 0, told.out
    found = {check["name"].partition(" (")[0]: check for check in json.loads(told.out)["checks"]}
    assert {"versions", "GPUs", "all-reduce", "memory", "root", "root, speed", "W&B"} <= set(found)
    assert "torch " in found["versions"]["text"]
    assert found["all-reduce"]["text"].endswith("B/s past each")
    assert "0123456789secret" not in told.out + told.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.yaml"]


def test_what_fails_is_told_with_its_remedy(
    plmsae: Plmsae, write: Write, tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_all_reduce", lambda experiment: doctor._memory())
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, 0))
    storage = f"storage: {{endpoint_url: '{s3.endpoint_url}', allow_http: true}}\n"
    sound = write("sound.yaml", data=s3.url("data"), more=storage)
    told = plmsae("doctor", sound)
    assert told.code == 1
    assert "fail  root: the disk is full" in told.out
    assert "hint: free some space" in told.out
    assert "ok    bucket s3://" in told.out
    assert "an object was written, read and deleted" in told.out
    assert s3.store().list(s3.url("data")) == {}
    wrong = plmsae("doctor", write("wrong.yaml", data="s3://no-such-bucket-here/x", more=storage)).out
    assert "fail  bucket s3://no-such-bucket-here/x: " in wrong
    assert "hint: check its name" in wrong


def test_a_file_system_that_is_read_only_is_a_check_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    found = doctor._disk("root", str(tmp_path))
    assert (found.state, found.text) == ("fail", f"{tmp_path}: Read-only file system")
    assert found.remedy == "name another folder in root"


def test_kernels_want_a_compiler_and_the_headers_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._compiler().text.startswith("no C compiler")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert doctor._compiler().text.startswith("CC is no-such-compiler, which is no program, and kernels")
    monkeypatch.delenv("CC")
    (tmp_path / "gcc").touch(mode=0o755)
    assert doctor._compiler().text.startswith(f"{tmp_path}/Python.h is not there")
    (tmp_path / "Python.h").touch()
    assert (doctor._compiler().state, doctor._compiler().text) == ("ok", f"{tmp_path}/gcc")


def test_logs_of_a_run_and_of_its_ranks(plmsae: Plmsae, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    (run / "logs").mkdir(parents=True)
    (run / "status.json").write_text('{"state": "done"}')
    (run / "logs" / "run.log").write_text("".join(f"line {i}\n" for i in range(300)))
    (run / "logs" / "rank-1.log").write_text("from rank 1\n")
    told = plmsae("logs", run, "--lines", 2)
    assert (told.code, told.out) == (0, "line 298\nline 299\n")
    assert "--rank 0 to 0" in told.err
    assert plmsae("logs", run, "--lines", 0).out == ""
    assert plmsae("logs", run, "--lines", -2).code == 2
    followed = plmsae("logs", run, "-f")
    assert followed.out.splitlines()[0] == "line 100", "a run that has ended is not waited for"
    assert followed.err.startswith(f"({run}: done)")
    assert plmsae("logs", run, "--rank", 1).out == "from rank 1\n"
    missed = plmsae("logs", run, "--rank", 7)
    assert missed.code == 2
    assert "rank-1.log, run.log" in missed.err
    assert plmsae("logs", tmp_path / "nowhere").code == 2


@pytest.mark.parametrize(
    ("named", "hint"),
    [
        ("frist", "did you mean first?"),
        ("sweeps/other", "did you mean sweep/other?"),
        ("zzz", "`plmsae ls` lists the runs"),
        ("first.yaml", "name the run and not its YAML: first, unless it has a name of its own"),
    ],
)
def test_a_run_that_is_not_there_is_told_with_those_that_may_be_meant(
    named: str, hint: str, plmsae: Plmsae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = plmsae("logs", "zzz")
    assert told.err.endswith("no run has begun in runs/ yet; one elsewhere is named by its folder\n")
    for name in ("first", "sweep/other"):
        write_json(Path("runs", name, "status.json"), {"state": "done"})
    for verb in ("status", "logs"):
        told = plmsae(verb, named)
        assert (told.code, told.err) == (2, f"error: {named} is not a run (no status.json)\nhint: {hint}\n")


def test_a_driver_that_hangs_is_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queues and `doctor` ask it first; with a dead GPU it may never answer."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 20\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for module in (checks, device):
        monkeypatch.setattr(module, "DRIVER_SECONDS", 0.2)
    assert checks.driver() is None
    with pytest.raises(UserError, match="no answer in"):
        device.installed_gpus()
    one = Experiment.model_validate({"name": "x", "embed": {"fasta": "x", "layers": [1]}})
    assert failing_check(RuntimeError("CUDA error: unspecified launch failure"), one) is None, (
        "the visible ones compute"
    )
