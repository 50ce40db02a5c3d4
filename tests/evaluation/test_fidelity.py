"""Loss recovered: dictionaries whose score is known, sums done by hand, masks that never change."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plmsae_cli.evaluation.fidelity import loss_recovered, recovered
from plmsae_cli.plm.alphabet import AMINO_ACIDS, MASK, encode, pack
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.runtime.masked_scores import masks
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.interface import Latents, Losses

D = 32
LAYERS = 3
PINNED = [0, 6, 11, 20, 21, 32, 34, 41, 52, 58, 65]
"""Residues of ubiquitin (from 0) that are masked at 15 %."""


class Stub(Dictionary):
    """Reconstructs by any function of the rows."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__(D, 1)
        self.answer = answer

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.answer(x_BD)

    def encode(self, x_BD: Tensor) -> Latents:
        raise NotImplementedError

    def decode(self, latents: Latents) -> Tensor:
        raise NotImplementedError

    def loss(self, *arguments: Any) -> Losses:
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        raise NotImplementedError


@pytest.fixture(scope="module")
def plm() -> ESM2:
    """Random weights large enough that every layer matters to the logits."""
    model = ESM2(ESM2Config(LAYERS, D, 2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 1.5 / math.sqrt(D) if parameter.ndim == 2 else 1 + 0.2 * noise)
    return model.eval()


@pytest.fixture(scope="module")
def sequences() -> list[str]:
    rng = np.random.default_rng(1)
    lengths = [1, 2, 7, 30, 30, 44, 61, 90]
    return ["".join(rng.choice(list(AMINO_ACIDS), n)) for n in lengths]


MEAN_D = torch.linspace(-0.4, 0.6, D)


def score(plm: ESM2, sae: Dictionary, sequences: list[str], layer: int = 1, budget: int = 128) -> dict[str, Any]:
    def quiet(*arguments: Any, **named: Any) -> None:
        return

    return loss_recovered(plm, sae, layer, MEAN_D, sequences, 0.15, budget, quiet, quiet)


# Dictionaries whose score is known


@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_a_perfect_dictionary_recovers_all(plm: ESM2, sequences: list[str], layer: int) -> None:
    found = score(plm, Stub(lambda x: x), sequences, layer)
    assert found["spliced_identity"] == "exact"
    for side in ("masked", "unmasked"):
        assert found[side]["ce_sae"] == found[side]["ce"]
        assert found[side]["kl"] == 0.0
        for ablation in ("zero", "mean"):
            assert found[side][f"recovered_{ablation}"] == 1.0
            assert found[side][f"interval_recovered_{ablation}"] == [1.0, 1.0]
            assert found[side][f"ce_{ablation}"] != found[side]["ce"]


@pytest.mark.parametrize(("ablation", "answer"), [
    ("zero", torch.zeros_like), ("mean", lambda x_BD: MEAN_D.expand_as(x_BD)),
])  # fmt: skip
@pytest.mark.parametrize("layer", [0, 2, LAYERS])
def test_an_ablation_recovers_nothing_of_itself(
    plm: ESM2, sequences: list[str], ablation: str, answer: Callable[[Tensor], Tensor], layer: int
) -> None:
    found = score(plm, Stub(answer), sequences, layer)
    for side in ("masked", "unmasked"):
        assert found[side]["ce_sae"] == found[side][f"ce_{ablation}"]
        assert found[side][f"recovered_{ablation}"] == 0.0
        other = "mean" if ablation == "zero" else "zero"
        assert found[side][f"recovered_{other}"] != 0.0
        assert found[side]["kl"] > 0


def test_recovered_is_linear_in_the_loss() -> None:
    assert recovered(1.0, 1.25, 2.0) == 0.75
    assert recovered(1.0, 3.0, 2.0) == -1.0
    assert math.isnan(recovered(1.0, 1.0, 1.0))


# The same by hand: each protein alone, its later layers run block by block


def by_hand(
    plm: ESM2, sequence: str, layer: int, replace: Callable[[Tensor], Tensor] | None, masked: bool
) -> tuple[Tensor, Tensor]:
    """(log-probabilities of every residue [L, V], which are scored [L]), in float64 from the logits on."""
    packed = pack([encode(sequence)])
    chosen = torch.from_numpy(masks(sequence, 0.15)) if masked else torch.ones(len(sequence), dtype=torch.bool)
    tokens_T = packed.tokens_T.long()
    if masked:
        tokens_T[1:-1][chosen] = MASK
    with torch.inference_mode():
        x_TD = plm(tokens_T, packed.documents, layers=[layer]).hidden[layer].clone()
        if replace is not None:
            x_TD[1:-1] = replace(x_TD[1:-1])
        rope = plm.rotary(torch.arange(len(tokens_T)))
        for k in range(layer, LAYERS):
            x_TD = plm.layers[k](x_TD, rope, packed.documents)
            if k == LAYERS - 1:
                x_TD = plm.emb_layer_norm_after(x_TD)
        logits_TV = plm.lm_head(x_TD, plm.embed_tokens.weight)
    return logits_TV[1:-1].double().log_softmax(-1), chosen


def half(x_BD: Tensor) -> Tensor:
    return 0.5 * x_BD + 0.1


@pytest.mark.parametrize("layer", [0, 1, LAYERS])
@pytest.mark.parametrize("masked", [True, False])
def test_losses_are_those_of_each_protein_alone(plm: ESM2, sequences: list[str], layer: int, masked: bool) -> None:
    replace = {"ce": None, "ce_sae": half, "ce_zero": torch.zeros_like, "ce_mean": lambda x: MEAN_D.expand_as(x)}
    found = score(plm, Stub(half), sequences, layer)["masked" if masked else "unmasked"]
    sums = dict.fromkeys(replace, 0.0)
    kl = residues = 0.0
    for sequence in sequences:
        log_p = {}
        for name, function in replace.items():
            log_p[name], chosen = by_hand(plm, sequence, layer, function, masked)
            truth = torch.from_numpy(encode(sequence)).long()[chosen, None]
            sums[name] -= float(log_p[name][chosen].gather(1, truth).sum())
        original = log_p["ce"][chosen]
        kl += float((original.exp() * (original - log_p["ce_sae"][chosen])).sum())
        residues += int(chosen.sum())
    assert found["residues"] == residues
    for name, total in sums.items():
        assert found[name] == pytest.approx(total / residues, rel=2e-5)
    assert found["kl"] == pytest.approx(kl / residues, rel=1e-3)
    ce, ce_sae, ce_zero = (sums[name] / residues for name in ("ce", "ce_sae", "ce_zero"))
    assert found["recovered_zero"] == pytest.approx(1 - (ce_sae - ce) / (ce_zero - ce), rel=1e-2, abs=1e-3)


def test_only_residues_are_replaced(plm: ESM2, sequences: list[str]) -> None:
    """What the block above the splice gets: <cls> and <eos> as they were, residues as the variant says."""
    seen: list[Tensor] = []
    handle = plm.layers[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    try:
        score(plm, Stub(lambda x: torch.full_like(x, 7.0)), sequences, layer=1, budget=10_000)
    finally:
        handle.remove()
    packed = pack([encode(s) for s in sorted(sequences, key=lambda s: -len(s))])
    residues_T = packed.residue_mask_T
    for original, sae, zero, mean in (seen[0:4], seen[4:8]):
        for variant, expected_D in ((sae, torch.full((D,), 7.0)), (zero, torch.zeros(D)), (mean, MEAN_D)):
            assert torch.equal(variant[~residues_T], original[~residues_T])
            assert torch.equal(variant[residues_T], expected_D.expand(int(residues_T.sum()), D))
    assert not torch.equal(seen[0], seen[4]), "masked and unmasked inputs differ"


def test_neither_batches_nor_the_order_of_proteins_matter(plm: ESM2, sequences: list[str]) -> None:
    whole = score(plm, Stub(half), sequences, budget=100_000)
    for other in (
        score(plm, Stub(half), sequences, budget=1),
        score(plm, Stub(half), sequences, budget=95),
        score(plm, Stub(half), sequences[::-1]),
    ):
        for side in ("masked", "unmasked"):
            assert other[side]["residues"] == whole[side]["residues"]
            for name in ("ce", "ce_sae", "ce_zero", "ce_mean", "kl", "recovered_zero", "recovered_mean"):
                assert other[side][name] == pytest.approx(whole[side][name], rel=1e-4)
    same = score(plm, Stub(half), sequences, budget=1)["masked"]["interval_recovered_zero"]
    assert same == pytest.approx(whole["masked"]["interval_recovered_zero"], rel=1e-3)


def test_the_interval_holds_the_value_and_is_that_of_resampled_proteins(plm: ESM2, sequences: list[str]) -> None:
    found = score(plm, Stub(half), sequences)["unmasked"]
    for ablation in ("zero", "mean"):
        low, high = found[f"interval_recovered_{ablation}"]
        assert low < found[f"recovered_{ablation}"] < high
    # The same by another generator: ends of 1000 draws agree to a part of the interval's width.
    per_protein = [score(plm, Stub(half), [s])["unmasked"] for s in sequences]
    table = np.array([[p["residues"] * p[n] for n in ("ce", "ce_sae", "ce_zero")] for p in per_protein])
    drawn = table[np.random.default_rng(0).integers(len(sequences), size=(4000, len(sequences)))].sum(1)
    shares = 1 - (drawn[:, 1] - drawn[:, 0]) / (drawn[:, 2] - drawn[:, 0])
    ends = np.quantile(shares, [0.025, 0.975])
    assert found["interval_recovered_zero"] == pytest.approx(ends, abs=0.15 * (ends[1] - ends[0]))
    # One protein leaves nothing to resample.
    alone = per_protein[-1]
    assert alone["interval_recovered_zero"] == pytest.approx([alone["recovered_zero"]] * 2)


def test_an_ablation_without_effect_gives_no_share_and_valid_json(sequences: list[str]) -> None:
    """A model without embeddings: layer 0 is zero already, so that zeroing it costs nothing."""
    model = ESM2(ESM2Config(1, D, 2))
    model.init_weights(0)
    with torch.no_grad():
        model.embed_tokens.weight.zero_()
    found = score(model, Stub(half), sequences, layer=0)
    assert found["masked"]["ce_zero"] == found["masked"]["ce"]
    assert not {"recovered_zero", "interval_recovered_zero"} & found["masked"].keys()
    json.dumps(found, allow_nan=False)


# Masks


def test_masks_are_fixed_by_the_sequence_and_the_rate() -> None:
    sequence = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
    # Pinned: scores of other days and machines are compared with today's.
    assert np.flatnonzero(masks(sequence, 0.15)).tolist() == PINNED
    assert np.flatnonzero(masks(sequence[:-1], 0.15)).tolist() != PINNED
    assert (masks(sequence, 0.15) <= masks(sequence, 0.3)).all(), "a higher rate only adds"


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.6])
def test_masks_have_their_rate_everywhere(rate: float) -> None:
    rng = np.random.default_rng(0)
    flags = np.stack([masks("".join(rng.choice(list(AMINO_ACIDS), 100)), rate) for _ in range(500)])
    assert abs(flags.mean() - rate) < 4 * math.sqrt(rate * (1 - rate) / flags.size)
    assert np.abs(flags.mean(0) - rate).max() < 5 * math.sqrt(rate * (1 - rate) / 500)


@pytest.mark.parametrize("rate", [1e-9, 0.15, 1 - 2**-53])
def test_no_protein_is_without_a_masked_residue(rate: float) -> None:
    for length in (1, 2, 3, 50):
        chosen = masks("ACDEFGHIKL"[:length] * 5, rate)
        assert chosen.any()
    assert masks("M", rate).tolist() == [True]
