"""Which process wrote a status, and whether it is still there."""

from __future__ import annotations

import ctypes
import math
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
SILENT_S = 600.0
"""Ten signs of life that did not come, or that a shared disk is late with."""

PORTS = range(20_000, 32_000)
"""For servers to come: the system gives none of these to connections, one of which may take a port before its server does."""


def free_port() -> int:
    """One of `PORTS` that nobody listens on now."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("", port))
            return port


def go_with_parent() -> None:
    """Have the kernel kill this process when its parent goes, even where it is stopped; Linux alone knows how."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def me() -> dict[str, Any]:
    """This process, for a record: its number can be another's later, its start cannot."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """The boot and the clock tick at which a process began; None where the system does not say, or it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else f"{boot}:{fields[19]}"


def alive(record: Mapping[str, Any]) -> bool:
    """Whether the process of a record is there. One on another machine cannot be asked and counts as alive."""
    if "pid" not in record or record.get("host", socket.gethostname()) != socket.gethostname():
        return True
    pid = int(record["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    wanted = record.get("started")
    return wanted is None or _started(pid) == wanted


def live_state(status: Mapping[str, Any]) -> str:
    """The recorded state of a run; a `running` whose process is gone was killed.

    `silent`: its process is on another machine, and has given no sign of life for `SILENT_S` seconds.
    """
    state = str(status.get("state", "unknown"))
    if state != "running":
        return state
    if not alive(status):
        return "killed"
    elsewhere = status.get("host", socket.gethostname()) != socket.gethostname()
    return "silent" if elsewhere and time.time() - status.get("updated", math.inf) > SILENT_S else state


def state_words(status: Mapping[str, Any]) -> str:
    """`live_state` for people: of a silent run since when, of one that waits for its turn that it does."""
    state = live_state(status)
    if state == "running" and status.get("waiting"):
        return "running (waiting)"
    if state != "silent":
        return state
    return f"no word since {time.strftime('%Y-%m-%d %H:%M', time.localtime(status['updated']))} from {status['host']}"
