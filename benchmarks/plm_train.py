"""Trains the language model of an experiment on one GPU where only torch is, and writes it to be read and shipped.

    python benchmarks/plm_train.py experiments/examples/bundled-plm.yaml --fasta swissprot_train.fasta.xz \
        --clusters swissprot_clusters.fasta.xz --out demo [--set train.tokens=655360000]

The steps are those of `plmsae train` on the same file, bit for bit; what is left out are the token shards, and with them
the key of the data. Files may be xz. `--out` gets `metrics.jsonl` and checkpoints (the same command goes on from them),
`plm/` in float32, `half/` in float16 as the package ships it, and `card.md`, the figures of a model card.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plm_data import proteins, stream

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.yaml import load
from plmsae_cli.plm.alphabet import AMINO_ACIDS, FIRST_LETTER, VOCAB_SIZE
from plmsae_cli.runtime.device import pick_device, training_dtype
from plmsae_cli.runtime.dist import gang
from plmsae_cli.runtime.run_folder import RunFolder
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.split import heldout, split_hash
from plmsae_cli.store.weights import save_model
from plmsae_cli.training.loop import Diverged, Training, fit
from plmsae_cli.training.packs import Packs
from plmsae_cli.training.plm_objective import PLMObjective


def entropy(tokens: np.ndarray[Any, np.dtype[np.uint8]]) -> float:
    """Of the residues of amino acids, nats: the loss of a model that knows only their frequencies."""
    counts = np.bincount(tokens, minlength=VOCAB_SIZE)[FIRST_LETTER : FIRST_LETTER + len(AMINO_ACIDS)]
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def card(facts: dict[str, Any], command: str, device: str, wall: float) -> str:
    """Rows of a model card."""
    seconds, tokens = facts["train_seconds"], facts["tokens"]
    rows = [
        f"| parameters | {facts['parameters']:,} |",
        f"| made by | `{command}` |",
        f"| data | {facts['proteins']:,} proteins, {facts['residues'] / 1e6:.0f} M residues |",
        f"| training | {facts['steps']:,} steps, {tokens / 1e6:,.0f} M tokens ({tokens / facts['epoch']:.1f} epochs), "
        f"{seconds:.0f} s of training, {wall:.0f} s with compiling, reading and validating, on one {device}, "
        f"{tokens / max(seconds, 1e-9) / 1e6:.2f} M tokens/s |",
        "",
        "| held out | residues scored | loss (nats) | perplexity | accuracy |",
        "|---|---|---|---|---|",
    ]
    for name, found in facts["valid"].items():
        rows.append(
            f"| {name} | {found['residues']:,} | {found['loss']:.3f} | {found['perplexity']:.2f} | {found['accuracy']:.1%} |"
        )
    return "\n".join([*rows, f"| *frequencies alone* | | *{facts['unigram_entropy']:.3f}* | | |", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--fasta", type=Path, required=True)
    parser.add_argument("--clusters", type=Path, help="further validation proteins")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="changes", help="path=value, as of plmsae")
    options = parser.parse_args()
    begun = time.monotonic()
    try:
        experiment = load(options.experiment, options.changes).experiment
    except UserError as error:
        parser.error(str(error))
    train = experiment.train
    if train is None or train.plm is None:
        parser.error(f"{options.experiment} trains no language model")
    plm, size, longest = train.plm, train.plm.pack_tokens, train.plm.max_length + 2
    everything = proteins(options.fasta)
    held_P = heldout(np.array([split_hash(sequence) for sequence in everything], dtype=np.uint64), plm.holdout)
    own = stream([s for s, out in zip(everything, held_P, strict=True) if not out], plm.max_length)
    packs = Packs(own, size, longest, train.seed)
    others = {"random": [s for s, out in zip(everything, held_P, strict=True) if out]}
    if options.clusters is not None:
        others["clusters"] = proteins(options.clusters)
    valid = {
        name: Packs(stream(sequences, plm.max_length), size, longest, None, room=packs.room)
        for name, sequences in sorted(others.items())
        if sequences
    }
    steps = max(1, (train.tokens or packs.num_tokens) // train.batch_tokens)
    run = RunFolder(options.out)
    run.path.mkdir(parents=True, exist_ok=True)
    with gang() as ranks:
        device = pick_device(ranks.local_rank)
        objective = PLMObjective(train, packs, valid, steps, ranks, device, training_dtype(train.compute, device))

        def told(done: int, total: int, unit: str, **figures: Any) -> None:
            shown = " ".join(f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, int | float))
            print(f"{time.monotonic() - begun:6.0f} s  {done:,} of {total:,} {unit}  {shown}", flush=True)

        def lost(training: Training, error: Diverged) -> None:
            raise error

        training = Training(objective, steps, experiment, run, ranks)
        fit([training], ranks, told, lost)
        steps = training.total_steps
        figures = objective.score(steps)
        if not ranks.first:
            return
        facts = {
            "tokens": steps * train.batch_tokens,
            "steps": steps,
            "train_seconds": objective.clock.seconds,
            "parameters": objective.config.num_parameters,
            "train": train.science(),
            "valid": dict(figures),
            "unigram_entropy": entropy(own[0]),
        }
        state = {name: tensor.detach().cpu() for name, tensor in objective.released().items()}
        store = Store()
        save_model(store, join(str(options.out), "plm"), state, asdict(objective.config), facts)
        half = {name: tensor.half() for name, tensor in state.items()}
        save_model(store, join(str(options.out), "half"), half, asdict(objective.config), facts)
        about = {"proteins": packs.num_documents, "residues": packs.num_tokens - 2 * packs.num_documents}
        command = " ".join(["python benchmarks/plm_train.py", *sys.argv[1:]])
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        text = card({**facts, **about, "epoch": packs.num_tokens}, command, name, time.monotonic() - begun)
        (options.out / "card.md").write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
