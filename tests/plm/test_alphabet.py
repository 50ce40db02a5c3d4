"""Tokens against fair-esm's alphabet, and one token a residue whatever the text."""

from __future__ import annotations

import esm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.plm import alphabet as ab

FAIR_ESM = esm.data.Alphabet.from_architecture("ESM-1b")


def test_every_token_is_fair_esms() -> None:
    assert list(ab.TOKEN_NAMES) == FAIR_ESM.all_toks
    assert len(FAIR_ESM) == ab.VOCAB_SIZE
    assert (FAIR_ESM.cls_idx, FAIR_ESM.padding_idx, FAIR_ESM.eos_idx) == (ab.CLS, ab.PAD, ab.EOS)
    assert (FAIR_ESM.unk_idx, FAIR_ESM.mask_idx) == (ab.UNK, ab.MASK)
    for letter in ab.LETTERS:
        assert ab.encode(letter).tolist() == [FAIR_ESM.tok_to_idx[letter]]


def test_amino_acids_are_the_twenty_standard_ones_in_token_order() -> None:
    assert sorted(ab.AMINO_ACIDS) == list("ACDEFGHIKLMNPQRSTVWY")
    assert ab.encode(ab.AMINO_ACIDS).tolist() == list(range(ab.FIRST_LETTER, ab.FIRST_LETTER + 20))


def test_a_protein_is_encoded_as_fair_esm_does(proteins: list[str]) -> None:
    for protein in proteins:
        assert ab.encode(protein).tolist() == FAIR_ESM.encode(protein)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60))
def test_one_token_a_character_whatever_the_text(text: str) -> None:
    tokens = ab.encode(text)
    assert tokens.dtype == np.uint8
    assert len(tokens) == len(text)
    known = set(ab.LETTERS) | set(ab.LETTERS.lower())
    expected = [FAIR_ESM.tok_to_idx[c.upper()] if c in known else FAIR_ESM.tok_to_idx["X"] for c in text]
    assert tokens.tolist() == expected


def test_lower_case_is_not_collapsed() -> None:
    assert ab.decode(ab.encode("mkv")) == "MKV"


def test_bytes_and_text_give_the_same() -> None:
    assert ab.encode(b"MKJ*v").tolist() == ab.encode("MKJ*v").tolist()


def test_unknown_letters_can_be_an_error_that_names_the_place() -> None:
    with pytest.raises(ValueError, match=r"position 4 holds 'J'"):
        ab.encode("MKVJA*", unknown="error")
    assert ab.encode("MKVXBUZO", unknown="error").tolist() == ab.encode("MKVXBUZO").tolist()


def test_wrap_and_decode_name_the_ends() -> None:
    assert ab.decode(ab.wrap(ab.encode("MK"))) == "<cls>MK<eos>"
    assert ab.decode(ab.wrap(ab.encode(""))) == "<cls><eos>"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text("ACDEFGHIKLMNPQRSTVWY", max_size=12), min_size=1, max_size=6), st.integers(0, 30))
def test_pack_is_the_documents_one_after_the_other(sequences: list[str], spare: int) -> None:
    encoded = [ab.encode(s) for s in sequences]
    used = sum(len(s) + 2 for s in sequences)
    packed = ab.pack(encoded, num_tokens=used + spare, num_documents=len(sequences) + spare)
    bounds = packed.cu_seqlens.tolist()
    for i, sequence in enumerate(sequences):
        document = packed.tokens_T[bounds[i] : bounds[i + 1]]
        assert ab.decode(document.tolist()) == f"<cls>{sequence}<eos>"
    assert packed.tokens_T[used:].tolist() == [ab.PAD] * spare
    assert ab.decode(packed.tokens_T[packed.residue_mask_T].tolist()) == "".join(sequences)
    assert len(bounds) == len(sequences) + spare + 1
    assert bounds[-1] == used + spare, "every token lies in a document"
    assert list(packed.lengths) == np.diff(bounds).tolist()
    assert max(packed.lengths) <= packed.max_len == max(len(s) + 2 for s in sequences)


def test_pack_says_what_does_not_fit() -> None:
    encoded = [ab.encode("MKV"), ab.encode("AC")]
    with pytest.raises(ValueError, match="9 tokens do not fit into a pack of 8"):
        ab.pack(encoded, num_tokens=8)
    with pytest.raises(ValueError, match="2 documents, padding included, in a pack of 1"):
        ab.pack(encoded, num_documents=1)
    with pytest.raises(ValueError, match="a document of 5 tokens in a pack whose max_len is 4"):
        ab.pack(encoded, max_len=4)
