"""Did you mean: renames lead to real fields, misspelt keys to themselves."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.config.names import RENAMED, suggestions
from plmsae_cli.config.tree import describe, entries, keys


def test_renames_lead_from_foreign_names_to_fields() -> None:
    own = {path.rpartition(".")[2] for path in entries()}
    assert set(RENAMED.values()) <= set(entries())
    assert not set(RENAMED) & own
    assert list(RENAMED) == sorted(RENAMED)


FASTA_AXES = ("encode", "structure", "steering", "lm")


@pytest.mark.parametrize(
    ("section", "key", "expected"),
    [
        ("embed", "layer", ["embed.layers"]),
        ("train", "layers", ["train.layer"]),
        ("embed", "batch_size", ["embed.batch_tokens"]),
        ("train.sae", "batch_size", ["train.batch_tokens"]),
        ("train.plm", "max_len", ["train.plm.max_length"]),
        ("", "fasta", [f"{s}.fasta" for s in ("embed", "train.plm", *(f"eval.{axis}" for axis in FASTA_AXES))]),
        ("train", "batch", ["train.batch_tokens"]),
        ("train.sae", "seed", ["train.seed"]),
        ("", "seed", ["shuffle.seed", "train.seed"]),
        ("train", "Expansion", ["train.sae.expansion"]),
        ("train", "num-latent", ["train.sae.num_latents"]),
        ("", "wibble", []),
    ],
)
def test_suggestions(section: str, key: str, expected: list[str]) -> None:
    assert suggestions(section, key) == expected


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_one_lost_letter_is_found_again(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from([p for p in entries() if len(p.rpartition(".")[2]) >= 6]))
    section, _, key = path.rpartition(".")
    at = data.draw(st.integers(1, len(key) - 1))
    misspelt = key[:at] + key[at + 1 :]
    if misspelt not in RENAMED and misspelt not in keys(section):
        assert suggestions(section, misspelt) == [path]


def test_describe_has_every_field_and_no_jargon() -> None:
    rows = describe()
    assert [row[0] for row in rows] == list(entries())
    for path, kind, default, text in rows:
        assert kind
        assert default
        assert text, path
        assert not re.search(r"\b(Annotated|Literal|int|str|None)\b|<", kind)
