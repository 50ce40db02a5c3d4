"""Masked prediction: masks that never change, scikit-learn's figures, the same numbers however the work is shared."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.evaluation.language import score
from plmsae_cli.plm.alphabet import AMINO_ACIDS, MASK, encode, letters, pack
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.runtime.dist import gang
from plmsae_cli.runtime.masked_scores import MaskedScores, figures, mask, masks, masks_of_pack
from plmsae_cli.runtime.processes import free_port

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"


def random_proteins(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [encode("".join(rng.choice(list(AMINO_ACIDS), rng.integers(1, 80)))) for _ in range(count)]


def small_model() -> ESM2:
    model = ESM2(ESM2Config(2, 32, 2))
    model.init_weights(3)
    return model.eval()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(4, 7), st.integers(3, 8)), min_size=1, max_size=60))
def test_figures_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import accuracy_score, matthews_corrcoef, precision_recall_fscore_support

    true, predicted = ([pair[side] for pair in pairs] for side in (0, 1))
    confusion = np.zeros((33, 33))
    np.add.at(confusion, (true, predicted), 1)
    found = figures(confusion, 2.5 * len(pairs))
    with warnings.catch_warnings():  # a side of one class: scikit-learn warns, and answers
        warnings.simplefilter("ignore")
        wanted = precision_recall_fscore_support(true, predicted, average="weighted", zero_division=0)
        mcc = matthews_corrcoef(true, predicted)
    assert [found[name] for name in ("precision", "recall", "f1")] == pytest.approx(wanted[:3], abs=1e-12)
    assert found["mcc"] == pytest.approx(mcc, abs=1e-12)
    assert found["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    assert (found["loss"], found["residues"]) == (pytest.approx(2.5), len(pairs))
    assert found["perplexity"] == pytest.approx(math.exp(2.5))


def test_masks_are_those_of_the_sequence_whatever_stands_beside_it() -> None:
    proteins = [encode(UBIQUITIN), encode("MKV"), encode(UBIQUITIN[:40])]
    first = masks_of_pack(pack(proteins), 0.15)
    other = masks_of_pack(pack(proteins[::-1], num_tokens=200, num_documents=9, max_len=90), 0.15)
    assert first[1:77].tolist() == masks(UBIQUITIN, 0.15).tolist()
    assert first[1:77].tolist() == other[42 + 5 + 1 : 42 + 5 + 77].tolist()
    assert first[79:82].tolist() == other[43:46].tolist()
    assert not other[42 + 5 + 78 :].any()
    # Masks are pinned: figures of different versions are compared.
    assert np.flatnonzero(masks(UBIQUITIN, 0.15)).tolist() == [0, 6, 11, 20, 21, 32, 34, 41, 52, 58, 65]
    shares = [masks_of_pack(pack(random_proteins(300)), rate).sum().item() for rate in (0.15, 0.5)]
    total = sum(map(len, random_proteins(300)))
    # Binomial, four deviations; the least of one residue a protein adds some to the first.
    assert [abs(share / total - rate) for share, rate in zip(shares, (0.15, 0.5), strict=True)] < [0.03, 0.02]


def test_a_loss_by_hand() -> None:
    protein = encode(UBIQUITIN)
    packed = pack([protein])
    model = small_model()
    found = score(model, [protein], 0.15, 1000, torch.float32).figures()
    tokens_T = packed.tokens_T.long()
    chosen = [1 + i for i in np.flatnonzero(masks(UBIQUITIN, 0.15))]
    with torch.inference_mode():
        hidden_T = mask(tokens_T, masks_of_pack(packed, 0.15))
        assert (hidden_T == MASK).nonzero().flatten().tolist() == chosen
        logits = model(hidden_T, packed.documents, logits=True).logits
    losses = -torch.log_softmax(logits.double(), -1)[chosen, tokens_T[chosen]]
    assert found is not None
    assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert found["residues"] == len(chosen)


def test_parts_add_up_to_the_same_bits_and_batches_to_the_same_number() -> None:
    proteins, model = random_proteins(60), small_model()
    whole = score(model, proteins, 0.15, 300, torch.float32)
    for parts in (2, 4):
        pieces = [score(model, proteins, 0.15, 300, torch.float32, part, parts) for part in range(parts)]
        sums = MaskedScores(len(whole.loss_G), torch.device("cpu"))
        for piece in pieces:
            sums.counts += piece.counts
            sums.loss_G += piece.loss_G
        assert sums.figures() == whole.figures()
    other = score(model, proteins, 0.15, 2000, torch.float32)
    assert torch.equal(other.counts[:-1], whole.counts[:-1])
    a, b = other.figures(), whole.figures()
    assert a is not None
    assert b is not None
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    more = score(model, proteins, 0.4, 300, torch.float32).figures()
    assert more is not None
    assert more["residues"] == sum(int(masks(letters(protein), 0.4).sum()) for protein in proteins) > b["residues"]


def _rank_scores(rank: int, world: int, folder: str) -> None:
    import os

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=(Path(folder) / "port").read_text(), PLMSAE_GPUS="0", OMP_NUM_THREADS="1",
    )  # fmt: skip
    with gang() as ranks:
        found = score(small_model(), random_proteins(30), 0.15, 200, torch.float32, ranks.rank, ranks.world)
        (Path(folder) / f"{world}-{rank}").write_text(repr(found.figures(ranks.sum)))


@pytest.mark.slow
def test_every_rank_of_two_or_four_has_the_number_of_one(tmp_path: Path) -> None:
    import torch.multiprocessing as mp

    alone = repr(score(small_model(), random_proteins(30), 0.15, 200, torch.float32).figures())
    for world in (2, 4):
        (tmp_path / "port").write_text(str(free_port()))
        mp.spawn(_rank_scores, (world, str(tmp_path)), nprocs=world)
        assert [(tmp_path / f"{world}-{rank}").read_text() for rank in range(world)] == [alone] * world


def test_nothing_masked_is_no_number() -> None:
    assert MaskedScores(0, torch.device("cpu")).figures() is None
