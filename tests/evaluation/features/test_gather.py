"""The second pass against loops over pairs."""

from __future__ import annotations

import pytest
import torch

from plmsae_cli.evaluation.features import gather
from plmsae_cli.evaluation.features.gather import fires_along, fires_beside
from plmsae_cli.evaluation.features.reading import About, Active, active_pairs

LATENTS, START = 40, 100


def batch(rows: int = 60, k: int = 6) -> tuple[Active, About]:
    """Rows of proteins 7 to 9, a fifth of the slots silent."""
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(LATENTS, generator=generator)[:k] for _ in range(rows)])
    acts = torch.rand(rows, k, generator=generator) * (torch.rand(rows, k, generator=generator) < 0.8)
    protein_B = 7 + torch.arange(rows) // 25
    unused = torch.zeros(rows, dtype=torch.int64)
    return Active(START, rows, *active_pairs(acts, index)), About(protein_B, torch.arange(rows), unused, unused, unused)


@pytest.mark.parametrize("slots", [1 << 26, 16, 1])
def test_activations_along_are_those_of_the_pairs(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where pairs share the slots of the table; other proteins' pairs are not looked for here."""
    monkeypatch.setattr(gather, "_SLOTS", slots)
    active, about = batch()
    wanted = {
        (protein, latent) for protein in range(5, 12) for latent in range(LATENTS) if (3 * protein + latent) % 4 == 0
    }
    pair_X = torch.tensor(sorted(protein * LATENTS + latent for protein, latent in wanted))
    found = [
        (latent, about.protein_B[which].item(), about.position_B[which].item(), act)
        for which, latent, act in zip(
            active.which_P.tolist(), active.latent_P.tolist(), active.act_P.tolist(), strict=True
        )
        if (about.protein_B[which].item(), latent) in wanted
    ]
    assert found
    columns = [column.tolist() for column in fires_along(active, about, pair_X, LATENTS)]
    assert list(zip(*columns, strict=True)) == found
    assert all(len(column) == 0 for column in fires_along(active, about, pair_X[:0], LATENTS))


def test_what_fires_beside_is_all_else_on_the_row() -> None:
    active, _ = batch()
    by_row: dict[int, list[int]] = {}
    for which, latent in zip(active.which_P.tolist(), active.latent_P.tolist(), strict=True):
        by_row.setdefault(which, []).append(latent)
    samples = sorted((START + which, latents[i]) for which, latents in by_row.items() for i in (0, -1))
    samples = [(START - 1, 3), *samples, (START + 60, 3)]
    row_S, latent_S = (torch.tensor(column) for column in zip(*samples, strict=True))
    mine, others = fires_beside(active, row_S, latent_S)
    wanted = [
        (latent, other) for row, latent in samples[1:-1] for other in by_row[row - START] if other != latent
    ]  # fmt: skip
    assert list(zip(mine.tolist(), others.tolist(), strict=True)) == wanted
