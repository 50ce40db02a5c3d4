"""The token shards of a pLM run: FASTA to `.bin`, split by the hash of the sequence or by file.

`train-*.bin` and `random-*.bin` come from `train.plm.fasta`, one more set from each file of `train.plm.valid`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from plmsae_cli.config.data import Embed
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.plm import PLM
from plmsae_cli.plm.alphabet import AMINO_ACIDS, FIRST_LETTER, encode, wrap
from plmsae_cli.runtime.task import Context, Result, Task
from plmsae_cli.store.fs import FileRecord, Store, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.proteins import Scan, kept_proteins, scan
from plmsae_cli.store.tokens import read_tokens, write_tokens

SHARD_TOKENS = 100_000_000
Tokens = npt.NDArray[np.uint8]


def _policies(lineage: Lineage, fasta: str, holdout: float) -> Embed:
    """How a pLM's FASTA is read: doubles and empty records are dropped, odd letters are X."""
    train = lineage.experiment.train
    assert train is not None
    assert train.plm is not None
    length = train.plm.max_length
    return Embed(fasta=fasta, layers=[0], max_length=length, duplicates="first", empty="skip", holdout=holdout)


def sources(plm: PLM) -> list[tuple[str, str, bool | None]]:
    """(name, FASTA, side of the split or None for all of it) of each set of shards.

    Raises:
        UserError: a validation set's name cannot be the name of a file, or is that of another set.
    """
    for name in plm.valid:
        if name in ("train", "random") or not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
            raise UserError(
                f"train.plm.valid: {name!r} cannot name a validation set",
                "use lower-case letters, digits, '.', '_' and '-'; `train` and `random` are taken",
            )
    own: list[tuple[str, str, bool | None]] = [("train", plm.fasta, False), ("random", plm.fasta, True)]
    return own + [(name, fasta, None) for name, fasta in sorted(plm.valid.items())]


def scanned(lineage: Lineage, fasta: str) -> Scan:
    """The scan of the training FASTA, with its held-out proteins marked."""
    train = lineage.experiment.train
    assert train is not None
    assert train.plm is not None
    return scan(lineage.store.local(fasta), _policies(lineage, fasta, train.plm.holdout))


def write(task: Task, context: Context) -> Mapping[str, Result]:
    """Work of the `tokens` task."""
    lineage = Lineage(context.experiment, context.store)
    train = context.experiment.train
    assert train is not None
    assert train.plm is not None
    (folder,) = task.folders
    files: list[FileRecord] = []
    counts = np.zeros(256, dtype=np.int64)
    for name, fasta, side in sources(train.plm):
        documents: list[Tokens] = []
        size = shard = 0
        for document in _documents(lineage, fasta, side):
            context.check_stop()
            if name == "train":
                counts += np.bincount(document, minlength=256)
            documents.append(document)
            size += len(document)
            if size >= SHARD_TOKENS:
                files.append(write_tokens(context.store, join(folder, f"{name}-{shard:05d}.bin"), documents))
                documents, size, shard = [], 0, shard + 1
        if documents or shard == 0:
            files.append(write_tokens(context.store, join(folder, f"{name}-{shard:05d}.bin"), documents))
    residues = counts[FIRST_LETTER : FIRST_LETTER + len(AMINO_ACIDS)]
    return {folder: Result(files, {"residue_counts": [int(n) for n in residues]})}


def _documents(lineage: Lineage, fasta: str, heldout: bool | None) -> Iterator[Tokens]:
    train = lineage.experiment.train
    assert train is not None
    assert train.plm is not None
    policies = _policies(lineage, fasta, 0.0 if heldout is None else train.plm.holdout)
    path = lineage.store.local(fasta)
    found = scan(path, policies)
    for i, protein in enumerate(kept_proteins(path, found, policies)):
        if heldout is None or bool(found.heldout_P[i]) == heldout:
            yield wrap(encode(protein.sequence))


def read(store: Store, folder: str, manifest: Mapping[str, Any]) -> dict[str, list[Tokens]]:
    """Set name -> its shards' tokens."""
    sets: dict[str, list[Tokens]] = {}
    for file in manifest["files"]:
        if file["name"].endswith(".bin"):
            name = file["name"].rsplit("-", 1)[0]
            sets.setdefault(name, []).append(read_tokens(store, join(folder, file["name"])))
    return sets


def unigram_entropy(residue_counts: Sequence[int]) -> float:
    """Entropy of the residues in nats: the loss of a model that knows only their frequencies."""
    total = sum(residue_counts)
    return -math.fsum(n / total * math.log(n / total) for n in residue_counts if n)
