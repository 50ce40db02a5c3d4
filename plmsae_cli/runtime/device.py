"""Which device and arithmetic this process uses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from plmsae_cli.config.errors import UserError

if TYPE_CHECKING:
    import torch

    from plmsae_cli.config.data import Launch


ALLOWED = "PLMSAE_GPUS"
"""Environment variable by which an executor tells its processes how many GPUs the launch wants."""


# Words of a GPU's name -> dense TFLOP/s in bfloat16 (float32 sums) and in float32 without TF32, of NVIDIA's data sheets and
# architecture white papers (H100 2023, H200 2024, HGX B200 2024, A100 2021, L4, L40S 2023, Ada 2022, GA102 2021, V100 2018,
# T4 2019); where a sheet has sparse figures alone, half of those. The first entry whose words all occur counts.
_PEAK_TFLOPS: tuple[tuple[frozenset[str], float | None, float], ...] = (
    (frozenset({"B200"}), 2250.0, 75.0),
    (frozenset({"H200"}), 989.4, 66.9),
    (frozenset({"H100", "PCIe"}), 756.0, 51.2),
    (frozenset({"H100", "NVL"}), 835.0, 60.0),
    (frozenset({"H100"}), 989.4, 66.9),
    (frozenset({"A100"}), 312.0, 19.5),
    (frozenset({"A40"}), 149.7, 37.4),
    (frozenset({"L40S"}), 362.0, 91.6),
    (frozenset({"L4"}), 121.0, 30.3),
    (frozenset({"4090"}), 165.2, 82.6),
    (frozenset({"3090"}), 71.0, 35.6),
    (frozenset({"V100"}), None, 15.7),
    (frozenset({"T4"}), None, 8.1),
)


def peak_flops(device: torch.device, compute: torch.dtype) -> float | None:
    """Operations a second that the device's products reach at best; None where that is not known, as on CPUs."""
    import torch

    if device.type != "cuda":
        return None
    words = set(re.split(r"[\s-]+", torch.cuda.get_device_name(device)))
    if "MIG" in words:  # a part of a GPU, under the name of the whole
        return None
    for wanted, bfloat16, float32 in _PEAK_TFLOPS:
        if wanted <= words:
            found = {torch.bfloat16: bfloat16, torch.float32: float32}.get(compute)
            return None if found is None else found * 1e12
    return None


def visible_gpus() -> int:
    """GPUs that torch can use in this process's environment."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def installed_gpus() -> int:
    """GPUs that the driver shows, whether or not torch can use them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 0
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    answer = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
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
    if launch.gpus > seen:
        raise UserError(f"launch.gpus asks for {launch.gpus} GPUs, {seen} are visible", "lower launch.gpus or use auto")
    return launch.gpus


def device_memory(launch: Launch) -> int:
    """Bytes that training may plan with: nine tenths of the smallest GPU, or of the memory this process may have."""
    gpus = count_gpus(launch)
    if gpus:
        import torch

        whole = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(gpus))
    else:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit = Path("/sys/fs/cgroup/memory.max")
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            whole = min(whole, int(text))
    return whole * 9 // 10


def allow_gpus(count: int) -> None:
    """Let this process, and those it starts, use that many of the visible GPUs."""
    os.environ[ALLOWED] = str(count)


def pick_device(local_rank: int = 0) -> torch.device:
    """`cuda:<local_rank>` where there is one and the launch wants it, else the CPU."""
    import torch

    if int(os.environ.get(ALLOWED, local_rank + 1)) > local_rank and visible_gpus() > local_rank:
        return torch.device("cuda", local_rank)
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
