"""What one pass over a FASTA file tells about each record, remembered on disk.

Nothing here depends on the experiment's options, so changing them, or planning again, does not read the
proteins a second time. R: records of the file, in its order.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import zipfile
from array import array
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.fasta import entries
from plmsae_cli.store.split import split_hash

KNOWN_LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
"""Upper-case letters that have a token of their own in ESM's alphabet."""

_KNOWN = KNOWN_LETTERS.encode()
_VERSION = 1
"""Part of a remembered index's name: to be raised when what an index holds changes."""


@dataclass(frozen=True)
class FastaIndex:
    """The raw facts of a FASTA file: 17 bytes a record."""

    sha256: str
    """Of the file as stored: of the `.gz`, where it is one."""
    lengths_R: npt.NDArray[np.int32]
    """Residues, as they are in the file."""
    unknown_R: npt.NDArray[np.int32]
    """Residues whose letter is not in `KNOWN_LETTERS`."""
    hashes_R: npt.NDArray[np.uint64]
    """`split_hash` of the whole sequence."""
    repeats_R: npt.NDArray[np.bool_]
    """Whether an earlier record has the same id."""


def fasta_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex; from the remembered index where there is one.

    Raises UserError for whatever makes the file unreadable as FASTA.
    """
    return fasta_index(path).sha256


def fasta_index(path: Path) -> FastaIndex:
    """The index of `path`: remembered, or made in one pass and then remembered.

    It is kept in `$PLMSAE_CACHE/fasta` (`~/.cache/plmsae/fasta`) under the file's real path, size, and times
    of change; where that folder cannot be written, it is made anew each time. Raises UserError as
    `fasta.records` does, and if the file changes while it is read.
    """
    identity = _identity(path)
    remembered = _place(identity)
    index = _load(remembered)
    if index is None:
        index = _build(path)
        if _identity(path) != identity:
            raise UserError(f"{path} changed while it was read", "wait until it is complete, then start again")
        with suppress(OSError):
            _save(remembered, index)
    return index


def _identity(path: Path) -> str:
    """What tells this content of this file from others; "" if there is no file (reading it will say so)."""
    try:
        facts = path.stat()
    except OSError:
        return ""
    # The inode's change time cannot be set back, unlike mtime, which copying tools preserve.
    return f"{path.resolve()}\n{facts.st_size}\n{facts.st_mtime_ns}\n{facts.st_ctime_ns}"


def _place(identity: str) -> Path:
    cache = Path(os.environ.get("PLMSAE_CACHE", "~/.cache/plmsae")).expanduser()
    return cache / "fasta" / f"{xxhash.xxh3_128_hexdigest(identity.encode())}-v{_VERSION}.npz"


def _load(place: Path) -> FastaIndex | None:
    """The remembered index; None if there is none, or none that can be read."""
    try:
        with np.load(place, allow_pickle=False) as arrays:
            return FastaIndex(
                bytes(arrays["sha256"]).hex(),
                arrays["lengths"],
                arrays["unknown"],
                arrays["hashes"],
                arrays["repeats"],
            )
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def _save(place: Path, index: FastaIndex) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.stem}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(
                file,
                sha256=np.frombuffer(bytes.fromhex(index.sha256), np.uint8),
                lengths=index.lengths_R,
                unknown=index.unknown_R,
                hashes=index.hashes_R,
                repeats=index.repeats_R,
            )
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


def _build(path: Path) -> FastaIndex:
    digest = hashlib.sha256()
    lengths, unknown, hashes, names = array("i"), array("i"), array("Q"), array("Q")
    for identifier, _, sequence, _ in entries(path, digest.update):
        letters = sequence.encode("ascii")
        lengths.append(len(letters))
        unknown.append(len(letters.translate(None, _KNOWN)))
        hashes.append(split_hash(letters))
        names.append(xxhash.xxh3_64_intdigest(identifier.encode()))
    return FastaIndex(
        digest.hexdigest(),
        np.frombuffer(lengths, np.int32),
        np.frombuffer(unknown, np.int32),
        np.frombuffer(hashes, np.uint64),
        _repeats(path, np.frombuffer(names, np.uint64)),
    )


def _repeats(path: Path, names_R: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Whether a record's id occurred before, exactly: equal hashes only say which ids to read again."""
    repeats_R = np.zeros(len(names_R), bool)
    sorted_R = np.sort(names_R)
    repeated = sorted_R[1:][sorted_R[1:] == sorted_R[:-1]]
    del sorted_R  # of millions of proteins every further array counts
    if len(repeated) == 0:
        return repeats_R
    suspects_R = np.isin(names_R, repeated)
    seen: set[str] = set()
    for record, (identifier, *_) in enumerate(entries(path)):
        if suspects_R[record]:
            repeats_R[record] = identifier in seen
            seen.add(identifier)
    return repeats_R
