"""Probes against scikit-learn and scipy, and labels that a layer holds or does not hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plmsae_cli.evaluation.representations.probes import fit_ridge, fit_softmax, number_scores, probe


def made(rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64), generator


@pytest.mark.parametrize("l2", [1.0, 30.0])
def test_softmax_is_scikit_learns_logistic_regression(l2: float) -> None:
    from sklearn.linear_model import LogisticRegression

    x, generator = made(300, 8)
    y = (x[:, 0] + 0.7 * torch.randn(300, generator=generator, dtype=torch.float64)).div(0.8).round().clamp(
        -1, 1
    ).long() + 1
    theta = fit_softmax(x, y, 3, l2)
    peer = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=1000).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(theta[:-1].T.numpy(), peer.coef_, atol=2e-3)
    shares = torch.softmax(x @ theta[:-1] + theta[-1], 1).numpy()  # intercepts are free up to a constant
    np.testing.assert_allclose(shares, peer.predict_proba(x.numpy()), atol=2e-3)


def test_two_classes_have_weights_each() -> None:
    from sklearn.linear_model import LogisticRegression

    x, generator = made(300, 8)
    y = (x[:, 0] + torch.randn(300, generator=generator, dtype=torch.float64) > 0).long()
    theta = fit_softmax(x, y, 2, 30.0)
    peer = LogisticRegression(C=2 / 30.0, tol=1e-10, max_iter=1000).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose((theta[:, 1] - theta[:, 0]).numpy(), [*peer.coef_[0], *peer.intercept_], atol=1e-3)


@pytest.mark.parametrize("rows", [10, 200])
def test_ridge_is_scikit_learns(rows: int) -> None:
    from sklearn.linear_model import Ridge

    x, generator = made(rows, 20)
    y = x @ torch.randn(20, generator=generator, dtype=torch.float64) + 3
    found = fit_ridge(x, y, 5.0)
    peer = Ridge(alpha=5.0).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(found[:-1].numpy(), peer.coef_, atol=1e-9)
    assert found[-1].item() == pytest.approx(peer.intercept_, abs=1e-9)


def test_spearman_and_r2_are_those_of_scipy_and_scikit_learn() -> None:
    from scipy.stats import spearmanr
    from sklearn.metrics import r2_score

    x, _ = made(80, 2)
    x = (x * 2).round()  # with equals
    found = number_scores(x[:, 0], x[:, 1])
    assert found["spearman"] == pytest.approx(spearmanr(x[:, 0].numpy(), x[:, 1].numpy()).statistic, abs=1e-12)
    assert found["r2"] == pytest.approx(r2_score(x[:, 1].numpy(), x[:, 0].numpy()), abs=1e-12)
    assert number_scores(torch.ones(5, dtype=torch.float64), x[:5, 1])["spearman"] == 0.0


@pytest.mark.parametrize("classes", [2, None])
def test_planted_labels_are_found_and_random_ones_are_not(classes: int | None) -> None:
    x, generator = made(600, 10, 4)
    x[:, 9] = 1e-20 * x[:, 9] + 5.0  # constant but for rounding
    noise = torch.randn(600, generator=generator, dtype=torch.float64)
    splits = {"train": slice(0, 300), "valid": slice(300, 450), "test": slice(450, 600)}
    for target, low, high in ((x[:, 3], 0.9, 1.0), (noise, -0.25, 0.25)):
        y = target if classes is None else (target > 0).long()
        _, test = probe(
            {s: x[p] for s, p in splits.items()}, {s: y[p] for s, p in splits.items()}, classes, [1.0, 100.0]
        )
        assert low <= test["spearman" if classes is None else "mcc"] <= high


@pytest.mark.parametrize("classes", [3, None])
def test_the_penalty_is_the_best_on_valid_and_its_scores_are_scikit_learns(classes: int | None) -> None:
    from scipy.stats import spearmanr
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.metrics import matthews_corrcoef

    x, generator = made(180, 40, 34)  # no prediction here is a near tie
    x = 3.0 * x + 1.0
    target = x[:, 0] + 4.0 * torch.randn(180, generator=generator, dtype=torch.float64)
    y = target if classes is None else torch.bucketize(target, torch.tensor([-2.0, 4.0], dtype=torch.float64))
    splits = {"train": slice(0, 60), "valid": slice(60, 120), "test": slice(120, 180)}
    found = probe(
        {s: x[p] for s, p in splits.items()}, {s: y[p] for s, p in splits.items()}, classes, [1.0, 30.0, 1000.0]
    )

    z = (x - x[:60].mean(0)) / x[:60].std(0, correction=0)
    choices = []
    for l2 in (1000.0, 30.0, 1.0):
        peer = Ridge(alpha=l2) if classes is None else LogisticRegression(C=1 / l2, tol=1e-10, max_iter=2000)
        peer.fit(z[:60].numpy(), y[:60].numpy())
        pairs = [(peer.predict(z[splits[s]].numpy()), y[splits[s]].numpy()) for s in ("valid", "test")]
        choices.append([spearmanr(*p)[0] if classes is None else matthews_corrcoef(*p) for p in pairs])
    best = max(choices, key=lambda pair: pair[0])
    assert best != choices[0]
    assert [scores["spearman" if classes is None else "mcc"] for scores in found] == pytest.approx(best, abs=1e-9)
