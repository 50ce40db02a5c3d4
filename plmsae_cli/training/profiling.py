"""A look into some steps: torch's profiler, a trace, a table, and one sentence that names the bottleneck."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

WARM = 10
"""Steps before the first that is looked at: allocations, caches and compilation are over by then."""
STEPS = 10
TOP = 5
LOADER_SHARE = 0.3
"""From this share of the time on, waiting for data is the bottleneck."""
IDLE_SHARE = 0.5
"""A GPU that idles for more than this share waits for the host, whatever its longest kernel is."""


class StepProfile(Protocol):
    """Told of each step's begin and end."""

    def before(self, step: int) -> None: ...

    def after(self, step: int) -> str | None:
        """What was found, after the last step that was looked at."""

    def close(self) -> None: ...


class NoProfile:
    """Looks at nothing."""

    def before(self, step: int) -> None:
        return

    def after(self, step: int) -> str | None:
        return None

    def close(self) -> None:
        return


class TorchProfile:
    """Writes `trace.json.gz` and `table.txt` of `STEPS` steps, from `WARM` steps after the start on if there are as many.

    `loader_wait` gives the seconds that training has waited for data so far.
    """

    def __init__(
        self, folder: Path, start: int, total: int, device: torch.device, loader_wait: Callable[[], float]
    ) -> None:
        self._folder, self._device, self._loader_wait = folder, device, loader_wait
        self._first = max(start, min(start + WARM, total - STEPS))
        self._last = min(self._first + STEPS, total) - 1
        self._profiler: torch.profiler.profile | None = None
        self._clock = self._waited = 0.0

    def before(self, step: int) -> None:
        if step != self._first:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize(self._device)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its marks of start and stop would go to stderr
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()
        self._clock, self._waited = time.perf_counter(), self._loader_wait()

    def after(self, step: int) -> str | None:
        if step != self._last or self._profiler is None:
            return None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._clock
        waited = self._loader_wait() - self._waited
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        return self._write(profiler, seconds, waited)

    def close(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: torch.profiler.profile, seconds: float, waited: float) -> str:
        cuda = self._device.type == "cuda"
        averages = profiler.key_averages()
        times = sorted(_times(averages, cuda), key=lambda each: -each[1])
        total = sum(spent for _, spent in times)
        steps = self._last - self._first + 1
        lines = [f"profile of steps {self._first + 1} to {self._last + 1}: {1e3 * seconds / steps:.2f} ms a step"]
        lines += [f"  {spent / max(total, 1e-12):6.1%}  {_short(name)}" for name, spent in times[:TOP]]
        lines.append(bottleneck(times, waited / seconds, total / seconds if cuda else None))
        self._folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / "trace.json.gz"))
        table = averages.table(sort_by=f"self_{'device' if cuda else 'cpu'}_time_total", row_limit=40)
        (self._folder / "table.txt").write_text("\n".join([*lines, "", table]) + "\n", encoding="utf-8")
        return "\n".join([*lines, f"written to {self._folder}; ui.perfetto.dev opens trace.json.gz"])


def bottleneck(times: Sequence[tuple[str, float]], loader_share: float, busy_share: float | None) -> str:
    """One sentence. `times`: seconds by operator or kernel, longest first; `busy_share`: of the GPU, None on a CPU."""
    if loader_share >= LOADER_SHARE:
        return f"bottleneck: the loader; steps waited for data {loader_share:.0%} of the time"
    if busy_share is not None and busy_share < 1 - IDLE_SHARE:
        return f"bottleneck: the host; the GPU computed {busy_share:.0%} of the time"
    name, spent = times[0]
    share = spent / sum(each for _, each in times)
    return f"bottleneck: {_short(name)}, {share:.0%} of the {'CPU' if busy_share is None else 'GPU'} time"


def _times(averages: Any, cuda: bool) -> list[tuple[str, float]]:
    """Seconds by kernel on a GPU, by operator (without those it calls) on a CPU."""
    # On a GPU, operators carry the time of the kernels they started: those rows would count it twice.
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU  # type: ignore[attr-defined]
    return [
        (row.key, (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1e6)
        for row in averages
        if row.device_type == wanted and not row.is_user_annotation
    ]


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:57]}..."
