"""UniProtKB's flat files, old and new syntax of the feature table, read by Biopython."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.annotations.entries import Entry, Feature, cofactors, location

_DOUBT = re.compile(r"\s*\((?:by similarity|potential|probable)\)", re.IGNORECASE)
_ONLY_DOUBT = re.compile(r"(?:by similarity|potential|probable)\.?", re.IGNORECASE)
_OLD_BINDING = {"METAL": "BINDING", "NP_BIND": "BINDING", "CA_BIND": "BINDING"}
"""Keys that UniProt has since merged into BINDING; their text is what `/ligand=` holds today."""


def flat_entries(path: Path, file: TextIO) -> Iterator[Entry]:
    """The proteins of the flat file.

    Raises:
        UserError: Biopython is not installed, or it cannot read the file.
    """
    try:
        from Bio import SwissProt
    except ImportError as error:
        raise UserError(
            f"{path} is a UniProt flat file, which Biopython reads, and that is not installed",
            "pip install 'plmsae[annotations]', or download the same proteins as TSV",
        ) from error
    with file:
        try:
            for record in SwissProt.parse(file):  # type: ignore[no-untyped-call]
                yield _entry(record)
        except (ValueError, SwissProt.SwissProtParserError) as error:
            raise UserError(f"{path} is not a sound UniProt flat file: {error}", "download it again") from error


def _entry(record: Any) -> Entry:
    features = [feature for one in record.features if (feature := _feature(one)) is not None]
    for comment in record.comments:
        if comment.startswith("COFACTOR:"):
            features += cofactors(comment)
    families = tuple(reference[1] for reference in record.cross_references if reference[0] == "Pfam")
    places = " ".join(location(comment) for comment in record.comments if comment.startswith("SUBCELLULAR LOCATION:"))
    return Entry(record.accessions[0], str(record.sequence).upper(), tuple(features), families, places)


def _feature(one: Any) -> Feature | None:
    from Bio.SeqFeature import UnknownPosition

    place = one.location
    uncertain = (UnknownPosition,)
    if place is None or place.ref or isinstance(place.start, uncertain) or isinstance(place.end, uncertain):
        return None
    # "?12" is a guess, and not UnknownPosition but UncertainPosition.
    if any(type(end).__name__ == "UncertainPosition" for end in (place.start, place.end)):
        return None
    start, end = int(place.start) + 1, int(place.end)
    if not 1 <= start <= end:
        return None
    note = tidy(one.qualifiers.get("note") or one.qualifiers.get("description", ""))  # new and old syntax
    ligand = one.qualifiers.get("ligand", "")
    if one.type in _OLD_BINDING:
        return Feature("BINDING", start, end, ligand=ligand or re.sub(r"\s+\d+$", "", note.partition(";")[0]))
    return Feature(one.type, start, end, note=note, ligand=ligand)


def tidy(note: str) -> str:
    """A description without the old syntax's words of doubt and its full stop: `SH3 1 (Potential).` is `SH3 1`."""
    if _ONLY_DOUBT.fullmatch(note.strip()):
        return ""
    return _DOUBT.sub("", note).strip().removesuffix(".").strip()
