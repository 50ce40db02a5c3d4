"""Collecting the examples of 20,480 latents from sparse codes: time by number of tokens, peak memory, and InterPLM's beside it.

    python benchmarks/features.py [--tokens 500_000 1_000_000] [--device cpu] [--threads 1] [--interplm PATH]

On a GPU 5, 10 and 20 M tokens. 64 latents are active a token, codes are at hand: both passes are timed without reading
activations and without the encoder. Ours keeps for each latent the 20 strongest residues and 50 random ones of each of four
bands, one a protein, with activations along the proteins and what fires beside, and the counts of latents.parquet.
With `--interplm`, a checkout of github.com/ElanaPearl/InterPLM, its PerProteinActivationTracker gets the same codes as the
dense matrices it takes, made before the clock starts, 200 latents and a protein's rows of them at a time as its loop does;
it keeps for each latent 20 proteins by their strongest residue, and no position. It sees fewer tokens, and its time is
linear in them; the 20 proteins of both sides are compared.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import resource
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import HERE, add, cpu, stamp

from plmsae_cli.evaluation.features.gather import fires_along, fires_beside
from plmsae_cli.evaluation.features.job import LISTS
from plmsae_cli.evaluation.features.merge import sampled
from plmsae_cli.evaluation.features.reading import Active, Side, active_pairs
from plmsae_cli.evaluation.features.select import Selection

LATENTS, K, TOP, RANDOM, CHUNK = 20_480, 64, 20, 50, 200


class Made(Side):
    """Proteins of random lengths, with rows that nobody stores."""

    def __init__(self, tokens: int) -> None:
        rng = np.random.default_rng(0)
        lengths = np.clip(rng.lognormal(5.6, 0.6, tokens // 100), 30, 1022).astype(np.int64)
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens)) + 1]
        self.rows = int(lengths.sum())
        self.__dict__["_places"] = (np.cumsum(lengths) - lengths, lengths)
        self.__dict__["letter_R"] = rng.integers(0, 20, self.rows).astype(np.uint8)


def codes(batch: int, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """K distinct latents a token, some much more frequent than others; a function of the batch's number."""
    generator = torch.Generator(device=device).manual_seed(batch)
    stride = LATENTS // K
    within = (stride * torch.rand(rows, K, generator=generator, device=device) ** 3).long()
    index = torch.arange(K, device=device) * stride + within
    acts = -torch.log(torch.rand(rows, K, generator=generator, device=device))
    return (acts / 8).clamp(min=1e-6), index


