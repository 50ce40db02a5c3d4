"""Collecting the examples of 20,480 latents: time by number of tokens, peak memory, and InterPLM's beside it.

    python benchmarks/features.py [--tokens 500_000 2_000_000] [--device cpu] [--threads 1] [--interplm PATH]
    python benchmarks/features.py --encode [--tokens 20_000_000] [--d 320]
    python benchmarks/features.py --pages

64 latents are active a token. Without `--encode` codes are at hand: both passes are timed without reading activations and
without the encoder. With it, rows drawn on the device go through a TopK dictionary and the axis's own reader, in both passes.
On a GPU it is first checked, on 30,000 rows, that a CPU collects the same lists, counts and activations from the pairs the
GPU encoded, bit for bit, and that it encodes the same pairs up to rounding; 5, 10 and 20 M tokens, unless they are given. One
process holds all latents. Ours keeps for each latent the 20 strongest residues and 50 random ones of each of four bands,
one a protein, with activations along the proteins and what fires beside, and the counts of latents.parquet.

With `--interplm`, a checkout of github.com/ElanaPearl/InterPLM, its tracker gets the same codes (`features_interplm.py`), those
of the first of `--tokens`. With `--pages`, pages of 40,960 latents are built and opened in Chromium (`features_pages.py`).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import without_tables  # noqa: F401
from record import HERE, add, cpu, stamp

from plmsae_cli.evaluation.features.gather import fires_along, fires_beside
from plmsae_cli.evaluation.features.job import LISTS
from plmsae_cli.evaluation.features.merge import sampled
from plmsae_cli.evaluation.features.ranking import Entries
from plmsae_cli.evaluation.features.reading import Active, Reader, Side, active_pairs
from plmsae_cli.evaluation.features.select import Selection
from plmsae_cli.runtime.peak import peak_memory
from plmsae_cli.sae.topk import TopK

LATENTS, K, TOP, RANDOM = 20_480, 64, 20, 50
Batches = Callable[[], Iterator[Active]]


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


def drawn(side: Made, device: torch.device, batch_rows: int) -> Batches:
    """The codes of all rows, a batch at a time."""

    def batches() -> Iterator[Active]:
        for number, start in enumerate(range(0, side.rows, batch_rows)):
            rows = min(batch_rows, side.rows - start)
            yield Active(start, rows, *active_pairs(*codes(number, rows, device)))

    return batches


class Rows:
    """Stands for activations on disk: rows are drawn when they are read, in blocks, each of its number alone."""

    BLOCK = 4096

    def __init__(self, d: int, where: torch.device) -> None:
        self.d, self.where = d, where

    def read(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        first, after = start // self.BLOCK, -(-stop // self.BLOCK)
        blocks = [self._block(number) for number in range(first, after)]
        whole = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
        return whole[start - first * self.BLOCK : stop - first * self.BLOCK].to(device)

    def _block(self, number: int) -> torch.Tensor:
        generator = torch.Generator(device=self.where).manual_seed(number)
        return torch.randn(self.BLOCK, self.d, generator=generator, device=self.where)

    def prefetch(self, start: int, stop: int) -> None:
        """Nothing is on disk."""


def encoded(side: Made, d: int, device: torch.device, drawn_on: torch.device) -> Batches:
    """The latents of drawn rows, by the axis's reader; biases make some frequent and some rare."""
    generator = torch.Generator().manual_seed(0)
    model = TopK(d, LATENTS, k=K)
    with torch.no_grad():
        # Scores of a standard deviation of 1 / 6: few activations are above 1, the maximum that is stated.
        model.w_enc_ND.copy_(torch.nn.functional.normalize(torch.randn(LATENTS, d, generator=generator), dim=1) / 6)
        model.b_enc_N.copy_(torch.randn(LATENTS, generator=generator) / 24)
    side.__dict__["shards"] = Rows(d, drawn_on)
    reader = Reader(model, side, device, lambda: None)
    return lambda: reader.batches(0, side.rows)


class Clocks:
    """Seconds of the two passes and of what goes before them: making or encoding batches, in both."""

    def __init__(self, device: torch.device) -> None:
        self.batches, self.first, self.second = (Clock(device) for _ in range(3))


Column = tuple[torch.Tensor, ...]


def ours(
    side: Made, device: torch.device, batches: Batches, found: Callable[[Column], None]
) -> tuple[Clocks, Selection]:
    """Both passes; `found` gets the columns of each batch of the second."""
    widths = torch.tensor([TOP] + [RANDOM] * (LISTS - 1), device=device)
    selection = Selection(0, LATENTS, torch.ones(LATENTS, device=device), widths, distinct=True)
    clocks = Clocks(device)

    def timed() -> Iterator[Active]:
        source = batches()
        while True:
            with clocks.batches:
                batch = next(source, None)
            if batch is None:
                return
            yield batch

    for batch in timed():
        with clocks.first:
            about = side.about(batch.start, batch.start + batch.rows).to(device)
            selection.add(batch, about, about.protein_B)
    with clocks.first:
        entries = selection.lists.entries()
        latent_C = entries.list_C // LISTS
        pair_X = torch.unique(entries.owner_C * LATENTS + latent_C)
        sampled_C = sampled(entries.place_C, latent_C)
        sampled_C = sampled_C[entries.row_C[sampled_C].argsort(stable=True)]
        row_S, latent_S = entries.row_C[sampled_C], latent_C[sampled_C]
    for batch in timed():
        with clocks.second:
            about = side.about(batch.start, batch.start + batch.rows).to(device)
            found((*fires_along(batch, about, pair_X, LATENTS), *fires_beside(batch, row_S, latent_S)))
    return clocks, selection


