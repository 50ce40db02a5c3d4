"""The probes of one target: on the best single latent, on all latents, and on the activations that the latents came from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from plmsae_cli.evaluation.probes.evidence import auroc_interval
from plmsae_cli.evaluation.probes.features import Sides
from plmsae_cli.evaluation.probes.logistic import fit_all, fit_each, log_loss, promising, ranking

CANDIDATES = 64
"""Latents fitted alone, those of the largest score statistic: fits of thousands, of which one is chosen, would take minutes."""


def probe(sides: Sides, y_R: Tensor, l2: float, draws: int) -> dict[str, Any]:
    """The latent with the least loss on train alone, all latents, and all activations (`raw`), each scored on test.

    Areas have intervals over test proteins, `draws` times drawn.
    """
    train, test = sides.train, sides.test
    y_train, y_test = y_R[~sides.test_R], y_R[sides.test_R]
    latent, logits = _of_latents(sides, y_train, l2)
    w_D, b = fit_all(train.raw, y_train, l2)
    row: dict[str, Any] = {
        "rows_train": len(y_train),
        "rows_test": len(y_test),
        "positives_train": int(y_train.sum()),
        "positives_test": int(y_test.sum()),
        **latent,
    }
    for kind, z_R in {**logits, "raw": test.raw.times(w_D) + b}.items():
        row[f"auroc_{kind}"], row[f"auprc_{kind}"] = ranking(z_R, y_test)
        row[f"loss_{kind}"] = log_loss(z_R, y_test)
        row[f"interval_auroc_{kind}"] = auroc_interval(z_R, y_test, test.protein_R, draws)
    return row


def null(sides: Sides, y_R: Tensor, l2: float) -> dict[str, float | None]:
    """Areas of the probes on latents, for labels that say nothing; None where these leave a side with one kind."""
    y_train, y_test = y_R[~sides.test_R], y_R[sides.test_R]
    if not all(bool(y.any()) and not bool(y.all()) for y in (y_train, y_test)):
        return {"auroc_single_null": None, "auroc_all_null": None}
    _, logits = _of_latents(sides, y_train, l2)
    return {f"auroc_{kind}_null": ranking(z_R, y_test)[0] for kind, z_R in logits.items()}


def _of_latents(sides: Sides, y_train: Tensor, l2: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The chosen latent and its weight; logits of test rows of it (`single`) and of all."""
    x, test = sides.train.latents, sides.test.latents
    candidates = promising(x, y_train, l2, CANDIDATES)
    w_M, b_M, loss_M = fit_each(x.only(candidates), y_train, l2)
    best = int(loss_M.argmin())
    latent, w, b = int(candidates[best]), float(w_M[best]), float(b_M[best])
    weights_N, intercept = fit_all(sides.train.together, y_train, l2)
    chosen = {"latent": latent, "weight": w}
    return chosen, {
        "single": w * test.column(latent) + b,
        "all": sides.test.together.times(weights_N) + intercept,
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine: several threads would each add a part."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
