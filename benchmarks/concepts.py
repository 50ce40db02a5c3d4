"""The concept test of 20,480 latents, 476 concepts and 5 thresholds on this machine's device, and its counting beside InterPLM's.

    python benchmarks/concepts.py [--device cuda] [--residues 10_000_000] [--threads 2] [--interplm PATH] [--check]

On a GPU 10 M residues; on a CPU a tenth of them. Labels are synthetic, of Swiss-Prot's density: helices, strands, turns, domains,
regions and sites, each of the labelled kinds with a label of Zipf's frequencies besides its `any`. 64 latents
are active a residue. Counting is of both halves of the proteins; the choice on validation and the second pass over test proteins
(precision, recall, histograms for the ranking curves) are timed as well. Needs torch and numpy alone, and no files.

`--check` first counts 50,000 residues on the device, on the CPU, and by products of whole matrices, and compares all counts.
With `--interplm`, a checkout of github.com/ElanaPearl/InterPLM, its `calc_metrics_sparse` counts 20,000 residues of the same
kind for the first of its 40 groups of 512 latents. Its loop goes over groups, so its time is multiplied by their number; it is
not multiplied by the residues left out, so the figure is a lower bound. Both sides' counts of that group are compared.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import HERE, add, cpu, stamp

from plmsae_cli.evaluation.concepts.choice import choose
from plmsae_cli.evaluation.concepts.counts import THRESHOLDS, Counts
from plmsae_cli.evaluation.concepts.labelling import Labelled, instance_ranks, totals
from plmsae_cli.evaluation.concepts.scoring import PairScores
from plmsae_cli.evaluation.concepts.vocabulary import Concept, Labels
from plmsae_cli.evaluation.proteins import groups
from plmsae_cli.evaluation.rows import group_residues
from plmsae_cli.runtime.peak import peak_memory
from plmsae_cli.sae.interface import Latents

LATENTS, K, GROUP = 20_480, 64, 512
# Kind, labels, residues of an instance, instances a protein of 300 residues, recall by residue.
KINDS = [
    ("Helix", 0, 11, 4.0, False), ("Beta strand", 0, 6, 4.0, False), ("Turn", 0, 3, 1.0, False),
    ("Domain", 199, 110, 0.9, False), ("Region", 80, 50, 0.8, False), ("Motif", 40, 8, 0.15, False),
    ("Binding site", 60, 2, 1.5, False), ("Modified residue", 50, 1, 1.2, True), ("Glycosylation", 10, 1, 0.5, True),
    ("Active site", 12, 1, 0.3, True), ("Zinc finger", 13, 24, 0.1, False), ("Disulfide bond", 0, 1, 0.5, True),
]  # fmt: skip


@dataclass
class Data:
    """Synthetic proteins and their labels."""

    labelled: Labelled
    concepts: list[Concept]
    lengths: list[int]
    num_latents: int


def synthetic(residues: int, num_latents: int = LATENTS) -> Data:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.6, 0.6, residues // 200), 30, 1022).astype(np.int64)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), residues)) + 1]
    concepts: list[Concept] = []
    rows = []
    instance = 0
    for kind, labels, size, rate, by_residue in KINDS:
        first = len(concepts)
        concepts += [Concept(f"{kind}: {i}", kind, by_residue) for i in range(labels)] + [
            Concept(kind, kind, by_residue)
        ]
        number = rng.poisson(rate * lengths / 300)
        protein = np.repeat(np.arange(len(lengths)), number)
        length = lengths[protein]
        span = np.minimum(np.maximum(1, rng.poisson(size, len(protein))) if size > 1 else np.ones_like(protein), length)
        start = (rng.random(len(protein)) * (length - span + 1)).astype(np.int64)
        chosen = [np.full(len(protein), first + labels)]
        if labels:
            weight = 1 / np.arange(1, labels + 1)
            chosen.append(first + rng.choice(labels, len(protein), p=weight / weight.sum()))
        for concept in chosen:
            rows.append(np.stack([protein, concept, start, start + span, instance + np.arange(len(protein))], 1))
            instance += len(protein)
    assert len(concepts) == 476
    table = np.concatenate(rows)
    found = Labels(tuple(concepts), *(table[:, i].copy() for i in range(5)))
    hashes = np.arange(len(lengths), dtype=np.uint64)
    sequences = ["A" * int(length) for length in lengths]
    return Data(Labelled(found, sequences, hashes, amino_acids=False), concepts, lengths.tolist(), num_latents)


def latents(rows: int, generator: torch.Generator, device: torch.device, num_latents: int = LATENTS) -> Latents:
    """K distinct latents a residue, some much more frequent than others."""
    stride = num_latents // K
    within = (stride * torch.rand(rows, K, generator=generator, device=device) ** 3).long()
    index = torch.arange(K, device=device) * stride + within
    acts = -torch.log(torch.rand(rows, K, generator=generator, device=device)) / 8
    return Latents(acts, index)


@dataclass
class Run:
    """What the test of a data set took, in seconds, and its counts of both halves."""

    counted: list[Counts]
    count: float
    choose: float
    score: float


class Clock:
    """Seconds spent between `begin` and `end`, the device waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def begin(self) -> None:
        _wait(self.device)
        self.begun = time.perf_counter()

    def end(self) -> None:
        _wait(self.device)
        self.seconds += time.perf_counter() - self.begun


