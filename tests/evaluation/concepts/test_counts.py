"""The one pass counts what loops over latents, thresholds, concepts and instances count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.evaluation.concepts import counts as module
from plmsae_cli.evaluation.concepts import labelling
from plmsae_cli.evaluation.concepts.counts import THRESHOLDS, Counts
from plmsae_cli.evaluation.concepts.labelling import Labelled, totals
from plmsae_cli.evaluation.concepts.vocabulary import Concept, Labels
from plmsae_cli.sae.interface import Latents
from plmsae_cli.store.split import split_hash

Ranges = list[tuple[int, int, int, int, int]]
"""(protein, concept, start, stop, instance)"""


def labelled(sequences: list[str], concepts: list[Concept], ranges: Ranges, amino_acids: bool = False) -> Labelled:
    table = np.array(ranges, dtype=np.int64).reshape(-1, 5)
    labels = Labels(tuple(concepts), *(table[:, i].copy() for i in range(5)))
    hashes = np.array([split_hash(s) for s in sequences], dtype=np.uint64)
    return Labelled(labels, sequences, hashes, amino_acids)


def sparse(z_RN: torch.Tensor, width: int) -> Latents:
    """The `width` largest activations of each row."""
    acts_RK, indices_RK = z_RN.topk(width, dim=1)
    return Latents(acts_RK, indices_RK)


def slowly(z_RN: torch.Tensor, maximum_N: torch.Tensor, of: Labelled, concepts: list[Concept]) -> Counts:
    """Counts by loops over latents, thresholds, concepts and instances."""
    num_latents = z_RN.shape[1]
    rank = np.cumsum([not c.by_residue for c in concepts]) - 1
    out = Counts(num_latents, len(concepts), int(rank[-1]) + 1, "cpu")
    offsets = np.cumsum([0, *(len(s) for s in of.sequences)])
    for n in range(num_latents):
        for t, threshold in enumerate(THRESHOLDS):
            fires = [bool(z > threshold * maximum_N[n]) for z in z_RN[:, n]]
            out.fired_NT[n, t] = sum(fires)
            for c, concept in enumerate(concepts):
                marked, instances = set(), dict[int, set[int]]()
                for p, own, start, stop, instance in zip(
                    of.protein_M, of.concept_M, of.start_M, of.stop_M, of.instance_M, strict=True
                ):
                    if own == c:
                        rows = set(range(int(offsets[p] + start), int(offsets[p] + stop)))
                        marked |= rows
                        instances.setdefault(int(instance), set()).update(rows)
                out.hits_CNT[c, n, t] = sum(fires[r] for r in marked)
                if not concept.by_residue:
                    hit = [any(fires[r] for r in rows) for rows in instances.values()]
                    out.instances_CNT[rank[c], n, t] = sum(hit)
    return out


CONCEPTS = [Concept("Domain: A", "Domain", False), Concept("Site", "Site", True), Concept("Helix", "Helix", False)]


def same(found: Counts, wanted: Counts) -> None:
    assert torch.equal(found.hits_CNT, wanted.hits_CNT)
    assert torch.equal(found.instances_CNT, wanted.instances_CNT)
    assert torch.equal(found.fired_NT, wanted.fired_NT)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[str], Ranges, torch.Tensor, torch.Tensor]:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    ranges: Ranges = []
    for p, length in enumerate(lengths):
        for _ in range(draw(st.integers(0, 4))):
            start = draw(st.integers(0, length - 1))
            stop = draw(st.integers(start + 1, length))
            concept = draw(st.integers(0, 2))
            ranges.append((p, concept, start, stop, len(ranges)))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    z_RN = torch.rand(sum(lengths), 12, generator=generator)
    z_RN = torch.where(torch.rand(z_RN.shape, generator=generator) < 0.7, 0.0, z_RN)
    # Values exactly on thresholds: they must not count.
    z_RN = torch.where(z_RN > 0.8, torch.tensor(0.5), z_RN)
    maximum_N = torch.where(torch.rand(12, generator=generator) < 0.5, 1.0, 0.7)
    return ["ACDEFGHIK"[:length] for length in lengths], ranges, z_RN, maximum_N


@settings(deadline=None, max_examples=40)
@given(case=cases(), width=st.sampled_from([1, 12]), tile=st.sampled_from([12, 5]))
def test_counts_are_those_of_loops(
    case: tuple[list[str], Ranges, torch.Tensor, torch.Tensor], width: int, tile: int
) -> None:
    sequences, ranges, z_RN, maximum_N = case
    if width == 1:  # the sparse way; the other is dense
        z_RN = torch.where(z_RN == z_RN.amax(1, keepdim=True), z_RN, 0.0)
    of = labelled(sequences, CONCEPTS, ranges)
    latents = sparse(z_RN, width)
    dense_RN = torch.zeros_like(z_RN).scatter(1, latents.indices_BK, latents.acts_BK)
    wanted = slowly(dense_RN, maximum_N, of, CONCEPTS)
    for first in range(0, 12, tile):
        size = min(tile, 12 - first)
        found = Counts(size, 3, 2, "cpu", first)
        found.add(latents, maximum_N, of.batch(range(len(sequences)), "cpu"))
        found.at_least()
        assert torch.equal(found.hits_CNT, wanted.hits_CNT[:, first : first + size])
        assert torch.equal(found.instances_CNT, wanted.instances_CNT[:, first : first + size])
        assert torch.equal(found.fired_NT, wanted.fired_NT[first : first + size])


@pytest.mark.parametrize("width", [2, 24])
def test_counts_do_not_depend_on_batches_or_on_the_size_of_intermediates(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    sequences = ["MKV" * 5, "A", "GGHH" * 4, "LLKK" * 2]
    ranges = [(0, 0, 2, 9, 0), (0, 2, 4, 5, 1), (2, 0, 0, 16, 2), (2, 0, 3, 6, 3), (3, 1, 0, 1, 4), (3, 2, 1, 8, 5)]
    of = labelled(sequences, CONCEPTS, ranges)
    rows = sum(map(len, sequences))
    latents = sparse(torch.rand(rows, 24, generator=generator), width)
    maximum_N = torch.rand(24, generator=generator)
    whole = Counts(24, 3, 2, "cpu")
    whole.add(latents, maximum_N, of.batch([0, 1, 2, 3], "cpu"))
    monkeypatch.setattr(module, "CELLS", 30)
    parts = [Counts(24, 3, 2, "cpu") for _ in range(2)]
    first = 0
    for p, sequence in enumerate(sequences):
        one = type(latents)(*(tensor[first : first + len(sequence)] for tensor in latents))
        parts[p % 2].add(one, maximum_N, of.batch([p], "cpu"))
        first += len(sequence)
    whole.at_least()
    both = [part.at_least() for part in parts]
    assert torch.equal(whole.hits_CNT, both[0].hits_CNT + both[1].hits_CNT)
    assert torch.equal(whole.instances_CNT, both[0].instances_CNT + both[1].instances_CNT)
    assert torch.equal(whole.fired_NT, both[0].fired_NT + both[1].fired_NT)


def test_the_two_ends_of_a_bond_are_one_instance_and_two_residues() -> None:
    bond = [Concept("Disulfide bond", "Disulfide bond", True)]
    of = labelled(["MCKKC"], bond, [(0, 0, 1, 2, 0), (0, 0, 4, 5, 0)])
    residues_C, instances_C = totals(of, [0])
    assert (residues_C.tolist(), instances_C.tolist()) == ([2], [1])


@pytest.mark.parametrize("together", [1, 8, 1000])
def test_totals_are_the_same_however_many_proteins_are_counted_together(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labelling, "_TOGETHER", together)
    ranges = [(0, 0, 2, 4, 0), (1, 2, 0, 1, 1), (2, 0, 0, 6, 2), (2, 0, 3, 6, 3), (3, 1, 0, 1, 4)]
    of = labelled(["MKVM", "A", "GGHHGG", "LL"], CONCEPTS, ranges, amino_acids=True)
    residues_C, instances_C = totals(of, [0, 2, 3])
    assert residues_C[:3].tolist() == [2 + 6, 1, 0]
    assert instances_C[:3].tolist() == [3, 1, 0]
    assert residues_C[3:].sum() == 4 + 6 + 2


def test_amino_acids_are_read_from_the_sequence() -> None:
    of = labelled(["LAXL"], CONCEPTS, [], amino_acids=True)
    batch = of.batch([0], "cpu")
    assert list(zip(batch.row_E.tolist(), batch.concept_E.tolist(), strict=True)) == [(0, 3), (1, 4), (3, 3)]


def test_rotated_labels_keep_their_number_and_shape() -> None:
    of = labelled(["A" * 11, "G" * 7], CONCEPTS, [(0, 0, 8, 11, 0), (0, 2, 0, 2, 1), (1, 0, 1, 4, 2)])
    rows, concept, _ = of.pairs([0, 1], rotated=True)
    straight, same_concept, _ = of.pairs([0, 1], rotated=False)
    assert concept.tolist() == same_concept.tolist()
    for begin, end, length, offset in ((0, 5, 11, 0), (5, 8, 7, 11)):
        shifts = (rows[begin:end] - straight[begin:end]) % length
        assert len(set(shifts.tolist())) == 1
        assert shifts[0] != 0
        assert ((rows[begin:end] >= offset) & (rows[begin:end] < offset + length)).all()
    assert np.array_equal(of.pairs([1], rotated=True)[0] + 11, rows[5:])  # whatever the batch


def test_values_above_the_maximum_are_above_every_threshold_and_values_on_one_are_not() -> None:
    latents = Latents(torch.tensor([[3.0], [0.8], [0.5], [0.15], [0.0]]), torch.zeros(5, 1, dtype=torch.int64))
    assert module.levels(latents, torch.tensor([1.0])).flatten().tolist() == [5, 4, 2, 1, 0]
