"""Training a TopK dictionary on a CPU: ours beside sparsify's and dictionary_learning's, in one run, on the same rows.

Peers go into an environment that shares this one's torch, without what their language-model tooling needs:

    pip install --no-deps eai-sparsify dictionary-learning einops natsort simple-parsing docstring-parser schedulefree
    plmsae optimize blocks.yaml --with-inputs     # bundled model and proteins, layer 5 or 1, float32, holdout 0.1
    python benchmarks/sae_train_cpu.py --data runs/data/optimize-<key> [--recipe shared | own]

All see the dataset's blocks in one order, standardised alike, and take turns of some steps, so that other load on the
machine disturbs all alike; tokens a second are those of the median turn. Held-out rows are scored by `Fidelity` on our
TopK with the side's weights, which must reconstruct as the side itself does. `shared`: one learning rate (that of our
`train.lr: auto`), schedule and clipping at 1, each in the unit of its own loss (sparsify's is a share of the variance, whose
gradient never gets there; its own trainer does not clip). `own`: each side's own optimiser and schedule, for fidelity alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import distribution, version
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest.mock import MagicMock

import torch
from record import add, cpu, stamp
from torch import Tensor, nn

from plmsae_cli.config.sae import SAE
from plmsae_cli.config.training import Train
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.sae.fidelity import Fidelity
from plmsae_cli.sae.initialise import initialise
from plmsae_cli.sae.topk import TopK
from plmsae_cli.stages.common import require_manifest
from plmsae_cli.store.activations import ActivationShards, Statistics
from plmsae_cli.store.blocks import Blocks
from plmsae_cli.store.fs import Store
from plmsae_cli.training.sae_objective import MEDIAN_ROWS, SAEObjective
from plmsae_cli.training.schedules import learning_rate, sae_learning_rate
from plmsae_cli.training.stream import BlockStream

NUM_LATENTS, K, BATCH, SEED, THREADS, STEPS_A_TURN = 1536, 32, 2048, 0, 2, 8
STEPS = 1_000_000 // BATCH
WARMUP, DECAY = min(1000, STEPS // 20), 0.2  # our defaults
HERE = Path(__file__).parent
Do = Callable[..., Any]


class Data:
    """An optimized dataset of float32 activations."""

    def __init__(self, folder: str) -> None:
        store = Store()
        self.blocks, heldout = Blocks(store, folder), ActivationShards(store, folder, heldout=True)
        self.mean_D, self.scale = Statistics.read(store, f"{folder}/stats.safetensors").normalisation()
        self.d = self.blocks.d
        self.peak = sae_learning_rate("adam", NUM_LATENTS, self.d, STEPS)
        self.layer = require_manifest(store, folder)["layer"]
        self.heldout_RD = torch.empty(heldout.stop, self.d)
        heldout.read_into(0, self.heldout_RD)
        self.sample_RD = torch.empty(min(MEDIAN_ROWS, self.blocks.num_rows), self.d)
        self.blocks.read_into(0, self.sample_RD)

    def standardise(self, rows_BD: Tensor) -> Tensor:
        return (rows_BD - self.mean_D) * self.scale


@dataclass
class Side:
    """One contestant. `step` trains on a standardised batch, given its number; `turns` are seconds a step."""

    who: str
    note: str
    step: Callable[[int, Tensor], Any]
    weights: Callable[[], list[Tensor]] = list
    """w_enc [N, D], b_enc [N], w_dec [N, D], b_dec [D]; none for a limit. Called once, after training."""
    reconstruct: Callable[[Tensor], Tensor] = torch.clone
    turns: list[float] = field(default_factory=list)


def plmsae(data: Data, init: Literal["random", "fitted"]) -> Side:
    """The product's step, with its own stream."""
    options = Train(sae=SAE(num_latents=NUM_LATENTS, k=K, init=init), batch_tokens=BATCH, seed=SEED)
    stream, cpu = BlockStream(data.blocks, BATCH, SEED), torch.device("cpu")
    objective = SAEObjective(options, stream, data.mean_D, data.scale, STEPS, Gang(), cpu, torch.float32)
    objective.start(data.sample_RD)
    note, model = f"SAEObjective, BlockStream; AuxK 1/32 on, dead after {STEPS * BATCH // 10:,} tokens", objective.model
    who = f"plmsae (init: {init})"
    return Side(who, note, lambda step, _: objective.step(step), lambda: list(model.parameters()), model)


