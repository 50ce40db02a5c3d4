"""Clusters of similar proteins, and halves that no cluster straddles. P: proteins, R: representatives."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.split import split_hash

SHOWN = {"mmseqs": "MMseqs2 cluster", "kmer": "5-mer cluster"}
"""What people are told that halves were cut by."""
IDENTITY, COVERAGE = 0.3, 0.8
KMER = 5
SHARED = 0.1
"""Share of the shorter protein's 5-mers found in a representative that makes it a member."""


def choose_method(wanted: str) -> str:
    """`mmseqs` or `kmer`, as wanted; `auto` is MMseqs2 where the program is installed.

    Raises:
        UserError: `mmseqs` is wanted and not installed.
    """
    installed = shutil.which("mmseqs") is not None
    if wanted == "mmseqs" and not installed:
        raise UserError("clusters: mmseqs is not installed", "install MMseqs2, or set clusters: kmer")
    return wanted if wanted != "auto" else ("mmseqs" if installed else "kmer")


def cluster(sequences: Sequence[str], method: str) -> npt.NDArray[np.int64]:
    """For each protein the place of its cluster's representative [P].

    `mmseqs`: MMseqs2 (Steinegger and Soeding 2017), 30 % identity over 80 % of both proteins. `kmer`: greedy, longest first;
    a protein joins the representative that shares most of its distinct 5-mers, the first of equals, if that is at least a
    tenth of them: a rough stand-in that finds close relatives only. A protein that is not known (an empty sequence) is a
    cluster of its own.
    """
    return _mmseqs(sequences) if method == "mmseqs" else _kmer(sequences)


def _mmseqs(sequences: Sequence[str]) -> npt.NDArray[np.int64]:
    with tempfile.TemporaryDirectory() as folder:
        fasta = Path(folder) / "in.fasta"
        fasta.write_text("".join(f">{index}\n{text}\n" for index, text in enumerate(sequences) if text))
        command = ["mmseqs", "easy-cluster", str(fasta), f"{folder}/out", f"{folder}/tmp"]
        command += ["--min-seq-id", str(IDENTITY), "-c", str(COVERAGE), "-v", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UserError(f"mmseqs failed: {(done.stderr or done.stdout).strip()[-300:]}", "set clusters: kmer")
        cluster_P = np.arange(len(sequences), dtype=np.int64)
        for line in Path(f"{folder}/out_cluster.tsv").read_text().splitlines():
            representative, member = line.split("\t")
            cluster_P[int(member)] = int(representative)
    return cluster_P


def _kmer(sequences: Sequence[str]) -> npt.NDArray[np.int64]:
    cluster_P = np.arange(len(sequences), dtype=np.int64)
    representatives: list[int] = []
    holders: defaultdict[str, array[int]] = defaultdict(lambda: array("i"))
    for place in sorted(range(len(sequences)), key=lambda p: (-len(sequences[p]), split_hash(sequences[p]), p)):
        sequence = sequences[place]
        if not sequence:
            continue
        words = {sequence[i : i + KMER] for i in range(max(1, len(sequence) - KMER + 1))}
        # Bytes of many lists joined are numbers at once: of half a million proteins thousands share a word with each.
        found = b"".join(holders[word] for word in words if word in holders)
        shared_R = np.bincount(np.frombuffer(found, dtype=np.intc))
        if len(shared_R) and shared_R.max() >= SHARED * len(words):
            cluster_P[place] = representatives[int(shared_R.argmax())]
            continue
        for word in words:
            holders[word].append(len(representatives))
        representatives.append(place)
    return cluster_P


def halves(
    cluster_P: npt.NDArray[np.int64],
    hashes_P: npt.NDArray[np.uint64],
    sizes_P: npt.NDArray[np.int64],
    share: float = 0.5,
) -> npt.NDArray[np.bool_]:
    """Which proteins are on the second side: whole clusters, about `share` of the summed sizes.

    Clusters come in the order of the smallest hash among their members, so the result does not depend on the order of the
    proteins; each goes to the side that is further behind its share.
    """
    names, member_P = np.unique(cluster_P, return_inverse=True)
    first_G = np.full(len(names), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(first_G, member_P, hashes_P)
    size_G = np.bincount(member_P, weights=sizes_P).astype(np.int64)
    second_G = np.zeros(len(names), dtype=bool)
    filled = [0, 0]
    for group in np.argsort(first_G, kind="stable"):
        side = int(filled[0] * share > filled[1] * (1 - share))
        second_G[group] = bool(side)
        filled[side] += int(size_G[group])
    return second_G[member_P]
