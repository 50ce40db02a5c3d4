"""How long training will take on a GPU, from its data sheet: for `--dry-run`, before anything is rented.

Of a dictionary's fused step: a sum over its parts: products at 80 % of the peak, passes over memory at 83 % of its rate,
rows that many tokens share at the rates the caches gave them. Beside measured steps of four shapes on an H100 and three on an
H200 (`benchmarks/README.md`, sae-step) it is off by 3 % at most, beside three on two H200 by 6 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from plmsae_cli.config.experiment import Train
from plmsae_cli.runtime.device import GPU, known_gpu
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.topk import TopK
from plmsae_cli.training.sae_kernels import why_no_kernels

PRODUCTS, MEMORY = 0.80, 0.83
SCATTERED, GATHERED = 4.7e-3, 8.7e-3
"""Bytes an operation of the peak at which rows are read for the residuals and the gradients: most come from the L2 cache,
whose rate goes with the number of cores."""
OVERHEAD_S = 120e-6
PLM_SHARE = 0.4
"""Of the peak that a language model's step is assumed to reach."""
LINKED, UNLINKED = 300e9, 20e9
"""Bytes a second that a collective moves past each GPU, over NVLink and over PCIe."""


@dataclass(frozen=True)
class StepShape:
    """A step of one TopK dictionary."""

    tokens: int
    """Over all GPUs."""
    d: int
    latents: int
    k: int
    state_bytes: int
    """The optimiser's, a parameter: 8 with float32 moments."""


def step_seconds(shape: StepShape, gpu: GPU, gpus: int) -> float | None:
    """Seconds of one step on that many of a GPU, data parallel; None where it has no bfloat16.

    B tokens a GPU: the encoder's product (2 B n d); scores, read once (2 B n bytes); decoder rows and tokens gathered (2 and 4
    B k d bytes); masters and moments read and written, gradients and bfloat16 copies (for this GPU's share of n); gradients
    and copies exchanged, beside what can be done meanwhile.
    """
    if gpu.tflops_bfloat16 is None:
        return None
    rows, n, d = shape.tokens / gpus, shape.latents, shape.d
    peak, memory = gpu.tflops_bfloat16 * 1e12, gpu.gigabytes_per_second * 1e9
    products = 2 * rows * n * d / (PRODUCTS * peak)
    scores = (2 * rows * n + 60 * rows * math.sqrt(n * shape.k)) / (MEMORY * memory)
    pairs = (2 / SCATTERED + 4 / GATHERED) * rows * shape.k * d / peak
    gradients = 4 * n * d / (MEMORY * memory)
    update = 2 * n * d / gpus * (2 * (4 + shape.state_bytes) + 4) / (MEMORY * memory)
    exchanged = 2 * 4 * n * d * (gpus - 1) / gpus / (LINKED if gpu.nvlink else UNLINKED)
    return products + scores + pairs + gradients + update + exchanged + OVERHEAD_S


def state_bytes(options: Train) -> int:
    """Bytes of optimiser state a parameter of a matrix."""
    return 8 if options.optimizer == "adam" and options.moments == "float32" else 4


def may_fuse(model: Dictionary, options: Train, gpus: int) -> bool:
    """Whether that many GPUs that have the fused kernels train it by them, as far as can be said without one."""
    return options.kernels != "plain" and why_no_kernels(model, options, gpus) is None


def forecast(
    model: Dictionary,
    options: Train,
    steps: int,
    row_bytes: int,
    present: tuple[str, int] | None,
    gpu_hour: float | None,
) -> dict[str, str | float]:
    """`predicted` time on the GPUs present (their name and number), on one and on eight, and what it is `predicted_from`.

    `predicted_seconds` is that on those present. Without GPUs, the times of an H100. Nothing for what has no fused step, and
    for unknown GPUs.
    """
    name, number = present or ("NVIDIA H100", 1)
    gpu = known_gpu(name)
    if gpu is None or not isinstance(model, TopK) or not may_fuse(model, options, number):
        return {}
    shape = StepShape(options.batch_tokens, model.d, model.num_latents, model.k, state_bytes(options))
    said, fastest, own = [], 0.0, 0.0
    for gpus in sorted({1, number, 8}):
        seconds = step_seconds(shape, gpu, gpus)
        if seconds is None:
            return {}
        whole = steps * seconds
        cost = "" if gpu_hour is None else f" (${whole / 3600 * gpus * gpu_hour:,.2f})"
        said.append(f"{_time(whole)} on {gpus} x {name}{cost}")
        fastest = max(fastest, shape.tokens / seconds)
        own = whole if gpus == number else own
    speed = fastest * row_bytes / 1e9
    return {
        **({"predicted_seconds": round(own, 1)} if present is not None else {}),
        "predicted": ", ".join(said),
        "predicted_from": f"data sheets and measured steps, where blocks come at up to {speed:.2g} GB/s; initialisation, "
        "checkpoints and export apart",
    }


def forecast_plm(flops: float, tokens: int, present: tuple[str, int] | None, gpu_hour: float | None) -> dict[str, str]:
    """The same of a language model that needs `flops` a token: operations over an assumed share of the peak."""
    name, number = present or ("NVIDIA H100", 1)
    gpu = known_gpu(name)
    if gpu is None or gpu.tflops_bfloat16 is None:
        return {}
    said = []
    for gpus in sorted({1, number, 8}):
        seconds = flops * tokens / (PLM_SHARE * gpu.tflops_bfloat16 * 1e12 * gpus)
        cost = "" if gpu_hour is None else f" (${seconds / 3600 * gpus * gpu_hour:,.2f})"
        said.append(f"{_time(seconds)} on {gpus} x {name}{cost}")
    return {
        "predicted": ", ".join(said),
        "predicted_from": f"{flops / 1e9:.3g} GFLOP a token at {PLM_SHARE:.0%} of the data sheet's peak, assumed; compiling, "
        "validation and checkpoints apart",
    }


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
