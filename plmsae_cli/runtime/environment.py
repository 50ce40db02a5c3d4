"""What a run was started with: versions, device, commit, and changes that no commit has."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from plmsae_cli.config.credentials import masked

LONGEST_DIFF = 1_000_000
"""Characters; a longer one is cut."""
_PACKAGE = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """Versions, device and commit, for the record. Of environment variables only one: others hold secrets."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("plmsae", "torch", "numpy", "pyarrow", "litdata", "pydantic"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": cpu_count(),
        "device": device_name(),
        "driver": _driver(),
        "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "versions": versions,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
    }


def uncommitted(longest: int = LONGEST_DIFF) -> str:
    """How the package's code differs from its commit, as `git diff` puts it; empty where it does not.

    Values that look like credentials are starred out. New files that git does not know yet are named alone.
    """
    diff = _git("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--", _PACKAGE.name) or ""
    new = (_git("ls-files", "--others", "--exclude-standard", "--", _PACKAGE.name) or "").splitlines()
    lines = [*(f"not in git: {name}" for name in new), *masked(diff.split("\n") if diff else [])]
    text = "".join(f"{line}\n" for line in lines)
    if len(text) <= longest:
        return text
    return f"{text[:longest]}\n[cut: {len(text):,} characters, of which the first {longest:,} are kept]\n"


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name() -> str:
    """The first GPU's name, or the processor's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver(said: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Version of the NVIDIA driver, from the kernel: its tool may hang."""
    try:
        found = re.search(r"^NVRM version:.*?\s(\d+\.[\d.]+)\s", said.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else found.group(1)


def _git(*arguments: str) -> str | None:
    """The answer of git about the folder this package was installed from, if it is a checkout."""
    folder = _PACKAGE.parent
    if not (folder / ".git").exists():
        return None
    # A refreshed index gains nothing here, and its lock would outlive a process that is killed meanwhile.
    quiet = ("--no-optional-locks", "-c", "diff.autoRefreshIndex=false")
    try:
        answer = subprocess.run(
            ["git", *quiet, *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.rstrip("\n") if answer.returncode == 0 else None
