"""Losses of protein language models after equal tokens: ours beside SpeedrunningPLMs', and what each part of ours is worth.

    git clone https://github.com/Synthyra/SpeedrunningPLMs reference
    python benchmarks/plm_quality.py --fasta train.fasta.xz --clusters heldout_clusters.fasta.xz --reference reference

All see the same proteins in the same packs with the same masks, in a float32 model with bfloat16 products, under one
schedule (cosine to zero) of the rates that SpeedrunningPLMs' README gives. Scored on 15 % of the residues of held-out
proteins, by masks that never change: `random`, a hundredth of the file by the hash of the sequence; `clusters`, the second
file; `trained`, proteins of the run itself. Each run is added to `--runs` when it ends, and is not done again; no run is
begun or gone on with after `--minutes`. `--results` gets the mean over seeds of each side.

The reference's own code runs: its model and its Muon, without transformers, whose four classes are stood in for. By default
its attention and its block mask are compiled, all else is not: losses do not depend on that, and compiling takes minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plm_data import proteins, stream
from plm_sides import BETAS, DEVICE, MUON_WARMUP, Ours, Side, Theirs
from record import add, cpu, stamp
from torch import Tensor

from plmsae_cli.config.training import Train
from plmsae_cli.plm.alphabet import Packed
from plmsae_cli.runtime.masked_scores import MASK_RATE, MaskedScores, mask, masks_of_pack
from plmsae_cli.store.split import heldout, split_hash
from plmsae_cli.training.masking import IGNORED, Masked, chosen_places
from plmsae_cli.training.packs import Packs

RATES = {"lr_hidden": 0.05, "lr_embed": 0.06, "lr_head": 0.008, "lr_scalar": 0.04}
OURS = "plmsae"
REFERENCE = "SpeedrunningPLMs, bf16 autocast"
AUTOCAST = "plmsae, float32 stream"
SHIPPED = "SpeedrunningPLMs as shipped, TF32"
PARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    OURS: ({}, {}),
    AUTOCAST: ({}, {}),
    "plmsae, gradients clipped at 1": ({}, {"grad_clip": 1.0}),
    "plmsae, Muon at .02": ({"lr_hidden": 0.02}, {}),
    "plmsae, <mask> with an embedding": ({"mask_embedding": True}, {}),
    "plmsae, <mask> with an embedding, Muon at .02": ({"mask_embedding": True, "lr_hidden": 0.02}, {}),
    "plmsae, Adam 1e-3 for Muon": ({"lr_hidden": 1e-3}, {"optimizer": "adam"}),
    "plmsae, Adam 3e-3 for Muon": ({"lr_hidden": 3e-3}, {"optimizer": "adam"}),
    "plmsae, no value embeddings": ({"value_embeddings": False}, {}),
    "plmsae, plain transformer": ({"unet": False}, {}),
}
"""Options of `train.plm` and of `train` that differ. A plain transformer has no skips, no x0 and no value embeddings;
a float32 stream is ours under bfloat16 autocast, which rounds products alone. Clipping takes away the first steps' gradients
at <mask>, which are larger than all others by orders of magnitude where the stream begins at 0 there."""
STARTS = tuple(PARTS)[1:6]
SIDES = ("ours", "reference", "starts", "parts", "shipped")
"""What can be asked for: `starts` are `STARTS`, parts that differ in how the run begins, `parts` all others, `shipped` is the
reference without autocast."""
_LOOK = 20
"""Steps between looks at the loss, which wait for the device, and at the clock."""


def questions(packs: list[Packed]) -> list[Masked]:
    """What is asked of held-out packs, the same of every model."""
    asked = []
    for packed in packs:
        masked_T = masks_of_pack(packed, MASK_RATE)
        targets_T = packed.tokens_T.long().masked_fill(~masked_T, IGNORED)
        asked.append(
            chosen_places(packed, mask(packed.tokens_T, masked_T), targets_T, torch.ones(len(targets_T))).to(DEVICE)
        )
    return asked


# Runs


class OutOfTime(Exception):
    """No more minutes."""


def settings(options: argparse.Namespace, seed: int, plm: dict[str, Any], train: dict[str, Any]) -> Train:
    shape: dict[str, Any] = {
        "architecture": "unet", "fasta": str(options.fasta), "num_layers": options.layers, "hidden_size": options.hidden,
        "num_attention_heads": options.heads, "max_length": options.max_length, "pack_tokens": options.pack_tokens,
        "mask_rate": options.mask_rate, "corruption": "mask", "weight_decay": 0.0, "window": None,
        "mask_embedding": False,
        "scheduler_type": "cosine", "cooldown_steps": options.steps, "muon_momentum_warmup_steps": MUON_WARMUP, **RATES,
    }  # fmt: skip
    common: dict[str, Any] = {
        "kind": "plm", "optimizer": "muon", "batch_tokens": options.pack_tokens, "betas": list(BETAS), "eps": 1e-8,
        "grad_clip": None, "lr_warmup_steps": options.warmup, "seed": seed,
    }  # fmt: skip
    shape |= plm
    if train.get("optimizer") == "adam":
        del shape["muon_momentum_warmup_steps"]
    return Train.model_validate({**common, **train, "plm": shape})


def begin(who: str, train: Train, packs: Packs, options: argparse.Namespace) -> Side:
    if who in PARTS:
        return Ours(train, packs, options.steps, options.eager, autocast=who == AUTOCAST)
    whole = options.reference_compile == "whole"
    return Theirs(train, packs, options.steps, options.reference, half=who == REFERENCE, whole=whole)


@torch.no_grad()
def score(side: Side, held: dict[str, list[Masked]]) -> dict[str, Any]:
    found = {}
    for name, packs in held.items():
        scores = MaskedScores(len(packs), DEVICE)
        for number, pack in enumerate(packs):
            scores.add(number, side.logits(pack), pack.targets_M, pack.weights_M > 0)
        figures = scores.figures()
        assert figures is not None
        found[name] = {key: figures[key] for key in ("loss", "accuracy", "residues")}
    return found


def run(
    side: Side, packs: Packs, held: dict[str, list[Masked]], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The figures at each mark. Raises OutOfTime."""
    seen = [packs.pack(n) for n in np.linspace(0, options.steps - 1, options.eval_packs).astype(int).tolist()]
    held = held | {"trained": questions(seen)}
    losses: list[Tensor] = []
    begun, spent, first = time.monotonic(), 0.0, 0.0
    for step in range(options.steps):
        losses.append(side.step(step))
        if step == 1:
            float(losses[-1])
            first, begun = time.monotonic() - begun, time.monotonic()
        done = step + 1
        if done % _LOOK == 0:
            float(losses[-1])
            if time.monotonic() > options.deadline:
                raise OutOfTime
        if done in options.marks:
            recent = torch.stack(losses[-50:]).mean().item()
            spent += time.monotonic() - begun
            yield {
                "parameters": side.parameters,
                "tokens": done * options.pack_tokens,
                "loss": recent,
                "seconds": round(spent, 2),
                "start": round(first, 1),
                **score(side, held),
            }
            begun = time.monotonic()