def batches(data: Data, half: int, group: int, device: torch.device) -> Iterator[tuple[list[int], list[int], Latents]]:
    """Places in the half, proteins and latents of its batches: every other protein, the same latents at every call."""
    mine = list(range(half, len(data.lengths), 2))
    generator = torch.Generator(device=device).manual_seed(half)
    for places in groups([data.lengths[p] for p in mine], group):
        proteins = [mine[place] for place in places]
        yield places, proteins, latents(sum(data.lengths[p] for p in proteins), generator, device, data.num_latents)


def ours(data: Data, device: torch.device, group: int) -> Run:
    """The concept test: labels are spread over residues inside the clock, latents are at hand."""
    instance = sum(not c.by_residue for c in data.concepts)
    maximum = torch.ones(data.num_latents, device=device)
    counted = []
    clock = Clock(device)
    for half in (0, 1):
        counts = Counts(data.num_latents, len(data.concepts), instance, device)
        for _, proteins, made in batches(data, half, group, device):
            clock.begin()
            counts.add(made, maximum, data.labelled.batch(proteins, device))
            clock.end()
        clock.begin()
        counted.append(counts.at_least())
        clock.end()
    choosing, scoring = Clock(device), Clock(device)
    choosing.begin()
    rank_C = torch.from_numpy(instance_ranks(data.concepts))
    by_half = [totals(data.labelled, list(range(half, len(data.lengths), 2))) for half in (0, 1)]
    total_CH = torch.from_numpy(np.stack([np.where(rank_C >= 0, t[1], t[0]) for t in by_half], 1)).to(device)
    fired_HNT = torch.stack([counts.fired_NT for counts in counted])
    best = choose(_chunks(counted, rank_C.tolist()), fired_HNT, total_CH, torch.ones(len(data.concepts)))
    choosing.end()
    test = list(range(1, len(data.lengths), 2))
    pairs = PairScores(best.latent_C, best.threshold_C, maximum, rank_C, len(test))
    length_P = torch.tensor([data.lengths[p] for p in test])
    for places, proteins, made in batches(data, 1, group, device):
        scoring.begin()
        place_G = torch.tensor(places)
        owner_R = place_G.repeat_interleave(length_P[place_G]).to(device)
        pairs.add(made, data.labelled.batch(proteins, device), owner_R)
        scoring.end()
    hits_C = pairs.table_P4C[:, 0].sum(0)
    every_C = torch.arange(len(data.concepts), device=device)
    frozen = best.latent_C.to(device), best.threshold_C.to(device)
    assert torch.equal(hits_C, counted[1].hits_CNT[every_C, frozen[0], frozen[1]]), "both passes agree"
    return Run(counted, clock.seconds, choosing.seconds, scoring.seconds)


