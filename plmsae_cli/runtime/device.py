"""Which device and arithmetic this process uses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from plmsae_cli.config.errors import UserError

if TYPE_CHECKING:
    import torch

    from plmsae_cli.config.launching import Launch


DRIVER_SECONDS = 30
ALLOWED = "PLMSAE_GPUS"
"""Environment variable by which an executor tells its processes which GPUs the launch wants: their numbers, by commas."""


@dataclass(frozen=True)
class GPU:
    """What a data sheet says: dense products with float32 sums, and memory."""

    tflops_bfloat16: float | None
    tflops_float32: float
    """Without TF32."""
    gigabytes_per_second: float
    nvlink: bool


# Words of a GPU's name, of NVIDIA's data sheets and architecture white papers (H100 2023, H200 2024, HGX B200 2024, A100
# 2021, L4, L40S 2023, Ada 2022, GA102 2021, V100 2018, T4 2019); where a sheet has sparse figures alone, half of those. The
# first entry whose words all occur counts.
_GPUS: tuple[tuple[frozenset[str], GPU], ...] = (
    (frozenset({"B200"}), GPU(2250.0, 75.0, 8000.0, True)),
    (frozenset({"H200"}), GPU(989.4, 66.9, 4800.0, True)),
    (frozenset({"H100", "PCIe"}), GPU(756.0, 51.2, 2000.0, False)),
    (frozenset({"H100", "NVL"}), GPU(835.0, 60.0, 3900.0, False)),
    (frozenset({"H100"}), GPU(989.4, 66.9, 3350.0, True)),
    (frozenset({"A100", "40GB"}), GPU(312.0, 19.5, 1555.0, True)),
    (frozenset({"A100"}), GPU(312.0, 19.5, 2039.0, True)),
    (frozenset({"A40"}), GPU(149.7, 37.4, 696.0, False)),
    (frozenset({"L40S"}), GPU(362.0, 91.6, 864.0, False)),
    (frozenset({"L4"}), GPU(121.0, 30.3, 300.0, False)),
    (frozenset({"4090"}), GPU(165.2, 82.6, 1008.0, False)),
    (frozenset({"3090"}), GPU(71.0, 35.6, 936.0, False)),
    (frozenset({"V100"}), GPU(None, 15.7, 900.0, True)),
    (frozenset({"T4"}), GPU(None, 8.1, 320.0, False)),
)


def known_gpu(name: str) -> GPU | None:
    """The data sheet of the GPU that calls itself so; None where it is unknown, or a part of one."""
    words = set(re.split(r"[\s-]+", name))
    if "MIG" in words:  # a part of a GPU, under the name of the whole
        return None
    return next((gpu for wanted, gpu in _GPUS if wanted <= words), None)


def peak_flops(device: torch.device, compute: torch.dtype) -> float | None:
    """Operations a second that the device's products reach at best; None where that is not known, as on CPUs."""
    import torch

    if device.type != "cuda":
        return None
    gpu = known_gpu(torch.cuda.get_device_name(device))
    if gpu is None:
        return None
    found = {torch.bfloat16: gpu.tflops_bfloat16, torch.float32: gpu.tflops_float32}.get(compute)
    return None if found is None else found * 1e12


def visible_gpus() -> int:
    """GPUs that torch can use in this process's environment."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def installed_gpus() -> int:
    """GPUs that the driver shows, whether or not torch can use them. Raises UserError where it does not answer."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 0
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        answer = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=DRIVER_SECONDS, check=False)
    except subprocess.TimeoutExpired:  # as with a dead GPU
        raise UserError(
            f"nvidia-smi gives no answer in {DRIVER_SECONDS} s: the driver or a GPU hangs",
            "look at dmesg and restart the machine; launch.gpus: 0 runs on the CPU",
        ) from None
    return len(re.findall(r"^GPU \d+", answer.stdout, re.MULTILINE)) if answer.returncode == 0 else 0


def count_gpus(launch: Launch) -> int:
    """GPUs this launch uses.

    Raises:
        UserError: more were asked for than torch sees, or the machine has GPUs that this torch cannot use.
    """
    if launch.gpus == 0:
        return 0
    seen = visible_gpus()
    if seen == 0 and installed_gpus() > 0:
        import torch

        raise UserError(
            f"this machine has {installed_gpus()} GPU(s), but torch {torch.__version__} cannot use them",
            "./setup.sh --torch-index URL installs the wheel that fits the driver (pytorch.org/get-started lists them); "
            "launch.gpus: 0 computes on the CPU",
        )
    if launch.gpus == "auto":
        return seen
    if launch.executor != "local":  # the cluster's, of which this machine need have none
        return min(seen, launch.gpus) if isinstance(launch.gpus, int) else seen
    if isinstance(launch.gpus, list):
        if absent := [gpu for gpu in launch.gpus if gpu >= seen]:
            raise UserError(
                f"launch.gpus names GPU {absent[0]}, {seen} are visible", "they are counted from 0; or use auto"
            )
        return len(launch.gpus)
    if launch.gpus > seen:
        raise UserError(f"launch.gpus asks for {launch.gpus} GPUs, {seen} are visible", "lower launch.gpus or use auto")
    return launch.gpus


def chosen_gpus(launch: Launch) -> list[int]:
    """The GPUs this launch uses, by their numbers among the visible ones. Raises as `count_gpus`."""
    count = count_gpus(launch)
    return launch.gpus if isinstance(launch.gpus, list) else list(range(count))


def visible_as(gpus: Sequence[int]) -> str:
    """CUDA_VISIBLE_DEVICES of a process that is to see these of the visible GPUs alone."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return ",".join(named.split(",")[gpu] if named else str(gpu) for gpu in gpus)


def device_memory(launch: Launch) -> int:
    """Bytes that training may plan with: nine tenths of the smallest GPU, or of the memory this process may have."""
    gpus = chosen_gpus(launch)
    if gpus:
        import torch

        whole = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)
    else:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit = Path("/sys/fs/cgroup/memory.max")
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            whole = min(whole, int(text))
    return whole * 9 // 10


def allow_gpus(chosen: Sequence[int]) -> None:
    """Let this process, and those it starts, use these of the visible GPUs: its first rank the first, and so on."""
    os.environ[ALLOWED] = ",".join(map(str, chosen))


def pick_device(local_rank: int = 0) -> torch.device:
    """The GPU of this rank among those the launch wants, all that are visible unless it says; the CPU where there is none.

    It becomes this thread's current one: kernels of Triton's are launched there, wherever their tensors are.
    """
    import torch

    allowed = os.environ.get(ALLOWED)
    chosen = list(range(local_rank + 1)) if allowed is None else [int(gpu) for gpu in allowed.split(",") if gpu]
    if local_rank < len(chosen) and visible_gpus() > chosen[local_rank]:
        torch.cuda.set_device(chosen[local_rank])
        return torch.device("cuda", chosen[local_rank])
    return torch.device("cpu")


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The arithmetic for `auto` on this device: bfloat16 from sm80 on, float16 below, float32 on a CPU."""
    import torch

    if wanted != "auto":
        dtype = getattr(torch, wanted)
        assert isinstance(dtype, torch.dtype)
        if device.type == "cuda" and dtype is torch.bfloat16 and torch.cuda.get_device_capability(device)[0] < 8:
            raise UserError(f"{torch.cuda.get_device_name(device)} has no bfloat16", "use compute: float16 or auto")
        return dtype
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def training_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`compute_dtype`, but float32 for float16: without bfloat16, exactness is worth more than loss scaling."""
    import torch

    found = compute_dtype(wanted, device)
    return torch.float32 if found is torch.float16 else found
