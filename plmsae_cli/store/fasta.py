"""FASTA, plain or gzip, one protein at a time.

Plain Python and zlib, after trying the readers that exist (pyfastx 2.3.1, needletail 0.7.3) on damaged
files. pyfastx ends quietly at a cut or corrupt gzip stream, so that half the proteins are missing and nobody
knows; a file without a header reads as empty, and a header that is not UTF-8 stops it. needletail notices
damaged streams, but refuses a file whose last protein is empty and takes binary data after a header for a
sequence. Neither can hash the file in the same pass. On 187 M residues of gzip they read 94 to 117 M
residues/s on one core and this module about 55: four seconds for all of Swiss-Prot.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from plmsae_cli.config.errors import UserError

BLOCK = 1 << 20
"""Bytes read, or inflated, at a time."""
LONGEST_RECORD = 64 << 20
"""Bytes of one record; the longest known proteins have some 45,000 residues."""
LONGEST_ID = 1_000
"""Characters of an id."""
LONGEST_DESCRIPTION = 10_000
"""Characters kept of a description: it ends up in tables and pages."""

_GZIP = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OTHER_PACKERS = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
}
_BLANKS = b" \t\r\n\v\f"
_PRINTED = bytes(range(33, 127))
_DAMAGED = "copy or download the file again; `gzip -t FILE` tells whether a copy is whole"

Entry = tuple[str, str, str, int]
"""Id, description, sequence, and the line of the header, counted from 1."""


def records(path: Path) -> Iterator[tuple[str, str, str]]:
    """The proteins of a FASTA file in its order: id, description, sequence.

    The id is the header's first word, the description the rest; characters that do not print come as
    backslash escapes and a description ends after 10,000 characters. Sequences are upper-case and without
    blanks, and may be empty: what to do then is the caller's policy. Memory does not grow with the file.

    Raises UserError, naming file, line and remedy: no such file, a folder, an empty file, no header at the
    start, another format or compression, a gzip stream that is cut short or fails its CRC, a header without
    an id, binary data or a `>` inside a sequence, an id or a record too long to be true.
    """
    return ((identifier, description, sequence) for identifier, description, sequence, _ in entries(path))


def entries(path: Path, observe: Callable[[bytes], object] | None = None) -> Iterator[Entry]:
    """`records` with the header's line number; `observe` gets the file's bytes as stored, once, in order."""
    line = 1
    tail = b""
    started = False
    for text in _text(path, observe):
        tail += text
        if not started:
            head = tail
            tail = head.removeprefix(_BYTE_ORDER_MARK).lstrip(_BLANKS)
            line += head.count(b"\n") - tail.count(b"\n")
            if not tail:
                continue
            if not tail.startswith(b">"):
                raise _headless(path, line, tail)
            tail = tail[1:]
            started = True
        *whole, tail = tail.split(b"\n>")
        for record in whole:
            yield _entry(path, record, line)
            line += record.count(b"\n") + 1
        if len(tail) > LONGEST_RECORD:
            raise UserError(
                f"{path} line {line}: this record is longer than {LONGEST_RECORD >> 20} MiB",
                "no protein is that long: is this a genome, or a file without line breaks?",
            )
    if not started:
        raise UserError(f"{path} is empty", "was it written completely? A FASTA file begins with a `>` line")
    yield _entry(path, tail, line)


def _entry(path: Path, record: bytes, line: int) -> Entry:
    """Split one record, without its leading `>`, which begins at `line`."""
    header, _, body = record.partition(b"\n")
    words = _printable(header.decode("utf-8", "backslashreplace").strip()).split(None, 1)
    if not words:
        raise UserError(f"{path} line {line}: header without an id", "write the protein's name right after the `>`")
    identifier = words[0]
    if len(identifier) > LONGEST_ID:
        raise UserError(
            f"{path} line {line}: the id {identifier[:40]}... has {len(identifier):,} characters",
            f"an id is the header's first word, at most {LONGEST_ID:,} characters: put a blank after it",
        )
    description = words[1] if len(words) > 1 else ""
    if len(description) > LONGEST_DESCRIPTION:
        description = description[: LONGEST_DESCRIPTION - 1] + "…"
    letters = body.translate(None, _BLANKS)
    if letters.translate(None, _PRINTED):
        raise UserError(
            f"{path} line {line}: the sequence of {identifier} contains binary data",
            "FASTA is plain text: is the file damaged, or of another format?",
        )
    if b">" in letters:
        raise UserError(
            f"{path} line {line}: the sequence of {identifier} contains `>`",
            "a line break is missing before a header; joining files without a final line break does that",
        )
    return identifier, description, letters.upper().decode("ascii"), line


def _printable(text: str) -> str:
    """`text` with control characters, and others that do not print, as backslash escapes.

    Tabs become blanks: they separate words in headers.
    """
    text = text.replace("\t", " ")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _headless(path: Path, line: int, head: bytes) -> UserError:
    """The error for a file whose first bytes that are not blank, `head`, are no header."""
    for magic, packer in _OTHER_PACKERS.items():
        if head.startswith(magic):
            return UserError(f"{path} is packed with {packer}", "unpack it, or pack it with gzip instead")
    first = head[:4096]
    # Bytes from 128 on may be letters of some encoding; control characters occur in no text.
    if first.translate(None, bytes(range(32, 256)) + _BLANKS):
        return UserError(f"{path} is a binary file", "embed.fasta takes FASTA text, plain or gzip")
    shown = _printable(first.split(b"\n", 1)[0][:40].decode("utf-8", "replace").strip())
    return UserError(
        f"{path} line {line}: no header at the start, the file begins with {shown!r}",
        "a FASTA file begins with a line such as `>protein1 description`",
    )


def _text(path: Path, observe: Callable[[bytes], object] | None) -> Iterator[bytes]:
    """The file's content, inflated where it is gzip, in blocks of about 1 MiB."""
    with _open(path) as file:
        stored = _stored(file, observe)
        first = next(stored, b"")
        if first.startswith(_GZIP):
            yield from _inflate(path, first, stored)
        else:
            yield first
            yield from stored


def _open(path: Path) -> BinaryIO:
    if path.is_dir():
        raise UserError(f"{path} is a folder", "name a FASTA file, plain or gzip")
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file", "check embed.fasta; relative paths start at the working folder"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "check the file's permissions") from error


def _stored(file: BinaryIO, observe: Callable[[bytes], object] | None) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        if observe is not None:
            observe(block)
        yield block


def _inflate(path: Path, first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    """Inflate a gzip file of one or more members; `first` and then `rest` are its bytes."""
    member = zlib.decompressobj(wbits=31)
    position = 0
    data = first
    while data:
        position += len(data)
        while data:
            if member.eof:
                data = data.lstrip(b"\0")  # zeros may pad a gzip file (tapes, block devices)
                if not data:
                    break
                member = zlib.decompressobj(wbits=31)
            try:
                text = member.decompress(data, BLOCK)
            except zlib.error as error:
                reason = str(error).partition(": ")[2] or str(error)
                raise UserError(f"{path}: damaged gzip data before byte {position:,} ({reason})", _DAMAGED) from error
            data = member.unused_data if member.eof else member.unconsumed_tail
            yield text
        data = next(rest, b"")
    if not member.eof:
        raise UserError(f"{path}: the gzip stream is cut short after {position:,} bytes", _DAMAGED)
