"""What is asked of a language model: schedules, shares, weights, places; and diffusion's loss against its closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.config.plm import PLM
from plmsae_cli.plm.alphabet import MASK, Packed, pack
from plmsae_cli.training.masking import IGNORED, LEAST_SHARE, Question, chosen_places, masked, question, shares

LETTERS = {4: 0.5, 5: 0.3, 6: 0.2}
"""A toy language: three letters, drawn by themselves."""


def plm(**options: Any) -> PLM:
    return PLM.model_validate({"fasta": "x", "corruption": "mask", **options})


def diffusion(**options: Any) -> PLM:
    return plm(objective="masked_diffusion", **options)


@pytest.fixture(scope="module")
def many() -> Packed:
    """Two thousand documents of a hundred residues, and padding."""
    rng = np.random.default_rng(0)
    documents = rng.choice(list(LETTERS), (2000, 100), p=list(LETTERS.values())).astype(np.uint8)
    return pack(list(documents), num_tokens=210_000, max_len=128)


def test_the_mask_rate_ramp_reaches_the_data(many: Packed) -> None:
    ramp = plm(starting_mask_rate=0.05, mask_rate=0.45, mask_rate_steps=100)
    residues = int(many.residue_mask_T.sum())
    for step, rate in ((0, 0.05), (50, 0.25), (100, 0.45), (900, 0.45)):
        asked = question(ramp, step)
        assert asked == (pytest.approx(rate), 0.0)
        found = masked(many, ramp, asked, 0, step)
        assert abs(found.chosen - residues * rate) < 5 * math.sqrt(residues * rate * (1 - rate))


def test_the_warm_up_goes_from_mlm_to_diffusion(many: Packed) -> None:
    warm = diffusion(mask_rate=0.2, diffusion_warmup_steps=100)
    for step, share in ((0, 0.0), (30, 0.3), (100, 1.0), (500, 1.0)):
        asked = question(warm, step)
        assert asked == (0.2, share)
        own = shares(many, asked, 7, step)[:2000] != torch.tensor(0.2)
        assert abs(int(own.sum()) - 2000 * share) <= 5 * math.sqrt(2000 * share * (1 - share))


def test_masked_diffusion_alone_masks_by_the_document_and_not_everything(many: Packed) -> None:
    found = masked(many, diffusion(), question(diffusion(), 0), 3, 1)
    masked_SL = (found.inputs_T == MASK).view(-1)[: 2000 * 102].view(2000, 102)[:, 1:-1].float()
    share_S = masked_SL.mean(1)
    own_S = shares(many, Question(0.15, 1.0), 3, 1)[:2000]
    assert own_S.min() >= LEAST_SHARE
    assert own_S.max() <= 1.0
    quantiles = torch.linspace(0.1, 0.9, 9)
    torch.testing.assert_close(own_S.quantile(quantiles), quantiles, rtol=0, atol=0.04)  # uniform
    assert (share_S - own_S).abs().mean() < 0.05, "a document's residues are masked at its own share"
    # Every prediction weighs 1 / t of its document, once; places that fill up nothing.
    document_M = found.places_M[: found.chosen] // 102
    torch.testing.assert_close(found.weights_M[: found.chosen], 1 / own_S[document_M])
    assert not found.weights_M[found.chosen :].any()


def test_the_diffusion_loss_of_a_unigram_model_is_the_unigram_entropy(many: Packed) -> None:
    """E[sum over masked of CE / t] = E[sum over all of CE]: for a model that knows frequencies alone, H a residue."""
    entropy = -sum(p * math.log(p) for p in LETTERS.values())
    total = residues = 0.0
    for number in range(20):
        found = masked(many, diffusion(), Question(0.15, 1.0), 0, number)
        ce_M = -torch.tensor([LETTERS.get(t, 1.0) for t in range(33)]).log()[found.targets_M]
        total += float((ce_M.double() * found.weights_M).sum())
        residues += found.residues
    # Deviation of the estimate: a document of 100 residues with share t has variance 100 H2 (1 - t) / t.
    assert total / residues == pytest.approx(entropy, rel=0.01)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(0, 2**31), st.floats(0.01, 0.99))
def test_places_are_the_targets_in_order_and_others_once(lengths: list[int], seed: int, rate: float) -> None:
    packed = pack([np.full(n, 4, dtype=np.uint8) for n in lengths], num_tokens=sum(lengths) + 2 * len(lengths) + 11)
    found = masked(packed, plm(), Question(rate, 0.0), seed)
    targets_T = (found.inputs_T == MASK).nonzero()[:, 0]
    assert torch.equal(found.places_M[: found.chosen], targets_T)
    assert len(found.places_M.unique()) == len(found.places_M) <= packed.tokens_T.shape[0]
    assert torch.equal(found.targets_M, packed.tokens_T.long()[found.places_M])
    assert torch.equal(found.weights_M, (torch.arange(len(found.places_M)) < found.chosen).float())
    assert found.residues == sum(lengths)


def test_all_residues_may_be_chosen_and_none(many: Packed) -> None:
    tokens_T = many.tokens_T.long()
    whole = chosen_places(many, tokens_T, tokens_T, torch.ones(len(tokens_T)))
    assert whole.chosen == len(whole.places_M) == len(tokens_T)
    none = chosen_places(many, tokens_T, torch.full_like(tokens_T, IGNORED), torch.ones(len(tokens_T)))
    assert none.chosen == 0
    assert not none.weights_M.any()
    assert len(none.places_M) > 0


def test_few_sizes_of_the_list_of_places(many: Packed) -> None:
    sizes = {len(masked(many, plm(), Question(0.15, 0.0), 0, n).places_M) for n in range(20)}
    assert len(sizes) == 1, "a compiled head sees one shape"
    everywhere = {len(masked(many, diffusion(), Question(0.15, 1.0), 0, n).places_M) for n in range(20)}
    assert len(everywhere) <= 3
