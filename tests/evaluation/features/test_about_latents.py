"""What fires beside a latent, its parent, its nearest rows and what it does to letters, against plain counting and the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plmsae_cli.evaluation.features.about_latents import Together, letter_effects, nearest_rows
from plmsae_cli.evaluation.features.concept_counts import THRESHOLDS, fine_levels
from plmsae_cli.evaluation.features.gather import fires_beside
from plmsae_cli.evaluation.features.reading import Active, active_pairs
from plmsae_cli.plm.alphabet import AMINO_ACIDS, encode, pack
from plmsae_cli.plm.esm2 import ESM2, ESM2Config

LATENTS, PREFIXES = 12, (3, 7, 12)


def test_what_fires_beside_is_counted_at_the_sample_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    acts_RN = torch.rand(40, LATENTS, generator=generator) * (torch.rand(40, LATENTS, generator=generator) < 0.4)
    acts_RN[:, 5] = 0
    dense = acts_RN.numpy() > 0
    sample = [(row, latent) for latent in range(LATENTS) for row in np.flatnonzero(dense[:, latent])[:6]]
    row_S, latent_S = torch.tensor(sorted(sample)).T.contiguous()
    index = torch.arange(LATENTS).expand(40, -1)
    halves = [Active(a, 20, *active_pairs(acts_RN[a : a + 20], index[a : a + 20])) for a in (0, 20)]
    latent_X, other_X = (
        torch.cat(c).numpy() for c in zip(*(fires_beside(h, row_S, latent_S) for h in halves), strict=True)
    )
    firing_N = dense.sum(0)
    together = Together(latent_X, other_X, np.bincount(latent_S, minlength=LATENTS), firing_N)
    found, parents = together.most(0, LATENTS), together.parents(0, LATENTS, PREFIXES)
    assert together.most(4, 9) == found[4:9]
    assert together.parents(4, 9, PREFIXES) == parents[4:9]
    for latent in range(LATENTS):
        rows = [row for row, name in sample if name == latent]
        share = (
            {n: dense[rows, n].mean() for n in range(LATENTS) if n != latent and dense[rows, n].any()} if rows else {}
        )
        both = {n: min(s * firing_N[latent], firing_N[n]) for n, s in share.items()}
        jaccard = {n: b / (firing_N[latent] + firing_N[n] - b) for n, b in both.items()}
        order = sorted(jaccard, key=lambda n: (-jaccard[n], n))[:10]
        assert found[latent]["together"] == order
        assert found[latent]["together_shares"] == pytest.approx([share[n] for n in order])
        assert found[latent]["together_jaccard"] == pytest.approx([jaccard[n] for n in order])
        group = sum(latent >= end for end in PREFIXES)
        above = {n: s for n, s in share.items() if sum(n >= end for end in PREFIXES) < group}
        parent = min(above, key=lambda n: (-above[n], n)) if above else None
        assert parents[latent]["parent"] == parent
        assert parents[latent]["parent_share"] == (None if parent is None else pytest.approx(above[parent]))
    assert found[5]["together"] == []


def test_nearest_rows_are_those_of_all_cosines() -> None:
    rows = torch.nn.functional.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    near, cosine = nearest_rows(rows, 10, 20)
    every = rows @ rows.T
    every.fill_diagonal_(-2)
    expected = every[10:20].sort(dim=1, descending=True)
    assert torch.equal(near, expected.indices[:, :10])
    torch.testing.assert_close(cosine, expected.values[:, :10].clamp(min=0))


def test_at_the_last_layer_the_logits_are_those_of_a_splice() -> None:
    config = ESM2Config(num_layers=2, d=16, num_heads=2)
    model = ESM2(config)
    model.init_weights(3)
    model.eval()
    mean, added = torch.randn(2, 16, generator=torch.Generator().manual_seed(2)).unbind(0)
    packed = pack([encode("ACDEF")])

    def letters(value: torch.Tensor) -> torch.Tensor:
        splice = {2: lambda x: value.expand_as(x)}
        logits = model(packed.tokens_T, packed.documents, logits=True, splice=splice).logits[1]
        return logits[4 : 4 + len(AMINO_ACIDS)].log_softmax(0)

    with torch.inference_mode():
        effect, alone = letter_effects(model, 2, mean, added[None])
        torch.testing.assert_close(effect[0], letters(mean + added) - letters(mean))
        torch.testing.assert_close(alone[0], letters(added) - letters(added).mean())
        direct, _ = letter_effects(model, 1, mean, added[None])
        normed = [model.emb_layer_norm_after(x) for x in (mean + added, mean)]
        torch.testing.assert_close(direct[0], letters(normed[0]) - letters(normed[1]))


def test_fine_levels_count_thresholds_as_the_concept_test_does() -> None:
    generator = torch.Generator().manual_seed(0)
    maximum = torch.rand(400, generator=generator) * 7
    acts = torch.cat([torch.rand(200, generator=generator) * 8, torch.tensor(THRESHOLDS).repeat(2) * maximum[200:]])
    maximum[0] = 0
    expected = sum((acts > threshold * maximum).long() for threshold in THRESHOLDS)
    assert torch.equal(fine_levels(acts, maximum), expected)
