"""The tokens of a pLM run: what a FASTA holds as `.bin` shards, or where the documents of given shards are.

Sets: `train` and `random`, the two sides of the split by the hash of the sequence, and one of each entry of
`train.plm.valid`. A set from FASTA is `<set>-*.bin`, of given shards `<set>.documents.safetensors`: they are never copied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from plmsae_cli.config.data import Embed
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.plm import PLM
from plmsae_cli.plm.alphabet import AMINO_ACIDS, FIRST_LETTER, encode, letters, wrap
from plmsae_cli.runtime.task import Context, Result, Task
from plmsae_cli.store.fs import FileRecord, Store, is_remote, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import read_manifest
from plmsae_cli.store.proteins import heldout, kept_proteins, scan, split_hash
from plmsae_cli.store.tensorfile import TensorFile, write_tensors
from plmsae_cli.store.tokens import (
    Documents,
    TokenStream,
    check_alphabet,
    count_tokens,
    find_shards,
    is_bin,
    open_tokens,
    read_tokens,
    write_tokens,
)  # fmt: skip

SHARD_TOKENS = 100_000_000
_INDEX = ".documents.safetensors"
Tokens = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Source:
    """Where a set's proteins come from."""

    name: str
    files: str | list[str]
    """A FASTA, or token shards."""
    heldout: bool | None
    """Side of the split; None for all of it."""


@dataclass(frozen=True)
class TokenSet:
    """A set's shards, mapped, and where its documents are in their stream."""

    shards: Sequence[Tokens]
    documents: Documents


def sources(plm: PLM) -> list[Source]:
    """Where each set comes from.

    Raises:
        UserError: a validation set's name cannot be the name of a file, or is that of another set.
    """
    for name in plm.valid:
        if name in ("train", "random") or not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
            raise UserError(
                f"train.plm.valid: {name!r} cannot name a validation set",
                "use lower-case letters, digits, '.', '_' and '-'; `train` and `random` are taken",
            )
    proteins = plm.fasta if plm.bin is None else plm.bin
    assert proteins is not None
    own = [Source("train", proteins, False), Source("random", proteins, True)]
    return own + [Source(name, files, None) for name, files in sorted(plm.valid.items())]


def _options(lineage: Lineage) -> PLM:
    train = lineage.experiment.train
    assert train is not None
    assert train.plm is not None
    return train.plm


def figures(lineage: Lineage) -> dict[str, Any]:
    """`proteins`, `heldout_proteins`, `tokens_per_epoch` for the plan, and how many tokens one attends to.

    Of shards not yet looked into: what their headers tell.
    """
    plm = _options(lineage)
    if plm.bin is None:
        assert plm.fasta is not None
        found = scan(lineage.store.local(plm.fasta), _policies(plm, plm.fasta, plm.holdout))
        tokens_P = found.lengths_P[~found.heldout_P].astype(np.int64) + 2
        return {
            "proteins": found.num_proteins,
            "heldout_proteins": int(found.heldout_P.sum()),
            "tokens_per_epoch": int(tokens_P.sum()),
            "mean_context": round(float((tokens_P**2).sum() / max(1, tokens_P.sum()))),
        }
    manifest = read_manifest(lineage.store, lineage.tokens().folder)
    if manifest is not None:
        known = ("proteins", "heldout_proteins", "cut_proteins", "tokens")
        return {("tokens_per_epoch" if name == "tokens" else name): manifest[name] for name in known}
    shards = find_shards(lineage.store, plm.bin)
    tokens = sum(count_tokens(lineage.store, path) for path in shards)
    fetched = sum(lineage.store.size(path) for path in shards if is_remote(path))
    return {
        "shards": len(shards),
        **({"bytes_fetched_into_the_cache": fetched} if fetched else {}),
        "proteins": "known once the shards are read",
        "heldout_proteins": f"{plm.holdout:g} of them",
        "tokens_per_epoch": max(1, int(tokens * (1 - plm.holdout))),
    }


def write(task: Task, context: Context) -> Mapping[str, Result]:
    """Work of the `tokens` task."""
    lineage = Lineage(context.experiment, context.store)
    plm = _options(lineage)
    (folder,) = task.folders
    files: list[FileRecord] = []
    facts: dict[str, Any] = {}
    counts_V = np.zeros(256, dtype=np.int64)
    for source in sources(plm):
        if not is_bin(source.files):
            own, set_counts_V = _write_shards(source, plm, context, folder)
            files += own
        elif source.name == "random":
            continue  # written beside `train`
        else:
            own, set_counts_V, found = _write_index(source, plm, context, folder)
            files += own
            facts |= found if source.name == "train" else {}
        counts_V += set_counts_V if source.name == "train" else 0
    residues = counts_V[FIRST_LETTER : FIRST_LETTER + len(AMINO_ACIDS)]
    return {folder: Result(files, {**facts, "residue_counts": [int(n) for n in residues]})}


