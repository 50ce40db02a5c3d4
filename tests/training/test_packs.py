"""Packs: every document once an epoch, whole, in an order that is a function of (seed, epoch)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.plm.alphabet import CLS, EOS, FIRST_LETTER, PAD, Packed, wrap
from plmsae_cli.training.packs import SHORTEST, Packs

Tokens = npt.NDArray[np.uint8]
DIGITS = 3


def document(number: int, length: int) -> Tokens:
    """`length` residues of which the first say which document it is, in base 20."""
    digits = [number // 20**place % 20 for place in range(DIGITS)]
    rest = [(number * 7 + place) % 20 for place in range(length - DIGITS)]
    return wrap(np.array([*digits, *rest], dtype=np.uint8) + FIRST_LETTER)


def shards(lengths: list[int], per_shard: int = 7) -> list[Tokens]:
    """The documents of these many residues, some in each shard."""
    documents = [document(i, length) for i, length in enumerate(lengths)]
    return [np.concatenate(documents[i : i + per_shard]) for i in range(0, len(documents), per_shard)]


def numbers_of(packed: Packed, lengths: list[int]) -> list[int]:
    """The documents of a pack, each checked to be whole, in order."""
    tokens_T = packed.tokens_T.numpy()
    found = []
    at = 0
    while at < len(tokens_T) and tokens_T[at] != PAD:
        assert tokens_T[at] == CLS
        number = sum(int(tokens_T[at + 1 + place] - FIRST_LETTER) * 20**place for place in range(DIGITS))
        whole = document(number, lengths[number])
        assert np.array_equal(tokens_T[at : at + len(whole)], whole), "a document was cut or mixed up"
        assert packed.residue_mask_T[at : at + len(whole)].tolist() == [False, *[True] * lengths[number], False]
        found.append(number)
        at += len(whole)
    assert (tokens_T[at:] == PAD).all()
    assert not packed.residue_mask_T[at:].any()
    return found


LENGTHS = st.lists(st.integers(DIGITS, 60), min_size=1, max_size=60)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(62, 400), st.integers(0, 5))
def test_every_document_once_an_epoch_and_whole(lengths: list[int], pack_tokens: int, seed: int) -> None:
    packs = Packs(shards(lengths), pack_tokens, 62, seed)
    assert packs.num_documents == len(lengths)
    assert packs.num_tokens == sum(lengths) + 2 * len(lengths)
    number = 0
    for epoch in range(3):
        seen: list[int] = []
        for _ in range(packs.epoch_packs(epoch)):
            seen += numbers_of(packs.pack(number), lengths)
            number += 1
        assert sorted(seen) == list(range(len(lengths)))


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(62, 400), st.integers(0, 5))
def test_a_pack_ends_only_where_the_next_document_does_not_fit(lengths: list[int], size: int, seed: int) -> None:
    packs = Packs(shards(lengths), size, 62, seed)
    made = [packs.pack(i) for i in range(packs.epoch_packs(0))]
    members = [numbers_of(packed, lengths) for packed in made]
    for packed, inside, after in zip(made, members, members[1:], strict=False):
        free = int((packed.tokens_T == PAD).sum())
        assert free < lengths[after[0]] + 2 or len(inside) == max(1, size // SHORTEST)
    # Two neighbours hold more than one pack's tokens unless the list of documents is full: less than half is wasted.
    if all(len(inside) < max(1, size // SHORTEST) for inside in members):
        assert len(made) < 2 * packs.num_tokens / size + 1


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.integers(62, 400))
def test_shapes_are_constant(lengths: list[int], pack_tokens: int) -> None:
    packs = Packs(shards(lengths), pack_tokens, 62, 0)
    made = [packs.pack(i) for i in range(packs.epoch_packs(0) + 1)]
    assert {tuple(p.tokens_T.shape) for p in made} == {(pack_tokens,)}
    assert len({(tuple(p.cu_seqlens.shape), len(p.lengths), p.max_len) for p in made}) == 1
    for packed in made:
        assert packed.cu_seqlens[-1] == pack_tokens
        assert packed.cu_seqlens.diff().max() <= packed.max_len == 62


def order_of(packs: Packs, epoch: int, lengths: list[int]) -> list[int]:
    first = sum(packs.epoch_packs(e) for e in range(epoch))
    return [n for i in range(packs.epoch_packs(epoch)) for n in numbers_of(packs.pack(first + i), lengths)]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    lengths = [DIGITS + i % 40 for i in range(200)]
    source = shards(lengths)
    orders = {
        (seed, epoch): order_of(Packs(source, 256, 62, seed), epoch, lengths) for seed in (0, 1) for epoch in (0, 1, 2)
    }
    assert len({tuple(order) for order in orders.values()}) == 6
    # A run that continues in epoch 2 sees what one that came there sees; shards do not matter.
    going = Packs(source, 256, 62, 0)
    assert [order_of(going, epoch, lengths) for epoch in (0, 1, 2)] == [orders[0, epoch] for epoch in (0, 1, 2)]
    assert order_of(Packs(shards(lengths, per_shard=1000), 256, 62, 1), 1, lengths) == orders[1, 1]
    # Shuffled, not rotated or sorted: the mean displacement of a random order of n is n / 3.
    for order in orders.values():
        displacement = np.abs(np.array(order) - np.arange(200)).mean()
        assert 200 / 3 - 15 < displacement < 200 / 3 + 15


@pytest.mark.parametrize("world", [1, 2, 3])
def test_packs_are_the_same_for_any_number_of_ranks(world: int) -> None:
    lengths = [DIGITS + i % 50 for i in range(90)]
    one = Packs(shards(lengths), 128, 62, 4)
    whole = [one.pack(i) for i in range(60)]
    # Each rank has Packs of its own and asks for its own numbers alone, over several epochs.
    assert one.epoch_packs(0) < 30
    for rank in range(world):
        mine = Packs(shards(lengths), 128, 62, 4)
        for number in range(rank, 60, world):
            packed = mine.pack(number)
            assert packed.tokens_T.equal(whole[number].tokens_T)
            assert packed.cu_seqlens.equal(whole[number].cu_seqlens)


def test_validation_keeps_its_own_order() -> None:
    lengths = [DIGITS + i % 31 for i in range(100)]
    packs = Packs(shards(lengths), 200, 62, None)
    assert order_of(packs, 0, lengths) == list(range(100))
    assert order_of(packs, 1, lengths) == list(range(100))


def test_a_pack_smaller_than_the_mean_document_holds_one() -> None:
    lengths = [5, 6, 7, 8]
    packs = Packs(shards(lengths), 12, 10, None)
    assert order_of(packs, 0, lengths) == [0, 1, 2, 3]


def test_residues_alone_are_masked_as_residues_and_eos_ends_each() -> None:
    lengths = [10, 20, 30]
    packed = Packs(shards(lengths), 128, 62, 0).pack(0)
    assert int(packed.residue_mask_T.sum()) == 60
    assert int((packed.tokens_T == EOS).sum()) == 3


def test_validation_has_the_shapes_of_training_however_short_its_documents_are() -> None:
    lengths = [20] * 400
    train = Packs(shards([400] * 40), 8192, 402, 0)
    own, shared = (Packs(shards(lengths), 8192, 402, None, room=room) for room in (None, train.room))
    shape = train.pack(0).cu_seqlens.shape
    assert own.pack(0).cu_seqlens.shape != shape == shared.pack(0).cu_seqlens.shape
    seen = [n for g in range(shared.epoch_packs(0)) for n in numbers_of(shared.pack(g), lengths)]
    assert sorted(seen) == list(range(len(lengths)))