class Clock:
    """Seconds spent inside `with`: on a CPU those of the processor, so that other processes do not count."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.spent = device, 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    def __enter__(self) -> None:
        self._begun = self._now()

    def __exit__(self, *error: object) -> None:
        self.spent += self._now() - self._begun


def ours(side: Made, device: torch.device, batch_rows: int) -> tuple[float, float, Selection]:
    """Seconds of the first pass and of the second."""
    widths = torch.tensor([TOP] + [RANDOM] * (LISTS - 1), device=device)
    selection = Selection(0, LATENTS, torch.ones(LATENTS, device=device), widths, distinct=True)
    first, second = Clock(device), Clock(device)
    starts = range(0, side.rows, batch_rows)

    def batches() -> Any:
        for number, start in enumerate(starts):
            rows = min(batch_rows, side.rows - start)
            yield start, rows, codes(number, rows, device)

    for start, rows, made in batches():
        with first:
            about = side.about(start, start + rows).to(device)
            selection.add(Active(start, rows, *active_pairs(*made)), about, about.protein_B)
    with first:
        entries = selection.lists.entries()
        latent_C = entries.list_C // LISTS
        pair_X = torch.unique(entries.owner_C * LATENTS + latent_C)
        sampled_C = sampled(entries.place_C, latent_C)
        sampled_C = sampled_C[entries.row_C[sampled_C].argsort(stable=True)]
        row_S, latent_S = entries.row_C[sampled_C], latent_C[sampled_C]
    for start, rows, made in batches():
        with second:
            about = side.about(start, start + rows).to(device)
            batch = Active(start, rows, *active_pairs(*made))
            for column in (*fires_along(batch, about, pair_X, LATENTS), *fires_beside(batch, row_S, latent_S)):
                column.cpu()
    return first.spent, second.spent, selection


def theirs(path: Path, side: Made, batch_rows: int, selection: Selection) -> tuple[float, float]:
    """Seconds of their tracker on all latents, and the share of latents whose strongest proteins are ours."""
    # The module imports loaders of theirs, and with these packages that collecting does not use.
    for name, members in (
        ("interplm.sae.dictionary", ["Dictionary"]), ("interplm.utils", ["get_device"]),
        ("interplm.sae.inference", ["get_sae_feats_in_batches", "split_up_feature_list"]),
        ("interplm.data_processing.embedding_loader", ["load_shard_embeddings"]),
        ("pandas", ["Series"]), ("tqdm", ["tqdm"]),
    ):  # fmt: skip
        if name.startswith("interplm") or importlib.util.find_spec(name) is None:
            module = types.ModuleType(name)
            for member in members:
                setattr(module, member, None)
            sys.modules[name] = module
    sys.path.insert(0, str(path))
    tracking: Any = importlib.import_module("interplm.analysis.per_protein_tracking")
    tracker = tracking.PerProteinActivationTracker(LATENTS, n_top=TOP)
    dense = torch.zeros(side.rows, LATENTS)
    for number, start in enumerate(range(0, side.rows, batch_rows)):
        rows = min(batch_rows, side.rows - start)
        acts, index = codes(number, rows, torch.device("cpu"))
        dense[start : start + rows].scatter_(1, index, acts)
    ends = zip(side.offset_P.tolist(), side.length_P.tolist(), strict=True)
    places = {protein: list(range(offset, offset + length)) for protein, (offset, length) in enumerate(ends)}
    clock = Clock(torch.device("cpu"))
    for first in range(0, LATENTS, CHUNK):
        chunk = dense[:, first : first + CHUNK].contiguous()
        latents = list(range(first, first + chunk.shape[1]))
        for protein, rows_of_it in places.items():
            with clock:
                tracker.update(chunk[rows_of_it].cpu().numpy(), protein, latents)
    entries = selection.lists.entries().cpu()
    top_C = entries.list_C % LISTS == 0
    mine: list[set[int]] = [set() for _ in range(LATENTS)]
    for latent, protein in zip((entries.list_C[top_C] // LISTS).tolist(), entries.owner_C[top_C].tolist(), strict=True):
        mine[latent].add(protein)
    same = sum({protein for _, protein in heap} == mine[latent] for latent, heap in enumerate(tracker.max_heap))
    return clock.spent, same / LATENTS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--interplm", type=Path)
    parser.add_argument("--their-tokens", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    tokens = options.tokens or ([5_000_000, 10_000_000, 20_000_000] if on_gpu else [250_000, 500_000, 1_000_000])
    where = torch.cuda.get_device_name(device) if on_gpu else cpu(options.threads)
    asked = f"--tokens {' '.join(map(str, tokens))}"
    if options.interplm:
        asked += f" --interplm PATH --their-tokens {options.their_tokens}"
    line = stamp("features", where, f"python benchmarks/features.py {asked}")
    batch_rows = 65_536 if on_gpu else 8192
    name = "features/collect" if on_gpu else "features/collect-cpu"
    if on_gpu:  # kernels are loaded before the clock starts
        ours(Made(200_000), device, batch_rows)
    lines: list[dict[str, Any]] = []
    for number in tokens:
        side = Made(number)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        first, second, selection = ours(side, device, batch_rows)
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        gpu = f", GPU {torch.cuda.max_memory_allocated() / 1e9:.2f} GB" if on_gpu else ""
        note = (
            f"{side.rows:,} tokens, {LATENTS:,} latents, {K} active; first pass {first:.1f} s, second {second:.1f} s; peak of the"
            f" process {host / 1e9:.2f} GB{gpu}, load {os.getloadavg()[0]:.1f}"
        )
        value = round(side.rows / (first + second))
        who = "plmsae" if number == tokens[-1] else f"plmsae ({side.rows:,} tokens)"
        lines.insert(0, {"name": name, "who": who, "value": value, "unit": "tokens/s", **line, "note": note})
        print(lines[0])
    if options.interplm:
        side = Made(options.their_tokens)
        *_, selection = ours(side, torch.device("cpu"), 8192)
        spent, same = theirs(options.interplm, side, 8192, selection)
        note = (
            f"PerProteinActivationTracker, {side.rows:,} tokens in {spent:.1f} s, without making its dense matrices; the"
            f" strongest proteins are ours for {same:.1%} of the latents"
        )
        value = round(side.rows / spent)
        lines.append({"name": name, "who": "InterPLM", "value": value, "unit": "tokens/s", **line, "note": note})
        print(lines[-1], "ratio", lines[0]["value"] / value)
    add(options.out, lines)


if __name__ == "__main__":
    main()
