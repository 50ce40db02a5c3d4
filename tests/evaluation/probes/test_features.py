"""Features of probes: made by group and piece, read as one, cut in two."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from plmsae_cli.evaluation.probes import features
from plmsae_cli.evaluation.probes.features import Writer, by_protein, by_residue, read_sides
from plmsae_cli.evaluation.probes.fits import one_thread, probe
from plmsae_cli.evaluation.probes.logistic import Dense
from plmsae_cli.sae.interface import Latents
from plmsae_cli.store.fs import Store

linear_model = pytest.importorskip("sklearn.linear_model")
metrics = pytest.importorskip("sklearn.metrics")

LENGTHS = torch.tensor([3, 1, 7, 5, 4, 9, 2, 6] * 6)
LATENTS, WIDTH = 12, 5


def rows() -> tuple[torch.Tensor, Latents, torch.Tensor]:
    """Activations, latents (4 of a residue, some 0) and maxima, one of them 0."""
    generator = torch.Generator().manual_seed(0)
    count = int(LENGTHS.sum())
    x_RD = torch.randn(count, WIDTH, generator=generator) @ torch.diag(torch.tensor([1.0, 2.0, 10.0, 0.1, 0.0]))
    x_RD += 3
    index_RK = torch.rand(count, LATENTS, generator=generator).argsort(1)[:, :4]
    acts_RK = torch.randn(count, 4, generator=generator).clamp(min=0)
    maximum_N = torch.arange(LATENTS).float()
    return x_RD, Latents(acts_RK, index_RK), maximum_N


def test_pieces_in_any_order_are_the_rows_of_a_slow_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x_RD, latents, maximum_N = rows()
    store = Store()
    monkeypatch.setattr(features, "BLOCK_BYTES", 1000)
    begin_P = [0, *LENGTHS.cumsum(0).tolist()]
    groups = [list(range(first, min(first + 3, len(LENGTHS)))) for first in range(0, len(LENGTHS), 3)]
    paths: dict[str, list[str]] = {"residue": [], "protein": []}
    for index in (1, 0):
        writers = {kind: Writer(store, str(tmp_path), kind, f"{index}of2") for kind in paths}
        for places in groups[index::2]:
            mine = slice(begin_P[places[0]], begin_P[places[-1] + 1])
            residues = by_residue(Latents(latents.acts_BK[mine], latents.indices_BK[mine]), maximum_N, x_RD[mine])
            writers["residue"].add(mine.start, residues)
            writers["protein"].add(places[0], by_protein(residues, LENGTHS[places], LATENTS))
        for kind, writer in writers.items():
            writer.close()
            paths[kind] += [str(tmp_path / Path(file.name).name) for file in writer.files]
    assert len(paths["residue"]) > 4

    dense_RN = torch.zeros(len(x_RD), LATENTS).scatter_(1, latents.indices_BK, latents.acts_BK)
    dense_RN = (dense_RN / torch.where(maximum_N > 0, maximum_N, 1.0)).double()
    each = list(pairwise(begin_P))
    test_P = torch.arange(len(LENGTHS)) % 3 == 1
    owner_R = torch.arange(len(LENGTHS)).repeat_interleave(LENGTHS)
    wanted = {
        "residue": (dense_RN, x_RD.double(), owner_R),
        "protein": (
            torch.stack([dense_RN[a:b].amax(0) for a, b in each]),
            torch.stack([x_RD[a:b].double().mean(0) for a, b in each]),
            torch.arange(len(LENGTHS)),
        ),
    }
    for kind, (acts_RN, raw_RD, owner) in wanted.items():
        sides = read_sides(store, paths[kind], owner, test_P, LATENTS)
        test_R = test_P[owner]
        assert torch.equal(sides.test_R, test_R)
        for side, keep_R in ((sides.train, ~test_R), (sides.test, test_R)):
            assert torch.equal(side.latents.csr.to_dense(), acts_RN[keep_R])
            assert torch.equal(side.latents.dense(), acts_RN[keep_R])
            numbers = np.unique(owner[keep_R].numpy(), return_inverse=True)[1]
            assert side.protein_R.tolist() == numbers.tolist()
            # Axes keep distances between standardised rows; the dimension that never varies is left out.
            scaled_RD = raw_RD[keep_R][:, :4] / raw_RD[~test_R][:, :4].std(0, correction=0)
            assert torch.cdist(side.raw.x_RN, side.raw.x_RN).numpy() == pytest.approx(
                torch.cdist(scaled_RD, scaled_RD).numpy(), abs=1e-4
            )
        assert sides.train.raw.x_RN.mean(0).tolist() == pytest.approx([0.0] * WIDTH, abs=1e-9)
        if kind == "protein":
            continue
        y_R = (raw_RD[:, 2] + raw_RD[:, 0] > 7) & (torch.arange(len(owner)) % 4 > 0)
        with one_thread():
            row = probe(sides, y_R, 1.0, 20)
        scaled = (raw_RD - raw_RD[~test_R].mean(0))[:, :4] / raw_RD[~test_R][:, :4].std(0, correction=0)
        model = linear_model.LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(scaled[~test_R], y_R[~test_R])
        area = metrics.roc_auc_score(y_R[test_R], model.decision_function(scaled[test_R]))
        assert row["auroc_raw"] == pytest.approx(area, abs=1e-9)
        assert isinstance(sides.train.together, Dense)
        model.fit(acts_RN[~test_R], y_R[~test_R])
        area_of_latents = metrics.roc_auc_score(y_R[test_R], model.decision_function(acts_RN[test_R]))
        assert row["auroc_all"] == pytest.approx(area_of_latents, abs=1e-9)
        assert row["interval_auroc_raw"][0] <= area <= row["interval_auroc_raw"][1]


@pytest.mark.parametrize("active", [1, 4])
def test_nothing_of_the_rows_that_score_reaches_what_is_fitted(tmp_path: Path, active: int) -> None:
    x_RD, latents, maximum_N = rows()
    latents = Latents(latents.acts_BK[:, :active], latents.indices_BK[:, :active])
    owner_R = torch.arange(len(LENGTHS)).repeat_interleave(LENGTHS)
    test_P = torch.arange(len(LENGTHS)) % 3 == 1
    test_R = test_P[owner_R]
    y_R = (x_RD[:, 2] > 3) & (torch.arange(len(owner_R)) % 4 > 0)
    found = []
    for factor in (1.0, 7.0):
        mine_R = torch.where(test_R, factor, 1.0)[:, None]
        changed = Latents(latents.acts_BK * mine_R, (latents.indices_BK + test_R[:, None] * (factor > 1)) % LATENTS)
        writer = Writer(Store(), str(tmp_path), "residue", f"{factor:.0f}")
        writer.add(0, by_residue(changed, maximum_N, x_RD * mine_R))
        writer.close()
        sides = read_sides(Store(), [file.name for file in writer.files], owner_R, test_P, LATENTS)
        with one_thread():
            row = probe(sides, torch.where(test_R & (factor > 1), ~y_R, y_R), 1.0, 20)
        found.append((sides, row))
    (one, row), (other, changed_row) = found
    assert torch.equal(one.train.raw.x_RN, other.train.raw.x_RN)
    assert not torch.equal(one.test.raw.x_RN, other.test.raw.x_RN)
    assert isinstance(one.train.together, Dense) == isinstance(other.train.together, Dense) == (active > 1)
    assert [row[key] for key in ("latent", "weight")] == [changed_row[key] for key in ("latent", "weight")]