def dense(data: Data) -> Side:
    """The plain twin: our formulas, start and schedule in torch's dense operations."""
    model = TopK(data.d, NUM_LATENTS, K)
    initialise(model, SEED, data.standardise(data.sample_RD))

    def loss(x_BD: Tensor) -> Tensor:  # summed over d, the unit of our clip
        top = nn.functional.linear(x_BD - model.b_dec_D, model.w_enc_ND, model.b_enc_N).topk(K)
        z_BN = torch.zeros(len(x_BD), NUM_LATENTS).scatter(1, top.indices, top.values.relu())
        return (x_BD - z_BN @ model.w_dec_ND - model.b_dec_D).square().sum() / len(x_BD)

    adam = torch.optim.Adam(model.parameters(), eps=6.25e-10 * data.d, fused=True)
    step = _stepper(adam, loss, model.project_gradients, model.normalize_decoder, data.peak)
    note = "our formulas in dense PyTorch, from our start; no AuxK; batches in memory"
    return Side("plmsae (dense twin)", note, step, lambda: list(model.parameters()), model)


def sparsify(data: Data, own: bool) -> Side:
    """Its SparseCoder, in the order of its Trainer."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernel needs a GPU
    coder, config, sign_sgd = _import("eai-sparsify", "sparsify", "sparse_coder", "config", "sign_sgd")
    torch.manual_seed(SEED)
    sae = coder.SparseCoder(data.d, config.SparseCoderConfig(num_latents=NUM_LATENTS, k=K))
    sae.b_dec.data = data.standardise(data.sample_RD[:BATCH]).mean(0)
    optimizer: Any = torch.optim.Adam(sae.parameters(), fused=True)
    if own:
        signum = sign_sgd.SignSGD(sae.parameters(), lr=5e-3 / (NUM_LATENTS / 2**14) ** 0.5)
        optimizer = importlib.import_module("schedulefree").ScheduleFreeWrapper(signum, momentum=0.95)
        optimizer.train()

    def weights() -> list[Tensor]:
        if own:
            optimizer.eval()  # to the averaged weights
        return [sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec]

    project, normalize = sae.remove_gradient_parallel_to_decoder_directions, sae.set_decoder_norm_to_unit_norm
    step = _stepper(optimizer, lambda x_BD: sae(x_BD).fvu, project, normalize, None if own else data.peak)
    how = "its schedule-free signum, no clipping" if own else "fused Adam, clipping"
    note = f"{how}; AuxK off, as by its default; its plain PyTorch decoder; batches in memory"
    return Side(f"sparsify {version('eai-sparsify')}", note, step, weights, lambda x_BD: sae(x_BD).sae_out)


def dictionary_learning(data: Data, own: bool) -> Side:
    """Its TopKTrainer."""
    (top_k,) = _import("dictionary-learning", "dictionary_learning", "trainers.top_k")
    schedule: dict[str, Any] = {"warmup_steps": WARMUP, "lr": None if own else data.peak}
    schedule["decay_start"] = None if own else round((1 - DECAY) * STEPS)
    trainer = top_k.TopKTrainer(STEPS, data.d, NUM_LATENTS, K, 0, "", **schedule, seed=SEED, device="cpu")
    ae = trainer.ae
    weights = lambda: [ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.T, ae.b_dec]  # noqa: E731
    how = "no decay; its warm-up of 1,000 steps, longer than the run, cut to ours" if own else "our warm-up and decay"
    note = f"its Adam, {how}; AuxK 1/32 on, as by its default, but dead only after 10 M tokens; batches in memory"
    return Side(f"dictionary_learning {version('dictionary-learning')}", note, trainer.update, weights, ae)


def limit(data: Data) -> Side:
    """What no step does without: the product with the encoder, and the optimiser's pass over its state."""
    model, scores_BN = TopK(data.d, NUM_LATENTS, K), torch.empty(BATCH, NUM_LATENTS)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    adam, w_enc_DN = torch.optim.Adam(model.parameters(), fused=True), model.w_enc_ND.detach().t()
    step = lambda _, x_BD: (torch.mm(x_BD, w_enc_DN, out=scores_BN), adam.step())  # noqa: E731
    return Side("limit (encoder GEMM + Adam)", "float32, into a buffer made once", step)


