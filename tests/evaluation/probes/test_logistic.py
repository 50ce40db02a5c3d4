"""Regressions against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plmsae_cli.evaluation.probes import logistic
from plmsae_cli.evaluation.probes.logistic import Dense, Sparse, fit_all, fit_each, log_loss, promising, ranking

linear_model = pytest.importorskip("sklearn.linear_model")
metrics = pytest.importorskip("sklearn.metrics")


def example(rows: int, columns: int) -> tuple[Sparse, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    dense = torch.where(torch.rand(rows, columns, generator=generator) < 0.2, dense, 0.0)
    dense[:, 1] = 0.0  # a dead latent
    y = torch.rand(rows, generator=generator) < torch.sigmoid(6 * dense[:, 0] - 3 * dense[:, 2] - 1)
    dense[:, 3] = torch.where(y, 0.9, 0.0)  # a perfect one
    row, column = dense.nonzero(as_tuple=True)
    return Sparse(row, column, dense[row, column], rows, columns), dense, y


@pytest.mark.parametrize("l2", [0.1, 1.0, 10.0])
def test_each_latent_alone(l2: float) -> None:
    x, dense, y = example(400, 8)
    w, b, loss = fit_each(x, y, l2)
    for n in range(8):
        wanted = linear_model.LogisticRegression(C=1 / l2, tol=1e-10, max_iter=1000).fit(dense[:, n : n + 1], y)
        assert float(w[n]) == pytest.approx(float(wanted.coef_[0, 0]), abs=1e-4)
        assert float(b[n]) == pytest.approx(float(wanted.intercept_[0]), abs=1e-4)
        z = w[n] * dense[:, n] + b[n]
        assert float(loss[n]) == pytest.approx(400 * log_loss(z, y) + l2 / 2 * float(w[n]) ** 2, rel=1e-9)
    assert (float(w[1]), int(loss.argmin())) == (0.0, 3)


def test_a_few_promising_features_hold_the_best_one() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        dense = torch.rand(300, 60, generator=generator, dtype=torch.float64)
        dense = torch.where(
            torch.rand(300, 60, generator=generator) < 0.1 + torch.rand(60, generator=generator), dense, 0.0
        )
        y = torch.rand(300, generator=generator) < torch.sigmoid(3 * dense[:, seed] - 3)
        row, column = dense.nonzero(as_tuple=True)
        x = Sparse(row, column, dense[row, column], 300, 60)
        chosen = promising(x, y, 1.0, 6)
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        some = x.only(chosen)
        assert torch.equal(some.csr.to_dense(), dense[:, chosen])
        wanted = fit_each(x, y, 1.0)
        assert int(chosen[fit_each(some, y, 1.0)[2].argmin()]) == int(wanted[2].argmin())


def test_all_latents_together() -> None:
    x, dense, y = example(400, 8)
    w, b = fit_all(x, y, 0.5)
    wanted = linear_model.LogisticRegression(C=2.0, tol=1e-10, max_iter=1000).fit(dense, y)
    assert w.tolist() == pytest.approx(wanted.coef_[0].tolist(), abs=1e-4)
    assert b == pytest.approx(float(wanted.intercept_[0]), abs=1e-4)
    assert torch.equal(fit_all(x, y, 0.5)[0], w)
    same, intercept = fit_all(Dense(dense), y, 0.5)
    assert same.tolist() == pytest.approx(w.tolist(), abs=1e-6)
    assert intercept == pytest.approx(b, abs=1e-6)


def test_rounding_and_frequent_features_cost_no_further_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    frequent = torch.rand(600, 200, generator=generator) < torch.rand(200, generator=generator)
    dense = torch.where(frequent, torch.rand(600, 200, generator=generator, dtype=torch.float64), 0.0)
    y = torch.rand(600, generator=generator) < torch.sigmoid(3 * dense[:, 7] - 2)
    row, column = dense.nonzero(as_tuple=True)
    x = Sparse(row, column, dense[row, column], 600, 200)
    calls: list[int] = []

    def counted(z: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return torch.nn.functional.softplus(z)

    monkeypatch.setattr(logistic, "softplus", counted)
    fit_each(x, y, 1.0)
    assert len(calls) < 30, "two a loss"  # Newton's method takes five steps
    calls.clear()
    w, b = fit_all(x, y, 1.0)
    assert len(calls) < 50
    wanted = linear_model.LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(dense, y)
    assert w.tolist() == pytest.approx(wanted.coef_[0].tolist(), abs=2e-5)
    assert b == pytest.approx(float(wanted.intercept_[0]), abs=2e-5)


def test_ranking_with_ties() -> None:
    rng = np.random.default_rng(0)
    score = torch.from_numpy(rng.integers(0, 20, 500).astype(float))
    y = torch.from_numpy(rng.random(500) < 0.3)
    area, average = ranking(score, y)
    assert area == pytest.approx(metrics.roc_auc_score(y, score))
    assert average == pytest.approx(metrics.average_precision_score(y, score))


def test_rows_are_numbered_anew_and_columns_are_dense() -> None:
    x, dense, _ = example(50, 6)
    keep = torch.arange(50) % 3 == 0
    some = x.some(keep)
    assert torch.equal(some.csr.to_dense(), dense[keep])
    assert torch.equal(some.column(2), dense[keep, 2])