def to_host(columns: Column) -> None:
    """As the axis does before it writes them."""
    for column in columns:
        column.cpu()


def check(side: Made, d: int, device: torch.device) -> str:
    """That a CPU makes the same of what the device encoded, and encodes the same up to rounding."""
    host = torch.device("cpu")
    there = list(encoded(side, d, device, host)())
    here = [Active(b.start, b.rows, b.which_P.cpu(), b.latent_P.cpu(), b.act_P.cpu()) for b in there]
    results = []
    for where, batches in ((device, there), (host, here)):
        columns: list[Column] = []
        _, selection = ours(side, where, lambda batches=batches: iter(batches), columns.append)  # type: ignore[misc]
        entries: Entries = selection.lists.entries().cpu()
        gathered = [torch.cat([column.cpu() for column in each]) for each in zip(*columns, strict=True)]
        counts = [count.cpu() for count in selection.tallies.count.values()]
        results.append([*entries, *counts, *gathered])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b), "the device and the CPU collect other things from the same pairs"
    dense = []
    for batches in (here, list(encoded(side, d, host, host)())):
        key = torch.cat([(b.which_P + b.start) * LATENTS + b.latent_P for b in batches])
        order = key.argsort()
        dense.append((key[order], torch.cat([b.act_P for b in batches])[order]))
    (key_a, act_a), (key_b, act_b) = dense
    place = torch.searchsorted(key_b, key_a).clamp(max=len(key_b) - 1)
    same = key_b[place] == key_a
    worst = float((act_b[place][same] / act_a[same] - 1).abs().max())
    share = float(same.double().mean())
    assert share > 0.999, f"{share:.4%} of the pairs are those of a CPU"
    assert worst < 1e-3, f"activations differ by {worst:.1e} of themselves"
    return f"{len(key_a):,} pairs collected bit for bit as on a CPU; {share:.4%} of them encoded there too, within {worst:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--encode", action="store_true")
    parser.add_argument("--d", type=int, default=320)
    parser.add_argument("--interplm", type=Path)
    parser.add_argument("--pages", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.pages:
        from features_pages import first_page

        add(options.out, [first_page(stamp("features", cpu(options.threads), "python benchmarks/features.py --pages"))])
        return
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    tokens = options.tokens or ([5_000_000, 10_000_000, 20_000_000] if on_gpu else [500_000, 1_000_000])
    where = torch.cuda.get_device_name(device) if on_gpu else cpu(options.threads)
    asked = f"--tokens {' '.join(map(str, tokens))}" + f" --encode --d {options.d}" * options.encode
    asked += " --interplm PATH" * bool(options.interplm)
    line = stamp("features", where, f"python benchmarks/features.py {asked}")
    batch_rows = 65_536 if on_gpu else 8192
    # Figures of a name come from one run: those beside a peer are not replaced by those of a longer run without it.
    name = "features/collect" + "-encode" * options.encode
    name += "" if on_gpu else "-cpu" if options.interplm else "-cpu-alone"
    checked = ""
    if on_gpu:  # kernels are loaded before the clock starts, too
        checked = "; " + check(Made(30_000), options.d, device)
        print(checked[2:], flush=True)
    lines: list[dict[str, Any]] = []
    collected: list[tuple[Made, Selection]] = []
    for number in tokens:
        side = Made(number)
        side.offset_P, side.letter_R  # noqa: B018  # made before the clock starts
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        batches = encoded(side, options.d, device, device) if options.encode else drawn(side, device, batch_rows)
        clocks, selection = ours(side, device, batches, to_host)
        collected.append((side, selection))
        host = peak_memory()
        gpu = f", GPU {torch.cuda.max_memory_allocated() / 1e9:.2f} GB" if on_gpu else ""
        spent = clocks.first.spent + clocks.second.spent + clocks.batches.spent * options.encode
        encoding = f"encoding twice {clocks.batches.spent:.1f} s, " * options.encode
        note = (
            f"{side.rows:,} tokens, {LATENTS:,} latents, {K} active; {encoding}first pass {clocks.first.spent:.1f} s, second"
            f" {clocks.second.spent:.1f} s; peak of the process {host / 1e9:.2f} GB{gpu}, load {os.getloadavg()[0]:.1f}{checked}"
        )
        who = "plmsae" if number == tokens[-1] else f"plmsae ({side.rows:,} tokens)"
        lines.insert(
            0, {"name": name, "who": who, "value": round(side.rows / spent), "unit": "tokens/s", **line, "note": note}
        )
        print(lines[0], flush=True)
        if number != tokens[0] or not options.interplm:
            collected.pop()
    if options.interplm:
        from features_interplm import LATENTS as THEIRS
        from features_interplm import collect

        side, selection = collected[0]
        spent, same = collect(options.interplm, side, drawn(side, torch.device("cpu"), batch_rows), selection)
        value, mine = round(side.rows / spent), lines[-1]["value"]
        note = (
            f"PerProteinActivationTracker, {side.rows:,} tokens in {spent:.0f} s, from {THEIRS} latents and without making its"
            f" dense matrices; the strongest proteins are ours for {same:.1%} of these latents; ours is {mine / value:.1f} times"
            f" as fast on these tokens, {lines[0]['value'] / value:.1f} times on most; load {os.getloadavg()[0]:.1f}"
        )
        lines.append({"name": name, "who": "InterPLM", "value": value, "unit": "tokens/s", **line, "note": note})
        print(lines[-1])
    add(options.out, lines)


if __name__ == "__main__":
    main()
