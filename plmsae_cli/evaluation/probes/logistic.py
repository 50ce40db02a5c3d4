"""Logistic regression with an L2 penalty on sparse features: on each latent alone, all at once, and on all together.

    minimise  sum_r [ log(1 + exp(z_r)) - y_r z_r ] + l2/2 ||w||^2,    z_r = <w, x_r> + b,    b unpenalised

which is scikit-learn's `LogisticRegression(C=1/l2)`. Everything is float64 on the CPU, where sums have one order: results repeat
bit for bit. Letters: R rows, N features, Q entries that are not zero.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import softplus

from plmsae_cli.evaluation.concepts.scores import auprc, auroc

_STEPS = 50
_HALVINGS = 20
_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Sparse:
    """A matrix [R, N] by its entries; `row_Q` ascends."""

    row_Q: Tensor
    column_Q: Tensor
    value_Q: Tensor
    rows: int
    columns: int

    def some(self, keep_R: Tensor) -> Sparse:
        """The rows where `keep_R` is true, numbered anew."""
        number_R = keep_R.cumsum(0) - 1
        inside_Q = keep_R[self.row_Q]
        rows = number_R[self.row_Q[inside_Q]]
        return Sparse(rows, self.column_Q[inside_Q], self.value_Q[inside_Q], int(keep_R.sum()), self.columns)

    def only(self, columns: Tensor) -> Sparse:
        """These columns, numbered anew; they ascend."""
        number_N = torch.full((self.columns,), -1)
        number_N[columns] = torch.arange(len(columns))
        column_Q = number_N[self.column_Q]
        inside_Q = column_Q >= 0
        entries = (self.row_Q[inside_Q], column_Q[inside_Q], self.value_Q[inside_Q])
        return Sparse(*entries, self.rows, len(columns))

    def dense(self) -> Tensor:
        """[R, N] with its zeros."""
        x_RN = torch.zeros(self.rows, self.columns, dtype=torch.float64)
        x_RN[self.row_Q, self.column_Q] = self.value_Q
        return x_RN

    @cached_property
    def csr(self) -> Tensor:
        """[R, N] as torch multiplies it; columns and values are those held here."""
        return _compressed(self.row_Q, self.column_Q, self.value_Q, (self.rows, self.columns))

    @cached_property
    def transposed(self) -> Tensor:
        """[N, R] as torch multiplies it."""
        order_Q = self.column_Q.argsort(stable=True)
        entries = (self.column_Q, self.row_Q[order_Q], self.value_Q[order_Q])
        return _compressed(*entries, (self.columns, self.rows))

    def times(self, w_N: Tensor) -> Tensor:
        """x w [R]."""
        return self.csr @ w_N

    def back(self, z_R: Tensor) -> Tensor:
        """x^T z [N]."""
        return self.transposed @ z_R

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Means of the columns and of their squares [N]."""
        zero_N = torch.zeros(self.columns, dtype=torch.float64)
        mean_N, square_N = (
            zero_N.index_add(0, self.column_Q, values_Q) / self.rows
            for values_Q in (self.value_Q, self.value_Q.square())
        )
        return mean_N, square_N

    def column(self, number: int) -> Tensor:
        """One column, dense [R]."""
        out = torch.zeros(self.rows, dtype=torch.float64)
        mine = self.column_Q == number
        out[self.row_Q[mine]] = self.value_Q[mine]
        return out


