"""FASTA reading: what goes in comes out, and every damaged file gets one clear error."""

from __future__ import annotations

import gzip
import random
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.config.errors import UserError
from plmsae_cli.store import fasta
from plmsae_cli.store.fasta import entries, records

IDS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)
WORDS = st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8), max_size=4)
SEQUENCES = st.text("ACDEFGHIKLMNPQRSTVWYXUBZOJ*.-acdwy", max_size=90)
PROTEINS = st.lists(st.tuples(IDS, WORDS.map(" ".join), SEQUENCES), min_size=1, max_size=12)


def render(proteins: list[tuple[str, str, str]], width: int, newline: str, last_newline: bool) -> bytes:
    lines: list[str] = []
    for identifier, description, sequence in proteins:
        lines.append(f">{identifier} {description}".rstrip())
        lines += [sequence[i : i + width] for i in range(0, len(sequence), width)]
    return (newline.join(lines) + newline * last_newline).encode()


def many(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    rng = random.Random(seed)
    return [
        (f"p{i}", f"protein number {i}", "".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=rng.randint(1, 900))))
        for i in range(count)
    ]


@settings(deadline=None, max_examples=150)
@given(
    proteins=PROTEINS,
    width=st.integers(1, 100),
    newline=st.sampled_from(["\n", "\r\n"]),
    last_newline=st.booleans(),
    members=st.integers(0, 3),
    block=st.integers(4, 64),
)
def test_round_trip_whatever_the_blocks(
    tmp_path_factory: pytest.TempPathFactory,
    proteins: list[tuple[str, str, str]],
    width: int,
    newline: str,
    last_newline: bool,
    members: int,
    block: int,
) -> None:
    text = render(proteins, width, newline, last_newline)
    path = tmp_path_factory.mktemp("fasta") / "proteins.fasta"
    cuts = [len(text) * i // max(members, 1) for i in range(members + 1)]
    packed = b"".join(gzip.compress(text[a:b]) for a, b in pairwise(cuts))
    path.write_bytes(packed if members else text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fasta, "BLOCK", block)
        found = list(records(path))
    assert found == [(i, d, s.upper()) for i, d, s in proteins]


def test_blanks_inside_sequences_and_around_the_first_header(tmp_path: Path) -> None:
    path = tmp_path / "a.fasta"
    path.write_bytes(b"\xef\xbb\xbf\r\n\n  >a one\ttwo \nmk vl\t\n\nac\n> b\nMK\n")
    assert list(entries(path)) == [("a", "one two", "MKVLAC", 3), ("b", "", "MK", 7)]


@settings(deadline=None, max_examples=50)
@given(proteins=PROTEINS, width=st.integers(1, 100))
def test_lines_are_those_of_the_headers(
    tmp_path_factory: pytest.TempPathFactory, proteins: list[tuple[str, str, str]], width: int
) -> None:
    text = render(proteins, width, "\n", True)
    path = tmp_path_factory.mktemp("fasta") / "proteins.fasta"
    path.write_bytes(text)
    headers = [number for number, line in enumerate(text.split(b"\n"), 1) if line.startswith(b">")]
    assert [line for *_, line in entries(path)] == headers


@pytest.mark.parametrize("packed", [False, True])
def test_observer_sees_the_stored_bytes(tmp_path: Path, packed: bool) -> None:
    text = render(many(50), 60, "\n", True)
    path = tmp_path / "a.fasta"
    path.write_bytes(gzip.compress(text) + b"\0" * 512 if packed else text)
    seen: list[bytes] = []
    assert len(list(entries(path, seen.append))) == 50
    assert b"".join(seen) == path.read_bytes()


def gz(change: Callable[[bytearray], bytes]) -> bytes:
    """A gzip file of 300 proteins, changed."""
    return bytes(change(bytearray(gzip.compress(render(many(300), 60, "\n", True), mtime=0))))


def flip(data: bytearray, place: int) -> bytearray:
    data[place] ^= 1
    return data


FAULTS = {
    "empty": (b"", "is empty"),
    "blank": (b"\n \r\n\t\n", "is empty"),
    "empty gzip": (gzip.compress(b""), "is empty"),
    "no header": (b"\nMKVL\nACDE\n", "line 2: no header at the start, the file begins with 'MKVL'"),
    "header later": (b"MKVL\n>a\nAC\n", "line 1: no header at the start"),
    "fastq": (b"@read\nMK\n+\nII\n", "no header at the start, the file begins with '@read'"),
    "binary": (bytes(range(256)) * 20, "is a binary file"),
    "binary in gzip": (gzip.compress(b"\x7fELF\0\0\1"), "is a binary file"),
    "utf-16": (">a\nMK\n".encode("utf-16"), "is a binary file"),
    "binary after a header": (b">a\n" + bytes(range(256)), "line 1: the sequence of a contains binary data"),
    "accents in a sequence": (">a\nMK\n>b\nMÄK\n".encode(), "line 3: the sequence of b contains binary data"),
    "zstd": (b"\x28\xb5\x2f\xfd\0\0", "is packed with zstd"),
    "xz": (b"\xfd7zXZ\0\0", "is packed with xz"),
    "bzip2": (b"BZh91AY", "is packed with bzip2"),
    "zip": (b"PK\x03\x04..", "is packed with zip"),
    "gz cut short": (gz(lambda data: data[: len(data) // 2]), "the gzip stream is cut short after"),
    "gz without its trailer": (gz(lambda data: data[:-8]), "the gzip stream is cut short after"),
    "gz with half a trailer": (gz(lambda data: data[:-3]), "the gzip stream is cut short after"),
    "gz magic only": (b"\x1f\x8b", "the gzip stream is cut short after 2 bytes"),
    "gz crc": (gz(lambda data: flip(data, -7)), "damaged gzip data before byte .* (incorrect data check)"),
    "gz length": (
        gz(lambda data: flip(data, -1)),
        "damaged gzip data before byte .* (incorrect length check)",
    ),
    "gz bit flipped": (gz(lambda data: flip(data, len(data) // 2)), "damaged gzip data before byte"),
    "gz with garbage after": (gz(lambda data: data + b"garbage"), "damaged gzip data before byte"),
    "id missing": (b">a\nMK\n>\nAC\n", "line 3: header without an id"),
    "id blank": (b">a\nMK\n> \t\nAC\n", "line 3: header without an id"),
    "id endless": (
        b">a\nMK\n>" + b"x" * 1_000_000 + b"\nAC\n",
        "line 3: the id x{40}\\.\\.\\. has 1,000,000 characters",
    ),
    "line break missing": (b">a\nMK>b\nAC\n", "line 1: the sequence of a contains `>`"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(tmp_path: Path, fault: str) -> None:
    data, message = FAULTS[fault]
    path = tmp_path / "some.fasta"
    path.write_bytes(data)
    message = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(UserError, match=message) as caught:
        list(records(path))
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.fasta: no such file"):
        list(records(tmp_path / "nowhere.fasta"))
    with pytest.raises(UserError, match="is a folder"):
        list(records(tmp_path))


def test_proteins_before_the_damage_are_no_reason_to_stop_early(tmp_path: Path) -> None:
    """A reader that stops at the damage would return half of the proteins and no error."""
    path = tmp_path / "cut.fasta.gz"
    path.write_bytes(gz(lambda data: data[: len(data) - 100]))
    seen: list[str] = []
    with pytest.raises(UserError, match="cut short"):
        seen.extend(identifier for identifier, *_ in records(path))
    assert 200 < len(seen) < 300


def test_hostile_headers_are_kept_and_printable(tmp_path: Path) -> None:
    path = tmp_path / "hostile.fasta"
    headers = [
        b">a\x07\x1b[31m <script>alert(1)</script>\0",
        b">../../etc/passwd x",
        ">ü Köln \u202e".encode(),
        b">b K\xf6ln",
    ]
    path.write_bytes(b"".join(header + b"\nMK\n" for header in headers))
    found = list(records(path))
    assert [identifier for identifier, *_ in found] == ["a\\x07\\x1b[31m", "../../etc/passwd", "ü", "b"]
    assert [description for _, description, _ in found] == [
        "<script>alert(1)</script>\\x00",
        "x",
        "Köln \\u202e",
        "K\\xf6ln",
    ]
    assert all(text.isprintable() for record in found for text in record)


def test_header_line_of_a_megabyte(tmp_path: Path) -> None:
    path = tmp_path / "long.fasta"
    path.write_bytes(b">a " + b"x" * (1 << 20) + b"\nMKVL\n>b\nAC\n")
    (first, description, sequence), second = records(path)
    assert (first, sequence, second) == ("a", "MKVL", ("b", "", "AC"))
    assert description == "x" * (fasta.LONGEST_DESCRIPTION - 1) + "…"


def test_record_too_long_to_be_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fasta, "LONGEST_RECORD", 1 << 20)
    path = tmp_path / "genome.fasta"
    path.write_bytes(b">a\nMK\n>chr1\n" + b"ACGT" * (1 << 20))
    with pytest.raises(UserError, match="line 3: this record is longer than 1 MiB"):
        list(records(path))


def test_zero_length_sequences_are_the_callers_business(tmp_path: Path) -> None:
    path = tmp_path / "empty.fasta"
    path.write_bytes(b">a\n>b\n\n>c\nMK\n>d")
    assert [(i, s) for i, _, s in records(path)] == [("a", ""), ("b", ""), ("c", "MK"), ("d", "")]


@pytest.mark.parametrize("packed", [False, True])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, packed: bool) -> None:
    """4 and 20 copies of 1 MB of proteins."""
    block = render(many(2000), 60, "\n", True)
    peaks = []
    for copies in (4, 20):
        path = tmp_path / f"{copies}.fasta"
        path.write_bytes(gzip.compress(block * copies, 1) if packed else block * copies)
        tracemalloc.start()
        assert sum(1 for _ in records(path)) == 2000 * copies
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
    assert peaks[1] < 8 * fasta.BLOCK