def show(row: dict[str, Any]) -> None:
    losses = ", ".join(f"{each} {row[each]['loss']:.4f}" for each in ("random", "clusters", "trained"))
    pace = row["tokens"] / max(row["seconds"], 1e-9)
    print(
        f"{row['who']:46} seed {row['seed']}, {row['tokens'] / 1e6:.3g} M tokens: {losses}; {row['parameters']:,} "
        f"parameters, {row['start']:.0f} s to start, {pace:,.0f} tok/s",
        flush=True,
    )


def table(rows: list[dict[str, Any]]) -> None:
    """Means over seeds, and of held-out sets how much above the proteins trained on."""
    for tokens in sorted({row["tokens"] for row in rows}):
        print(f"\n{tokens / 1e6:.3g} M tokens: loss in nats, mean (deviation) over seeds")
        print(f"{'':46} seeds  {'random':>15} {'clusters':>15} {'trained':>9}  held out - trained")
        for who in dict.fromkeys(row["who"] for row in rows):
            own = [row for row in rows if row["who"] == who and row["tokens"] == tokens]
            if not own:
                continue
            mean = {
                name: statistics.mean(row[name]["loss"] for row in own) for name in ("random", "clusters", "trained")
            }
            spread = {n: statistics.stdev([r[n]["loss"] for r in own]) if len(own) > 1 else 0.0 for n in mean}
            cells = " ".join(f"{mean[n]:8.4f} ({spread[n]:.4f})" for n in ("random", "clusters"))
            gaps = ", ".join(f"{mean[n] - mean['trained']:+.4f}" for n in ("random", "clusters"))
            print(f"{who:46} {len(own):5}  {cells} {mean['trained']:9.4f}  {gaps}")


