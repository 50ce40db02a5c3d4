"""Every name in metrics.jsonl, which are those on W&B: what it is and in which unit. `docs/metrics.md` is made of it."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["sae", "plm"]


class Metric(NamedTuple):
    """One figure of training."""

    name: str
    """As in the file; on W&B the same, nested ones joined by slashes. `*` stands for the name of a validation set."""
    unit: str
    kinds: tuple[Kind, ...]
    meaning: str


_BOTH: tuple[Kind, ...] = ("sae", "plm")
_SAE: tuple[Kind, ...] = ("sae",)
_PLM: tuple[Kind, ...] = ("plm",)

METRICS = (
    Metric("step", "steps", _BOTH, "optimiser steps so far, counted from 1"),
    Metric("tokens", "residues", _BOTH, "trained on so far, over all ranks"),
    Metric("lr", "", _BOTH, "learning rate of the step"),
    Metric("loader_wait", "seconds, since the start", _BOTH, "time that training has waited for data"),
    Metric("tokens_per_second", "residues a second", _BOTH, "since the line before (absent in the first)"),
    Metric("step_ms", "milliseconds", _BOTH, "wall time of a step, mean since the line before (absent in the first)"),
    Metric("loader_share", "share", _BOTH, "of that time, spent waiting for data (absent in the first)"),
    Metric(
        "batch_entropy", "share", _SAE,
        "how evenly the step's rows come from the whole dataset: entropy over 64 stretches of it; 1 even, 0 all from one;"
        " .9991 expected at 8,192 rows",
    ),
    Metric(
        "mfu", "share", _BOTH,
        "floating-point operations that the model needs, of those that the GPUs could do in that time; absent on CPUs and"
        " where the GPU's peak is not known",
    ),
    Metric("grad_norm", "sae: of the squared error summed over dimensions", _BOTH, "gradient norm before clipping"),
    Metric(
        "loss", "sae: squared error a dimension of the standardised activations; plm: nats a predicted residue", _BOTH,
        "what is minimised",
    ),
    Metric("reconstruction", "as `loss`", _SAE, "the error in `loss` (Matryoshka: mean over the nested prefixes)"),
    Metric(
        "aux", "", _SAE,
        "the term beside it before its coefficient, a residue: AuxK, the sparsity penalty, or `switch`'s load balance (1"
        " where even)",
    ),
    Metric("fvu", "share", _SAE, "unexplained variance of the batch, by the whole dictionary"),
    Metric("l0", "latents", _SAE, "active latents a residue, mean over the batch"),
    Metric("l0_std", "latents", _SAE, "their standard deviation (not with TopK's fused kernels)"),
    Metric("dead", "share", _SAE, "latents that have not fired for `train.dead_tokens`"),
    Metric("accuracy", "share", _PLM, "predicted residues that are right"),
    Metric("masked", "share", _PLM, "residues to predict; with `masked_diffusion` or a ramp of the mask rate"),
    Metric("train_seconds", "seconds, over all starts", _PLM, "training, without compiling, validating and saving"),
    Metric("valid/*/loss", "nats a predicted residue", _PLM, "on a validation set, every `train.plm.eval_every` steps"),
    Metric("valid/*/perplexity", "", _PLM, "its exponential"),
    Metric("valid/*/accuracy", "share", _PLM, "predicted residues that are right"),
    Metric("valid/*/precision", "share", _PLM, "weighted by how often each residue occurs"),
    Metric("valid/*/recall", "share", _PLM, "weighted likewise"),
    Metric("valid/*/f1", "share", _PLM, "weighted likewise"),
    Metric("valid/*/mcc", "", _PLM, "Matthews' correlation coefficient for several classes"),
    Metric("valid/*/residues", "residues", _PLM, "predicted"),
)  # fmt: skip


def general(name: str) -> str:
    """A name of a line as it stands in `METRICS`: `valid/random/loss` as `valid/*/loss`."""
    first, *rest = name.split("/")
    return "/".join([first, "*", *rest[1:]]) if first == "valid" and len(rest) > 1 else name
