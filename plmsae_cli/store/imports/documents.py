"""Which imported rows belong together, and which of them are held out.

Where `embed.fasta` says whose rows they are, a scan of it decides everything, as for rows that we compute. Else a source may
name its documents: InterPLM's proteins by `boundaries`, SAELens's contexts. Else a document is a block of 256 rows, about a
protein's length: neighbours are then on one side of the split. P: documents, in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.fs import FileRecord, Store
from plmsae_cli.store.imports.parts import Documents
from plmsae_cli.store.imports.source import Source
from plmsae_cli.store.permutation import counter_hash
from plmsae_cli.store.proteins import Protein, Scan, write_table
from plmsae_cli.store.split import heldout, split_hash

BLOCK_ROWS = 256
_SPLIT_SEED = 0x696D706F7274
_WHAT = {
    "interplm": "a protein of InterPLM's boundaries, its sequence not known",
    "saelens": "a context of SAELens, its tokens not known",
    "block": "a block of rows of unknown proteins",
}


def documents_of(source: Source) -> tuple[Documents, str]:
    """The documents of a source, and what one is, in words."""
    each = [part.documents for part in source.parts]
    known = [documents for documents in each if documents is not None]
    if len(known) < len(each):
        # A file without documents among others with: none is trusted.
        whole, rest = divmod(source.num_rows, BLOCK_ROWS)
        lengths_P = np.full(whole + (rest > 0), BLOCK_ROWS, np.int32)
        if rest:
            lengths_P[-1] = rest
        return Documents(lengths_P, None), _WHAT["block"]
    lengths_P = np.concatenate([documents.lengths_C for documents in known])
    names: list[str] = []
    for documents in known:
        names += documents.names or []
    return Documents(lengths_P, names if len(names) == len(lengths_P) else None), _WHAT[source.format]


def scan_imported(source: Source, digest: str, holdout: float, proteins: Scan | None) -> Scan:
    """The documents as a scan: which are held out, which rows are whose.

    Held out are, as `split.heldout` chooses, the documents with the smallest hashes: of the sequence where `proteins` (the
    scan of `embed.fasta`) is given, of the id where the source names proteins, else of the document's number under a fixed
    key. Raises UserError where the proteins have another number of residues than the source has rows.
    """
    if proteins is not None:
        if (residues := int(proteins.lengths_P.sum(dtype=np.int64))) != source.num_rows:
            raise UserError(
                f"embed.imported: {source.path} has {source.num_rows:,} rows, the {proteins.num_proteins:,} proteins of "
                f"embed.fasta have {residues:,} residues as embed.max_length and embed.long keep them",
                "the FASTA must have the same proteins in the same order, cut at the same max_length",
            )
        return proteins
    documents, _ = documents_of(source)
    kept_P = documents.lengths_C > 0
    if documents.names is not None:
        hashes_P = np.array([split_hash(name) for name in documents.names], np.uint64)
    else:
        hashes_P = counter_hash(_SPLIT_SEED, np.arange(len(kept_P)))
    lengths_P = documents.lengths_C[kept_P]
    heldout_P = heldout(hashes_P[kept_P], holdout)
    row_offset_P = np.zeros(len(lengths_P), np.int64)
    for side_P in (heldout_P, ~heldout_P):
        rows = lengths_P[side_P].astype(np.int64)
        row_offset_P[side_P] = np.cumsum(rows) - rows
    counts = {"documents": len(lengths_P), "rows": source.num_rows}
    truncated_P = np.zeros(len(lengths_P), bool)
    return Scan(digest, kept_P, lengths_P, truncated_P, heldout_P, 1, row_offset_P, counts)


def write_documents(
    store: Store, path: str, source: Source, scanned: Scan, shard_ranges: Sequence[tuple[int, int]]
) -> FileRecord:
    """Write `proteins.parquet` of rows whose sequences are not known: `sequence` is empty, `description` says what a
    document is, and an id that nobody gave is the number of the source's rows, from 0."""
    return write_table(store, path, _named(source, scanned), scanned, shard_ranges)


def _named(source: Source, scanned: Scan) -> Iterator[Protein]:
    documents, what = documents_of(source)
    row = 0
    kept = np.flatnonzero(scanned.kept_R)
    for index, length in zip(kept.tolist(), scanned.lengths_P.tolist(), strict=True):
        name = documents.names[index] if documents.names is not None else f"rows-{row}-{row + length - 1}"
        yield Protein(name, what, length, "")
        row += length