def _chunks(counted: list[Counts], rank: list[int]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """What `choose` reads, 16 concepts at a time."""
    for first in range(0, len(rank), 16):
        last = min(first + 16, len(rank))
        hits = torch.stack([counts.hits_CNT[first:last] for counts in counted], 1)
        found = hits.clone()
        for c in range(first, last):
            if rank[c] >= 0:
                found[c - first] = torch.stack([counts.instances_CNT[rank[c]] for counts in counted])
        yield first, hits, found


def check(device: torch.device) -> None:
    """Compare the device's counts of 50,000 residues with the CPU's, and those of 512 latents with matrix products."""
    data = synthetic(50_000)
    instance = sum(not c.by_residue for c in data.concepts)
    generator = torch.Generator().manual_seed(1)
    here, there = (Counts(LATENTS, len(data.concepts), instance, where) for where in (device, "cpu"))
    tile = Counts(GROUP, len(data.concepts), instance, "cpu")
    for places in groups(data.lengths, 4096):
        made = latents(sum(data.lengths[p] for p in places), generator, torch.device("cpu"))
        moved = Latents(made.acts_BK.to(device), made.indices_BK.to(device))
        here.add(moved, torch.ones(LATENTS, device=device), data.labelled.batch(places, device))
        labels = data.labelled.batch(places, "cpu")
        there.add(made, torch.ones(LATENTS), labels)
        tile.add(made, torch.ones(LATENTS), labels)  # one active latent in eight: counted by products
    for counts in (here, there, tile):
        counts.at_least()
    for name in ("hits_CNT", "instances_CNT", "fired_NT"):
        assert torch.equal(getattr(here, name).cpu(), getattr(there, name)), f"{name} of {device} are the CPU's"
        some = getattr(there, name)[..., :GROUP, :]
        assert torch.equal(getattr(tile, name), some), f"{name} of products are those of lists"
    print(f"counts of {device}, of the CPU, and by products are equal: {int(there.hits_CNT.sum()):,} hits")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def theirs(path: Path, data: Data, group: int) -> tuple[float, bool]:
    """Seconds of InterPLM's function on the first group of latents, and whether its counts are ours."""
    from scipy import sparse

    # The module imports loaders of theirs, and with these packages that counting does not use.
    for name, members in (
        ("interplm.sae.dictionary", ["Dictionary"]), ("interplm.sae.inference", ["get_sae_feats_in_batches", "load_sae"]),
        ("interplm.data_processing.embedding_loader", ["load_shard_embeddings"]),
    ):  # fmt: skip
        module = types.ModuleType(name)
        for member in members:
            setattr(module, member, None)
        sys.modules[name] = module
    sys.path.insert(0, str(path))
    module_: Any = importlib.import_module("interplm.analysis.concepts.compare_activations")

    generator = torch.Generator().manual_seed(0)
    features, rows, columns, names = [], [], [], []
    offset = 0
    instance = sum(not c.by_residue for c in data.concepts)
    counts = Counts(GROUP, len(data.concepts), instance, "cpu")
    for places in groups(data.lengths, group):
        count = sum(data.lengths[p] for p in places)
        made = latents(count, generator, torch.device("cpu"))
        inside = made.indices_BK < GROUP
        dense = torch.zeros(count, GROUP).scatter_reduce(
            1, made.indices_BK.where(inside, 0), made.acts_BK.where(inside, 0.0), "amax"
        )
        features.append(sparse.csr_matrix(dense.numpy()))
        row, column, name = data.labelled.pairs(places, rotated=False)
        rows.append(row + offset)
        columns.append(column)
        names.append(name + 1)
        counts.add(made, torch.ones(LATENTS), data.labelled.batch(places, "cpu"))
        offset += count
    row, column, name = (np.concatenate(parts) for parts in (rows, columns, names))
    _, first = np.unique(row * len(data.concepts) + column, return_index=True)  # a matrix has one instance a cell
    labels = sparse.csr_matrix((name[first], (row[first], column[first])), shape=(offset, len(data.concepts)))
    by_residue = [concept.by_residue for concept in data.concepts]
    matrix = sparse.vstack(features).tocsr()
    begun = time.perf_counter()
    tp, fp, _ = module_.calc_metrics_sparse(matrix, labels, list(THRESHOLDS), by_residue)
    spent = time.perf_counter() - begun
    counts.at_least()
    hits = counts.hits_CNT.double().numpy()
    same = bool((tp == hits).all() and (tp + fp == counts.fired_NT.double().numpy()[None]).all())
    return spent, same


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], help="by default a GPU where there is one")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--residues", type=int)
    parser.add_argument("--latents", type=int, default=LATENTS, help="less for a quick try")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--interplm", type=Path)
    parser.add_argument("--their-residues", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.check:
        check(device)
    residues = options.residues or (10_000_000 if device.type == "cuda" else 1_000_000)
    where = torch.cuda.get_device_name() if device.type == "cuda" else cpu(options.threads)
    line = stamp("concepts", where, f"python benchmarks/concepts.py{' --interplm PATH' if options.interplm else ''}")
    data = synthetic(residues, options.latents)
    entries = int((data.labelled.stop_M - data.labelled.start_M).sum())
    load = os.getloadavg()[0]
    if device.type == "cuda":  # kernels are loaded before the clock starts
        ours(synthetic(200_000, options.latents), device, group_residues(device))
        torch.cuda.reset_peak_memory_stats()
    run = ours(data, device, group_residues(device))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()
    size = 2 * Counts.bytes(options.latents, len(data.concepts), run.counted[0].instances_CNT.shape[0])
    shape = f"{sum(data.lengths):,} residues, {options.latents:,} latents, {K} active, {len(data.concepts)} concepts"
    note = (
        f"{shape}, {len(THRESHOLDS)} thresholds, {entries / sum(data.lengths):.2f} labels a residue; counts {size / 1e9:.2f} GB,"
        f" peak {peak / 1e9:.2f} GB, load {load:.1f}"
    )
    name = "eval/concepts" if device.type == "cuda" else "eval/concepts-cpu"
    whole = run.count + run.choose + run.score
    parts = f"counting {run.count:.1f} s, choice {run.choose:.1f} s, second pass over test proteins {run.score:.1f} s"
    lines = [
        {"name": name, "who": "plmsae", "value": round(run.count, 2), "unit": "s", **line, "note": note},
        {"name": name, "who": "plmsae, whole test", "value": round(whole, 2), "unit": "s", **line, "note": parts},
    ]
    print(*lines, sep="\n")
    if options.interplm:
        part = synthetic(options.their_residues)
        their, same = theirs(options.interplm, part, 8192)
        least = their * (LATENTS // GROUP)
        note = (
            f"at least: calc_metrics_sparse took {their:.1f} s for {GROUP} latents and {sum(part.lengths):,} residues, times"
            f" {LATENTS // GROUP} groups; its hits and false positives {'are' if same else 'ARE NOT'} ours"
        )
        lines.append({"name": name, "who": "InterPLM", "value": round(least, 1), "unit": "s", **line, "note": note})
        print(lines[-1], "ratio at least", least / run.count)
    add(options.out, lines)


if __name__ == "__main__":
    main()
