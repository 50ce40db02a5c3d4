"""Annotated proteins: what UniProt says of which residues, whatever file it comes from."""

from __future__ import annotations

import gzip
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from plmsae_cli.config.errors import UserError

_COFACTOR = re.compile(r"Name=([^;]+);")


@dataclass(frozen=True)
class Feature:
    """One line of a feature table."""

    key: str
    """UniProt's feature key, such as `DOMAIN`; `COFACTOR` for a cofactor comment."""
    start: int
    """First residue, counted from 1; 0 for a feature without a place (a cofactor)."""
    end: int
    """Last residue, inclusive."""
    note: str = ""
    ligand: str = ""


@dataclass(frozen=True)
class Entry:
    """One protein with its features."""

    accession: str
    sequence: str
    features: tuple[Feature, ...]
    families: tuple[str, ...] = ()
    """Accessions of Pfam families, where the file has them."""
    location: str = ""
    """What the file says of where in the cell the protein is, as text."""


def cofactors(comment: str) -> list[Feature]:
    """Those that a cofactor comment names."""
    return [Feature("COFACTOR", 0, 0, ligand=name) for name in _COFACTOR.findall(comment)]


def location(comment: str) -> str:
    """The places of a comment on subcellular location, without its notes."""
    return comment.removeprefix("SUBCELLULAR LOCATION:").partition("Note=")[0].strip()


def position(text: str) -> tuple[int, int] | None:
    """First and last residue (from 1, inclusive) of `12`, `12..30`, `<1..>30`; None where a place is unknown.

    `?` in a place makes it unknown, `P12345-2:4..9` is a place in another isoform; neither marks a residue here.
    """
    if "?" in text or ":" in text:
        return None
    first, _, last = text.partition("..")
    try:
        start, end = int(first.strip("<>")), int((last or first).strip("<>"))
    except ValueError:
        return None
    return (start, end) if 1 <= start <= end else None


def read_entries(path: Path) -> Iterator[Entry]:
    """The proteins of a UniProtKB table (TSV with a header line) or flat file, plain or gzip, in the file's order.

    Raises:
        UserError: neither of the two formats, a table without accession or sequence, a damaged file.
    """
    from plmsae_cli.evaluation.annotations.uniprot_flat import flat_entries
    from plmsae_cli.evaluation.annotations.uniprot_table import table_entries

    try:
        with open_text(path) as file:
            head = file.readline()
        if head.startswith("ID   "):
            yield from flat_entries(path, open_text(path))
        elif "\t" in head:
            yield from table_entries(path, open_text(path))
        else:
            raise UserError(
                f"{path} is neither a UniProt table nor a UniProt flat file",
                "a table begins with a line of column names separated by tabs, a flat file with `ID   `",
            )
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "relative paths start at the working folder") from None
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}", "download it again") from error


def open_text(path: Path) -> TextIO:
    """The lines of a file, plain or gzip, without the mark that spreadsheets put before the first."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig")


def open_bytes(path: Path) -> BinaryIO:
    """The content of a file, plain or gzip."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path, "rb")) if packed else path.open("rb")
