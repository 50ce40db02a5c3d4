"""Counting 20,480 latents against 476 concepts at 5 thresholds: the one pass on this machine's device, and beside InterPLM's.

    python benchmarks/concepts.py [--residues 10_000_000] [--threads 2] [--interplm PATH]

On a GPU 10 M residues; on a CPU a tenth of them. Labels are synthetic, of Swiss-Prot's density: helices, strands, turns, domains,
regions and sites, each of the labelled kinds with a label of Zipf's frequencies besides its `any`. 64 latents
are active a residue.
With `--interplm`, a checkout of github.com/ElanaPearl/InterPLM, its `calc_metrics_sparse` counts 20,000 residues of the same
kind for the first of its 40 groups of 512 latents. Its loop goes over groups, so its time is multiplied by their number; it is
not multiplied by the residues left out, so the figure is a lower bound. Both sides' counts of that group are compared.
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import HERE, add, cpu, stamp

from plmsae_cli.evaluation.concepts.counts import THRESHOLDS, Counts
from plmsae_cli.evaluation.concepts.labelling import Labelled
from plmsae_cli.evaluation.concepts.vocabulary import Concept, Labels
from plmsae_cli.evaluation.proteins import groups
from plmsae_cli.evaluation.rows import group_residues
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


def synthetic(residues: int) -> Data:
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
    return Data(Labelled(found, sequences, hashes, amino_acids=False), concepts, lengths.tolist())


def latents(rows: int, generator: torch.Generator, device: torch.device) -> Latents:
    """K distinct latents a residue, some much more frequent than others."""
    stride = LATENTS // K
    within = (stride * torch.rand(rows, K, generator=generator, device=device) ** 3).long()
    index = torch.arange(K, device=device) * stride + within
    acts = -torch.log(torch.rand(rows, K, generator=generator, device=device)) / 8
    return Latents(acts, index)


def ours(data: Data, device: torch.device, group: int) -> tuple[Counts, float]:
    """The counts, and the seconds that counting took; labels are spread over residues inside, latents are at hand."""
    instance = sum(not c.by_residue for c in data.concepts)
    counts = Counts(LATENTS, len(data.concepts), instance, device)
    maximum = torch.ones(LATENTS, device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    spent = 0.0
    for places in groups(data.lengths, group):
        made = latents(sum(data.lengths[p] for p in places), generator, device)
        _wait(device)
        begun = time.perf_counter()
        counts.add(made, maximum, data.labelled.batch(places, device))
        _wait(device)
        spent += time.perf_counter() - begun
    begun = time.perf_counter()
    counts.at_least()
    _wait(device)
    return counts, spent + time.perf_counter() - begun


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
    parser.add_argument("--residues", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--interplm", type=Path)
    parser.add_argument("--their-residues", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    residues = options.residues or (10_000_000 if device.type == "cuda" else 1_000_000)
    where = torch.cuda.get_device_name() if device.type == "cuda" else cpu(options.threads)
    line = stamp("concepts", where, f"python benchmarks/concepts.py{' --interplm PATH' if options.interplm else ''}")
    data = synthetic(residues)
    entries = int((data.labelled.stop_M - data.labelled.start_M).sum())
    load = os.getloadavg()[0]
    if device.type == "cuda":  # kernels are loaded before the clock starts
        ours(synthetic(200_000), device, group_residues(device))
        torch.cuda.reset_peak_memory_stats()
    counts, spent = ours(data, device, group_residues(device))
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    size = Counts.bytes(LATENTS, len(data.concepts), counts.instances_CNT.shape[0])
    shape = f"{sum(data.lengths):,} residues, {LATENTS:,} latents, {K} active, {len(data.concepts)} concepts"
    note = (
        f"{shape}, {len(THRESHOLDS)} thresholds, {entries / sum(data.lengths):.2f} labels a residue; counts {size / 1e9:.2f} GB,"
        f" peak {peak / 1e9:.2f} GB, load {load:.1f}"
    )
    name = "eval/concepts" if device.type == "cuda" else "eval/concepts-cpu"
    lines = [{"name": name, "who": "plmsae", "value": round(spent, 2), "unit": "s", **line, "note": note}]
    print(lines[-1])
    if options.interplm:
        part = synthetic(options.their_residues)
        their, same = theirs(options.interplm, part, 8192)
        least = their * (LATENTS // GROUP)
        note = (
            f"at least: calc_metrics_sparse took {their:.1f} s for {GROUP} latents and {sum(part.lengths):,} residues, times"
            f" {LATENTS // GROUP} groups; its hits and false positives {'are' if same else 'ARE NOT'} ours"
        )
        lines.append({"name": name, "who": "InterPLM", "value": round(least, 1), "unit": "s", **line, "note": note})
        print(lines[-1], "ratio at least", least / spent)
    add(options.out, lines)


if __name__ == "__main__":
    main()
