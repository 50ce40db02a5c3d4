"""What to do about an experiment of a queue that failed: again after a pause, wait until the machine is well, or go on.

What no other experiment would survive either (a full disk, lost credentials, a dead GPU) pauses the queue until its check
passes. What may be otherwise the next time (a server that was overloaded, a process that the system took) is tried again a
few times. Everything else is the experiment's own.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from plmsae_cli.config.errors import UserError, first_line
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.runtime.checks import ROOM, Check, bucket, folders, gpus_compute, nearest, space
from plmsae_cli.runtime.device import installed_gpus
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import TaskFailed
from plmsae_cli.store.fs import is_remote
from plmsae_cli.store.records import StoreError

BACKOFF_S = (10.0, 60.0, 300.0)
"""Pauses before the second, third and fourth attempt."""
BRIEF_S = (5.0, 25.0)
"""The same where somebody waits for the answer."""
CHECK_EVERY_S = 30.0
REMIND_EVERY_S = 600.0
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH)
_FULL = ("the disk is full", "No space left on device", "Disk quota exceeded")
_GPU = ("CUDA error", "CUDA driver", "NVML", "NCCL error", "device-side assert", "uncorrectable ECC")
_OWN_BUCKET = ("there is no such bucket", "does not know the bucket")

Again = Callable[[], Check]
"""Looks at the failing thing once more."""


def passing(error: Exception) -> bool:
    """Whether the same may succeed the next time."""
    if isinstance(error, TaskFailed):
        return error.lost
    if isinstance(error, StoreError):  # it has been patient already; overloaded servers recover
        return error.hint is not None and error.hint.startswith(("start again later", "check the network"))
    return isinstance(error, (ConnectionError, TimeoutError)) or (
        isinstance(error, OSError) and error.errno in _PASSING
    )


def failing_check(error: Exception, experiment: Experiment) -> Again | None:
    """The check of the machine that fails, where the error is the machine's and not the experiment's."""
    text = str(error) + getattr(error, "trace", "")
    places = folders(experiment)
    looks: list[Again] = []
    if any(words in text for words in _FULL):
        looks += [partial(space, name, at, _enough(at)) for name, at in places.items() if not is_remote(at)]
    if isinstance(error, StoreError) and not any(words in text for words in _OWN_BUCKET):
        remote = [place for place in (*places.values(), *_inputs(experiment)) if is_remote(place)]
        looks += [partial(bucket, experiment, place, write=False) for place in remote]
    if any(words in text for words in _GPU) and _has_gpus():
        looks.append(gpus_compute)
    return next((look for look in looks if look().state == "fail"), None)


def _has_gpus() -> bool:
    try:
        return installed_gpus() > 0
    except UserError:  # they hang, which is what the check is to find
        return True


def _inputs(experiment: Experiment) -> list[str]:
    data = experiment.train and experiment.train.data
    return [data] if data else []


def _enough(place: str) -> int:
    """Free bytes at which a disk that was too full is worth another try."""
    return max(2 * shutil.disk_usage(nearest(Path(place))).free, ROOM)


class Recovery:
    """Decides for one experiment after the other.

    Args:
        say: tells what is being waited for.
        patient: tries for minutes what may be otherwise the next time, not for seconds.
    """

    def __init__(self, say: Callable[[str], None], patient: bool = True) -> None:
        self._say, self._pauses = say, BACKOFF_S if patient else BRIEF_S
        self._attempts: dict[Path, int] = {}

    def again(self, path: Path, error: Exception, experiment: Experiment, wait: bool = True) -> bool:
        """Wait as long as need be; whether the experiment is to be tried again. False at once after a wish to stop.

        Args:
            wait: for the machine to be well, however long that takes.
        """
        look = failing_check(error, experiment) if wait else None
        if look is not None:
            return self._until_well(look)
        tried = self._attempts.get(path, 0)
        if not passing(error) or tried >= len(self._pauses):
            return False
        self._attempts[path] = tried + 1
        pauses = self._pauses
        self._say(
            f"{path.name}: trying again in {pauses[tried]:.0f} s ({tried + 1} of {len(pauses)}): {first_line(error)}"
        )
        return pause(pauses[tried])

    def _until_well(self, look: Again) -> bool:
        told = 0.0
        while (found := look()).state == "fail":
            if not told or time.monotonic() - told > REMIND_EVERY_S:
                told = time.monotonic()
                remedy = f"; {found.remedy}" if found.remedy else ""
                self._say(f"queue paused: {found.text}{remedy}. It goes on by itself; Ctrl-C ends it")
            if not pause(CHECK_EVERY_S):
                return False
        self._say("the check passes again: the queue goes on")
        return True


def pause(seconds: float) -> bool:
    """Sleep; false if a wish to stop came first."""
    end = time.monotonic() + seconds
    while not STOP.requested():
        left = end - time.monotonic()
        if left <= 0:
            return True
        time.sleep(min(left, 0.2))
    return False