def _write_shards(source: Source, plm: PLM, context: Context, folder: str) -> tuple[list[FileRecord], Any]:
    """Shards of a FASTA's proteins, and how often each token occurs."""
    files: list[FileRecord] = []
    counts_V = np.zeros(256, dtype=np.int64)
    documents: list[Tokens] = []
    size = shard = 0
    for document in _documents(source, plm, context.store):
        context.check_stop()
        counts_V += np.bincount(document, minlength=256)
        documents.append(document)
        size += len(document)
        if size >= SHARD_TOKENS:
            files.append(write_tokens(context.store, join(folder, f"{source.name}-{shard:05d}.bin"), documents))
            documents, size, shard = [], 0, shard + 1
    if documents or shard == 0:
        files.append(write_tokens(context.store, join(folder, f"{source.name}-{shard:05d}.bin"), documents))
    return files, counts_V


def _policies(plm: PLM, fasta: str, holdout: float) -> Embed:
    """How a pLM's FASTA is read: doubles and empty records are dropped, odd letters are X."""
    length = plm.max_length
    return Embed(fasta=fasta, layers=[0], max_length=length, duplicates="first", empty="skip", holdout=holdout)


def _documents(source: Source, plm: PLM, store: Store) -> Iterator[Tokens]:
    assert isinstance(source.files, str)
    policies = _policies(plm, source.files, 0.0 if source.heldout is None else plm.holdout)
    path = store.local(source.files)
    found = scan(path, policies)
    for i, protein in enumerate(kept_proteins(path, found, policies)):
        if source.heldout is None or bool(found.heldout_P[i]) == source.heldout:
            yield wrap(encode(protein.sequence))


def _write_index(
    source: Source, plm: PLM, context: Context, folder: str
) -> tuple[list[FileRecord], Any, dict[str, Any]]:
    """Where the documents of given shards are, on which side of the split, and what the manifest says of them."""
    paths = find_shards(context.store, source.files)
    shards: list[Tokens] = []
    counts_V = np.zeros(256, dtype=np.int64)
    for done, path in enumerate(paths):
        context.check_stop()
        context.progress(done, len(paths))
        shards.append(open_tokens(context.store, path))
        check_alphabet(shards[-1], path)
        counts_V += np.bincount(shards[-1], minlength=256)
    stream = TokenStream(shards)
    documents = stream.documents()
    if not len(documents.length_P):
        raise UserError(f"train.plm: {paths[0]} and what follows it hold no residues", "name other shards")
    held_P = np.zeros(len(documents.length_P), dtype=bool)
    if source.heldout is not None and plm.holdout > 0:
        held_P = heldout(_hashes(stream, documents, context), plm.holdout)
    kept, held = documents.some(~held_P), documents.some(held_P)
    files = [_write_documents(context.store, folder, source.name, kept)]
    if source.heldout is not None:
        files.append(_write_documents(context.store, folder, "random", held))
        for first, length in zip(*held, strict=True):
            counts_V -= np.bincount(stream.read(int(first), int(length)), minlength=256)
    facts = {
        "shards": len(paths),
        "proteins": len(held_P),
        "heldout_proteins": int(held_P.sum()),
        "cut_proteins": int((kept.length_P > plm.max_length).sum()),
        "tokens": int((np.minimum(kept.length_P, plm.max_length) + 2).sum()),
    }
    return files, counts_V, facts


def _hashes(stream: TokenStream, documents: Documents, context: Context) -> npt.NDArray[np.uint64]:
    """The hash of each sequence, as that of the same protein in a FASTA."""
    hashes_P = np.empty(len(documents.length_P), dtype=np.uint64)
    for p, (first, length) in enumerate(zip(*documents, strict=True)):
        if p % 65_536 == 0:
            context.check_stop()
        hashes_P[p] = split_hash(letters(stream.read(int(first), int(length))))
    return hashes_P


def _write_documents(store: Store, folder: str, name: str, documents: Documents) -> FileRecord:
    import torch

    tensors = {"first": torch.from_numpy(documents.first_P), "length": torch.from_numpy(documents.length_P)}
    return write_tensors(store, join(folder, name + _INDEX), tensors)


def read(store: Store, folder: str, manifest: Mapping[str, Any], plm: PLM) -> dict[str, TokenSet]:
    """Set name -> its shards and documents; given shards are looked for where they are now."""
    files_of = {source.name: source.files for source in sources(plm)}
    sets: dict[str, TokenSet] = {}
    own: dict[str, list[Tokens]] = {}
    for file in manifest["files"]:
        if file["name"].endswith(_INDEX):
            name = file["name"].removesuffix(_INDEX)
            index = TensorFile(store, join(folder, file["name"]))
            documents = Documents(index.read("first").numpy(), index.read("length").numpy())
            paths = find_shards(store, files_of[name])
            sets[name] = TokenSet([open_tokens(store, path) for path in paths], documents)
        elif file["name"].endswith(".bin"):
            own.setdefault(file["name"].rsplit("-", 1)[0], []).append(read_tokens(store, join(folder, file["name"])))
    return sets | {name: TokenSet(shards, TokenStream(shards).documents()) for name, shards in own.items()}


def unigram_entropy(residue_counts: Sequence[int]) -> float:
    """Entropy of the residues in nats: the loss of a model that knows only their frequencies."""
    total = sum(residue_counts)
    return -math.fsum(n / total * math.log(n / total) for n in residue_counts if n)