@dataclass(frozen=True, eq=False)
class Dense:
    """A matrix [R, N] as it is."""

    x_RN: Tensor

    @property
    def rows(self) -> int:
        return len(self.x_RN)

    @property
    def columns(self) -> int:
        return self.x_RN.shape[1]

    def times(self, w_N: Tensor) -> Tensor:
        """x w [R]."""
        return self.x_RN @ w_N

    def back(self, z_R: Tensor) -> Tensor:
        """x^T z [N]."""
        return z_R @ self.x_RN

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Means of the columns and of their squares [N]."""
        return self.x_RN.mean(0), torch.linalg.vector_norm(self.x_RN, dim=0).square() / self.rows


def _compressed(row_Q: Tensor, column_Q: Tensor, value_Q: Tensor, shape: tuple[int, int]) -> Tensor:
    """Of entries by ascending row, of whose numbers only how often each occurs is looked at."""
    begin = torch.zeros(shape[0] + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(row_Q, minlength=shape[0]), 0, out=begin[1:])
    with warnings.catch_warnings():  # that compressed rows are a young feature of torch
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(begin, column_Q, value_Q, shape)


def promising(x: Sparse, y_R: Tensor, l2: float, number: int) -> Tensor:
    """The features, ascending, whose regression alone promises most by its first Newton step: the score test (Rao 1948)."""
    y_R = y_R.double()
    rate = y_R.mean()
    mean_N, square_N = x.moments
    slope_N = torch.zeros_like(mean_N).index_add_(0, x.column_Q, x.value_Q * (y_R - rate)[x.row_Q])
    curvature_N = rate * (1 - rate) * x.rows * (square_N - mean_N.square()) + l2
    order_N = (slope_N.square() / curvature_N).argsort(descending=True, stable=True)
    return order_N[:number].sort().values


def fit_each(x: Sparse, y_R: Tensor, l2: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, intercept and penalised loss [N] of the regression on each feature alone.

    Newton's method with halved steps, for all features together; rows where a feature is zero enter by their number alone. A
    feature is done with the step that promises less than the tolerance: beyond it, rounding decides which loss is smaller.
    """
    y_R = y_R.double()
    positives, rows = float(y_R.sum()), float(x.rows)
    assert 0 < positives < rows
    column_Q, value_Q, y_Q = x.column_Q, x.value_Q, y_R[x.row_Q]

    def per_feature(values_Q: Tensor) -> Tensor:
        return torch.zeros(x.columns, dtype=torch.float64).index_add_(0, column_Q, values_Q)

    zero_N = rows - per_feature(torch.ones_like(value_Q))
    zero_y_N = positives - per_feature(y_Q)

    def loss(w_N: Tensor, b_N: Tensor) -> Tensor:
        z_Q = w_N[column_Q] * value_Q + b_N[column_Q]
        return per_feature(softplus(z_Q) - y_Q * z_Q) + zero_N * softplus(b_N) - zero_y_N * b_N + l2 / 2 * w_N.square()

    w_N = torch.zeros(x.columns, dtype=torch.float64)
    b_N = torch.full_like(w_N, math.log(positives / (rows - positives)))
    value_N = loss(w_N, b_N)
    open_N = torch.ones_like(w_N, dtype=torch.bool)
    for _ in range(_STEPS):
        p_Q = torch.sigmoid(w_N[column_Q] * value_Q + b_N[column_Q])
        p_N = torch.sigmoid(b_N)
        weight_Q, spread_N = p_Q * (1 - p_Q), p_N * (1 - p_N)
        gw_N = per_feature((p_Q - y_Q) * value_Q) + l2 * w_N
        gb_N = per_feature(p_Q - y_Q) + zero_N * p_N - zero_y_N
        hww_N = per_feature(weight_Q * value_Q.square()) + l2
        hwb_N = per_feature(weight_Q * value_Q)
        hbb_N = per_feature(weight_Q) + zero_N * spread_N
        determinant_N = hww_N * hbb_N - hwb_N.square()
        dw_N = (hbb_N * gw_N - hwb_N * gb_N) / determinant_N
        db_N = (hww_N * gb_N - hwb_N * gw_N) / determinant_N
        far_N = open_N & (gw_N * dw_N + gb_N * db_N > 2 * _TOLERANCE * rows)
        step_N = open_N.double()
        for _ in range(_HALVINGS):
            new_N = loss(w_N - step_N * dw_N, b_N - step_N * db_N)
            worse_N = far_N & ~(new_N <= value_N)
            if not bool(worse_N.any()):
                break
            step_N = torch.where(worse_N, step_N / 2, step_N)
        step_N = torch.where(worse_N, 0.0, step_N)
        w_N = torch.where(open_N, w_N - step_N * dw_N, w_N)
        b_N = torch.where(open_N, b_N - step_N * db_N, b_N)
        value_N = torch.where(open_N & ~worse_N, new_N, value_N)
        open_N = far_N & ~worse_N
        if not bool(open_N.any()):
            break
        keep_Q = open_N[column_Q]
        column_Q, value_Q, y_Q = column_Q[keep_Q], value_Q[keep_Q], y_Q[keep_Q]
    return w_N, b_N, value_N


def fit_all(x: Sparse | Dense, y_R: Tensor, l2: float) -> tuple[Tensor, float]:
    """Weights [N] and intercept of the regression on all features, by L-BFGS (Liu and Nocedal 1989).

    Features are centred, and each weight is in the unit of its curvature at the start: else frequent features, which move all
    rows alike, take many more steps than rare ones. The minimum is the same.
    """
    y_R = y_R.double()
    rate = float(y_R.mean())
    spread = rate * (1 - rate)
    mean_N, square_N = x.moments
    curvature_N = spread * x.rows * (square_N - mean_N.square()) + l2
    unit = torch.cat([curvature_N, torch.tensor([spread * x.rows])]).rsqrt()
    theta = torch.zeros(x.columns + 1, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        theta[-1] = math.log(rate / (1 - rate)) / unit[-1]
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=500,
        tolerance_grad=1e-5,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> Tensor:
        scaled = theta * unit
        w_N, b = scaled[:-1], scaled[-1]
        z_R = x.times(w_N) + (b - mean_N @ w_N)
        residual_R = torch.sigmoid(z_R) - y_R
        total = residual_R.sum()
        theta.grad = torch.cat([x.back(residual_R) - total * mean_N + l2 * w_N, total[None]]) * unit
        return (softplus(z_R) - y_R * z_R).sum() + l2 / 2 * w_N.square().sum()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    found = theta.detach() * unit
    return found[:-1], float(found[-1] - mean_N @ found[:-1])


def ranking(score_R: Tensor, y_R: Tensor) -> tuple[float, float]:
    """Area under the ROC curve (ties count half) and average precision of scores for labels of both kinds."""
    _, place_R = torch.unique(score_R, return_inverse=True)
    count = int(place_R.max()) + 1
    positive, negative = (torch.bincount(place_R[side_R], minlength=count) for side_R in (y_R, ~y_R))
    return float(auroc(positive, negative)), float(auprc(positive, negative))


def log_loss(z_R: Tensor, y_R: Tensor) -> float:
    """Mean cross-entropy, nats a row, of logits."""
    return float((softplus(z_R) - y_R.double() * z_R).mean())
