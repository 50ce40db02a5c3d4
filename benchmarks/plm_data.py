"""Proteins for the benchmarks of language models, without an artifact on disk."""

from __future__ import annotations

import lzma
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from plmsae_cli.plm.alphabet import encode, wrap
from plmsae_cli.store.fasta import records


def proteins(path: Path) -> list[str]:
    """Sequences of a FASTA file: plain, gzip or xz."""
    if path.suffix != ".xz":
        return [sequence for _, _, sequence in records(path) if sequence]
    with tempfile.NamedTemporaryFile(suffix=".fasta") as plain, lzma.open(path) as packed:
        while block := packed.read(1 << 24):
            plain.write(block)
        plain.flush()
        return [sequence for _, _, sequence in records(Path(plain.name)) if sequence]


def stream(sequences: list[str], max_length: int) -> list[npt.NDArray[np.uint8]]:
    return [np.concatenate([wrap(encode(sequence[:max_length])) for sequence in sequences])]
