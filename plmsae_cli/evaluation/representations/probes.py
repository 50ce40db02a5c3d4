"""Linear probes on dense features, in float64 on the CPU: softmax regression and ridge regression, and their scores.

Features are standardised by the training rows. Letters: R rows, D features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plmsae_cli.runtime.masked_scores import figures


def fit_softmax(x_RD: Tensor, y_R: Tensor, classes: int, l2: float, start: Tensor | None = None) -> Tensor:
    """Weights and, in the last row, intercepts [D + 1, C] that minimise sum CE + l2/2 ||W||^2, intercepts not penalised.

    scikit-learn's `LogisticRegression(C=1/l2)`, of two classes, for which that has one row of weights, `C=2/l2`. By L-BFGS
    (Liu and Nocedal 1989), from `start` where it is given.
    """
    rows, width = x_RD.shape
    theta = torch.zeros(width + 1, classes, dtype=torch.float64) if start is None else start.clone()
    theta.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=100,
        tolerance_grad=1e-5,
        tolerance_change=1e-10,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    onehot_RC = F.one_hot(y_R, classes).double()

    @torch.no_grad()
    def closure() -> Tensor:
        logits_RC = torch.addmm(theta[-1], x_RD, theta[:-1])
        log_RC = F.log_softmax(logits_RC, dim=1)
        residual_RC = log_RC.exp() - onehot_RC
        slope_DC = x_RD.T @ residual_RC + l2 * theta[:-1]
        theta.grad = torch.cat([slope_DC, residual_RC.sum(0, keepdim=True)]) / rows
        return (-(onehot_RC * log_RC).sum() + l2 / 2 * theta[:-1].square().sum()) / rows

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return theta.detach()


def fit_ridge(x_RD: Tensor, y_R: Tensor, l2: float) -> Tensor:
    """Weights and the intercept [D + 1] that minimise ||y - Xw - b||^2 + l2 ||w||^2, in closed form."""
    mean_D, mean = x_RD.mean(0), y_R.mean()
    x_RD, y_R = x_RD - mean_D, y_R - mean
    if len(x_RD) < x_RD.shape[1]:  # the same w through the smaller system: w = X^T (X X^T + l2)^-1 y
        gram_RR = x_RD @ x_RD.T + l2 * torch.eye(len(x_RD), dtype=torch.float64)
        w_D = x_RD.T @ torch.linalg.solve(gram_RR, y_R)
    else:
        w_D = torch.linalg.solve(x_RD.T @ x_RD + l2 * torch.eye(x_RD.shape[1], dtype=torch.float64), x_RD.T @ y_R)
    return torch.cat([w_D, (mean - mean_D @ w_D)[None]])


def class_scores(predicted_R: Tensor, y_R: Tensor, classes: int) -> dict[str, float]:
    """`mcc`, `accuracy` and weighted `f1` of predicted classes."""
    confusion = torch.bincount(y_R * classes + predicted_R, minlength=classes * classes).view(classes, classes)
    found = figures(confusion.double().numpy(), 0.0)
    return {name: found[name] for name in ("mcc", "accuracy", "f1")}


def number_scores(predicted_R: Tensor, y_R: Tensor) -> dict[str, float]:
    """`spearman`, the correlation of ranks (mean ranks of equals), 0 where one side is constant, and `r2`."""
    rank, other = _ranks(predicted_R), _ranks(y_R)
    rank, other = rank - rank.mean(), other - other.mean()
    scale = math.sqrt(float(rank @ rank) * float(other @ other))
    spread = float((y_R - y_R.mean()).square().sum())
    error = float((y_R - predicted_R).square().sum())
    return {
        "spearman": float(rank @ other) / scale if scale > 0 else 0.0,
        "r2": 1 - error / spread if spread > 0 else 0.0,
    }


def _ranks(values_R: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    _, place_R, count_U = np.unique(values_R.numpy(), return_inverse=True, return_counts=True)
    last_U = np.cumsum(count_U)
    ranks: np.ndarray[tuple[int], np.dtype[np.float64]] = (last_U - (count_U - 1) / 2)[place_R]
    return ranks


def probe(
    features: Mapping[str, Tensor], labels: Mapping[str, Tensor], classes: int | None, penalties: Sequence[float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Scores on valid and on test of the probe whose penalty is best on valid.

    Args:
        features: by split (`train`, `valid`, `test`), [R, D].
        labels: by split, [R]: class numbers, or float64 numbers where `classes` is None.
        penalties: of the squared weights.
    """
    train_RD = features["train"].double()
    mean_D, deviation_D = train_RD.mean(0), train_RD.std(0, correction=0)
    # A feature that is constant but for rounding says nothing, and must not be blown up.
    deviation_D = torch.where(deviation_D > 1e-6 * (1 + mean_D.abs()), deviation_D, math.inf)
    scaled = {split: (x_RD.double() - mean_D) / deviation_D for split, x_RD in features.items()}
    best: tuple[float, dict[str, float], dict[str, float]] | None = None
    theta: Tensor | None = None
    for l2 in sorted(penalties, reverse=True):
        if classes is None:
            theta = fit_ridge(scaled["train"], labels["train"], l2)
            scores = [number_scores(scaled[s] @ theta[:-1] + theta[-1], labels[s]) for s in ("valid", "test")]
            main = scores[0]["spearman"]
        else:
            theta = fit_softmax(scaled["train"], labels["train"], classes, l2, theta)
            guesses = {s: (scaled[s] @ theta[:-1] + theta[-1]).argmax(1) for s in ("valid", "test")}
            scores = [class_scores(guesses[s], labels[s], classes) for s in ("valid", "test")]
            main = scores[0]["mcc"]
        if best is None or main > best[0]:
            best = (main, scores[0], scores[1])
    assert best is not None
    return best[1], best[2]