def lines(rows: list[dict[str, Any]], common: dict[str, str]) -> Iterator[dict[str, Any]]:
    """For `results.jsonl`: a line of each side, held-out set and mark."""
    for tokens in sorted({row["tokens"] for row in rows}):
        for who in dict.fromkeys(row["who"] for row in rows):
            own = [row for row in rows if row["who"] == who and row["tokens"] == tokens]
            for name in ("random", "clusters") if own else ():
                losses = [round(row[name]["loss"], 4) for row in own]
                gap = statistics.mean(row[name]["loss"] - row["trained"]["loss"] for row in own)
                yield {
                    "name": f"plm-quality/{own[0]['settings'].split()[0]}-{tokens / 1e6:.3g}M-{name}",
                    "who": who,
                    "value": round(statistics.mean(losses), 4),
                    "unit": "nats",
                    "note": f"seeds {losses}, {gap:+.4f} above proteins trained on, accuracy "
                    f"{statistics.mean(row[name]['accuracy'] for row in own):.4f}; {own[0]['settings']}",
                    **common,
                }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, required=True, help="proteins to train on, a hundredth held out")
    parser.add_argument("--clusters", type=Path, required=True, help="held-out proteins unlike those")
    parser.add_argument(
        "--reference", type=Path, help="a checkout of SpeedrunningPLMs; without, its sides are left out"
    )
    parser.add_argument("--reference-compile", choices=["attention", "whole"], default="attention")
    parser.add_argument("--eager", action="store_true", help="ours without torch.compile")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1022)
    parser.add_argument("--pack-tokens", type=int, default=65_536, help="tokens of a step")
    parser.add_argument("--tokens", type=float, default=20e6, help="of a run")
    parser.add_argument("--marks", type=float, nargs="*", default=[], help="tokens at which to score before the end")
    parser.add_argument("--mask-rate", type=float, default=0.2)
    parser.add_argument("--warmup", type=int, default=10, help="steps")
    parser.add_argument("--eval-tokens", type=float, default=1e6, help="of each held-out set")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="default: all")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--runs", type=Path, default=Path("plm_quality_runs.jsonl"), help="a line a run and mark")
    parser.add_argument("--results", type=Path, help="file to add the means to")
    options = parser.parse_args()
    options.deadline = time.monotonic() + 60 * options.minutes
    options.steps = max(2, int(options.tokens) // options.pack_tokens)
    options.marks = {max(2, int(mark) // options.pack_tokens) for mark in options.marks} | {options.steps}
    options.eval_packs = max(1, int(options.eval_tokens) // options.pack_tokens)
    return options


def order(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Names and seeds, what matters most first."""
    seeds, sides = range(options.seeds), set(options.sides)
    first = [who for side, who in (("ours", OURS), ("reference", REFERENCE)) if side in sides]
    parts = [who for who in PARTS if who != OURS and ("starts" if who in STARTS else "parts") in sides]
    last = [SHIPPED] if "shipped" in sides else []
    found = [(who, seed) for names in (first, parts, last) for seed in seeds for who in names]
    return [(who, seed) for who, seed in found if options.reference or who in PARTS]


def main() -> None:
    options = arguments()
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64
    if DEVICE.type == "cpu":
        torch.compiler.set_stance("force_eager")
    begun = time.monotonic()
    everything = proteins(options.fasta)
    held_P = heldout(np.array([split_hash(sequence) for sequence in everything], dtype=np.uint64), 0.01)
    room = {"pack_tokens": options.pack_tokens, "max_len": options.max_length + 2}
    trained = stream([s for s, out in zip(everything, held_P, strict=True) if not out], options.max_length)
    documents = Packs(trained, seed=0, **room)
    sets = {
        "random": [s for s, out in zip(everything, held_P, strict=True) if out],
        "clusters": proteins(options.clusters),
    }
    held = {}
    for name, sequences in sets.items():
        # In the order of a permutation, so that a part of the file is a sample of it.
        packs = Packs(stream(sequences, options.max_length), seed=0, room=documents.room, **room)
        held[name] = questions([packs.pack(n) for n in range(min(options.eval_packs, packs.epoch_packs(0)))])
    print(
        f"{documents.num_documents:,} proteins, {documents.num_tokens:,} tokens; read in {time.monotonic() - begun:.0f} s",
        flush=True,
    )

    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu(torch.get_num_threads())
    shape = f"d{options.hidden}-L{options.layers} of {options.heads} heads, {options.pack_tokens} tokens a step, "
    shape += f"{options.steps} steps"
    rows = [json.loads(line) for line in options.runs.read_text().splitlines()] if options.runs.exists() else []
    rows = [row for row in rows if row["settings"] == shape and row["device"] == name]
    done = {(row["who"], row["seed"]) for row in rows if row["tokens"] == options.steps * options.pack_tokens}
    try:
        for who, seed in order(options):
            if (who, seed) in done:
                continue
            if time.monotonic() > options.deadline:
                raise OutOfTime
            torch.manual_seed(seed)
            gc.collect()
            packs = Packs(trained, seed=seed, room=documents.room, **room)
            train = settings(options, seed, *PARTS.get(who, ({}, {})))
            try:
                for found in run(begin(who, train, packs, options), packs, held, options):
                    rows.append({"who": who, "seed": seed, "settings": shape, "device": name, **found})
                    add(options.runs, rows[-1:])
                    show(rows[-1])
            except OutOfTime:
                raise
            except Exception as error:
                print(f"{who}: failed: {error!r:.2000}", flush=True)
    except OutOfTime:
        print(f"stopped after {options.minutes:g} minutes", flush=True)
    table(rows)
    if options.results:
        command = " ".join(["python benchmarks/plm_quality.py", *sys.argv[1:]])
        add(options.results, lines(rows, stamp("plm-quality", name, command)))


if __name__ == "__main__":
    main()