def _stepper(optimizer: Any, loss: Do, project: Do, normalize: Do, peak: float | None) -> Do:
    """The order of a step, with clipping and our schedule of this peak rate, or as the optimiser has it."""
    (group,) = optimizer.param_groups

    def step(index: int, x_BD: Tensor) -> None:
        torch.autograd.backward(loss(x_BD))
        project()
        if peak is not None:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
            group["lr"] = learning_rate(index, STEPS, peak, WARMUP, DECAY)
        optimizer.step()
        optimizer.zero_grad()
        normalize()

    return step


def _import(project: str, package: str, *names: str) -> list[ModuleType]:
    """Modules of a peer, without its `__init__`: that, and some modules, import tooling for language models."""
    sys.modules[package] = bare = ModuleType(package)
    bare.__path__ = [str(distribution(project).locate_file(package))]
    for tooling in ("accelerate", "accelerate.utils", "transformers", "huggingface_hub"):
        sys.modules.setdefault(tooling, MagicMock())
    return [importlib.import_module(f"{package}.{name}") for name in names]


def train(sides: list[Side], data: Data) -> None:
    """All sides through all steps, a turn each; who begins rotates."""
    with BlockStream(data.blocks, BATCH, SEED) as stream:
        for turn, first in enumerate(range(0, STEPS, STEPS_A_TURN)):
            steps = range(first, min(first + STEPS_A_TURN, STEPS))
            batches = [data.standardise(stream.rows(step)) for step in steps]
            for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
                begin = time.perf_counter()
                for step, x_BD in zip(steps, batches, strict=True):
                    side.step(step, x_BD)
                side.turns.append((time.perf_counter() - begin) / len(steps))


@torch.no_grad()
def score(side: Side, weights: list[Tensor], data: Data) -> dict[str, Any]:
    """Fidelity over all held-out rows; the mean of the dataset is 0 in standardised units."""
    model, figures = TopK(data.d, NUM_LATENTS, K), Fidelity(NUM_LATENTS)
    for ours, theirs in zip(model.parameters(), weights, strict=True):
        ours.copy_(theirs)
    for x_BD in torch.split(data.standardise(data.heldout_RD), BATCH):
        latents = model.encode(x_BD)
        xhat_BD = model.decode(latents)
        # Near ties between latents may be broken another way.
        assert (side.reconstruct(x_BD) - xhat_BD).norm() < 1e-3 * xhat_BD.norm()
        figures.update(x_BD, xhat_BD, latents, torch.zeros(data.d))
    return figures.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of an optimized dataset of float32 activations")
    parser.add_argument("--recipe", choices=["shared", "own"], default="shared")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="file to add the figures to")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    data, own, load = Data(options.data), options.recipe == "own", os.getloadavg()[0]
    sides = [plmsae(data, "random"), plmsae(data, "fitted"), sparsify(data, own), dictionary_learning(data, own)]
    sides += [] if own else [dense(data), limit(data)]
    train(sides, data)

    command = f"python benchmarks/{Path(__file__).name} --data {options.data} --recipe {options.recipe}"
    common = stamp(f"sae-train-cpu-{options.recipe}", cpu(THREADS), command)
    name, lines = f"sae-train/cpu-d{data.d}-n{NUM_LATENTS}-k{K}-layer{data.layer}", list[dict[str, Any]]()
    for side in sides:
        if not own:
            slow, median, fast = (round(BATCH / q) for q in reversed(statistics.quantiles(side.turns, n=4)))
            note = f"{side.note}; quartiles of {len(side.turns)} turns {slow:,} and {fast:,}, load {load:.1f} at start"
            lines.append({"name": name, "who": side.who, "value": median, "unit": "tokens/s", **common, "note": note})
        if weights := side.weights():
            found = score(side, weights, data)
            note = f"dead {found['dead_share']:.1%}, L0 {found['l0_mean']:.1f} on {found['tokens']:,} held-out tokens"
            note += f" after {STEPS * BATCH:,} of training; {side.note}"
            figure = {"name": f"{name}-fvu{'-own' * own}", "who": side.who, "value": round(found["fvu"], 4)}
            lines.append({**figure, "unit": "FVU", **common, "note": note})
    print(*map(json.dumps, lines), sep="\n")
    add(options.results, lines)


if __name__ == "__main__":
    main()
