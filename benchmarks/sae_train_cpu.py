"""Training a TopK dictionary on a CPU: ours beside sparsify's and dictionary_learning's, one run, the same rows.

Peers go into an environment that shares this one's torch, without what their language-model tooling needs:

    pip install --no-deps eai-sparsify==1.3.3 dictionary-learning==0.1.0
    pip install einops natsort simple-parsing schedulefree
    plmsae optimize blocks.yaml --with-inputs       # the figures are of the bundled model's layer 5, float32
    python benchmarks/sae_train_cpu.py --data runs/data/optimize-<key> [--recipe shared | own] [--append]

Every side sees the dataset's blocks in one order, standardised alike. Sides take turns of some steps each, so that other
load on the machine disturbs all alike; tokens a second are those of the median turn. Held-out rows are scored by `Fidelity`
on our TopK with the side's weights, which is checked to reconstruct as the side itself does.

`shared`: one learning rate, schedule and clipping, and Adam, for all; the rest as each side's defaults have it.
`own`: each side's own optimiser and schedule. Only fidelity is recorded then: the steps differ in kind.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from sae_step_cpu import Dense
from torch import Tensor, nn

from plmsae_cli.config.training import SAE, Train
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.sae.fidelity import Fidelity
from plmsae_cli.sae.initialise import initialise
from plmsae_cli.sae.topk import TopK
from plmsae_cli.store.activations import ActivationShards, Statistics
from plmsae_cli.store.blocks import Blocks
from plmsae_cli.store.fs import Store
from plmsae_cli.training.sae_objective import MEDIAN_ROWS, SAEObjective
from plmsae_cli.training.schedules import learning_rate, topk_learning_rate
from plmsae_cli.training.stream import BlockStream

NUM_LATENTS, K, BATCH = 1536, 32, 2048
PEAK, DECAY = topk_learning_rate(NUM_LATENTS), 0.2  # the rate is all three sides' default for Adam
STEPS_A_TURN = 8
HERE = Path(__file__).parent

Weights = tuple[Tensor, Tensor, Tensor, Tensor]
"""w_enc [N, D], b_enc [N], w_dec [N, D], b_dec [D]."""


class Data:
    """The dataset, and how long and with which seed it is trained on."""

    def __init__(self, folder: str, tokens: int, seed: int) -> None:
        store = Store()
        self.blocks, self.heldout = Blocks(store, folder), ActivationShards(store, folder, heldout=True)
        self.mean_D, self.scale = Statistics.read(store, f"{folder}/stats.safetensors").normalisation()
        self.steps, self.seed = tokens // BATCH, seed
        self.warmup = min(1000, self.steps // 20)
        self.sample_RD = torch.empty(min(MEDIAN_ROWS, self.blocks.num_rows), self.blocks.d)
        self.blocks.read_into(0, self.sample_RD)

    def standardise(self, rows_BD: Tensor) -> Tensor:
        return (rows_BD.float() - self.mean_D) * self.scale

    def rate(self, step: int) -> float:
        return learning_rate(step, self.steps, PEAK, self.warmup, DECAY)


@dataclass
class Side:
    """One contestant."""

    who: str
    note: str
    step: Callable[[int, Tensor], Any]
    """Train on a standardised batch, given its number."""
    weights: Callable[[], Weights] | None = None
    reconstruct: Callable[[Tensor], Tensor] | None = None
    turns: list[float] = field(default_factory=list)
    """Seconds a step, of each turn."""

    def tokens_per_second(self) -> float:
        return BATCH / statistics.median(self.turns)


def plmsae(data: Data) -> Side:
    """The product's step, with its own stream."""
    options = Train(sae=SAE(num_latents=NUM_LATENTS, k=K), batch_tokens=BATCH, seed=data.seed, lr=PEAK, lr_decay=DECAY)
    stream, cpu = BlockStream(data.blocks, BATCH, data.seed), torch.device("cpu")
    objective = SAEObjective(options, stream, data.mean_D, data.scale, data.steps, Gang(), cpu, torch.float32)
    objective.start(data.sample_RD)
    note = f"SAEObjective with its BlockStream; AuxK 1/32, dead after {data.steps * BATCH // 10:,} tokens"
    model = objective.model
    return Side("plmsae", note, lambda step, _: objective.step(step), lambda: _weights(model), model)


def dense(data: Data) -> Side:
    """The plain twin: our start and schedule."""
    start = TopK(data.blocks.d, NUM_LATENTS, K)
    initialise(start, data.seed, data.standardise(data.sample_RD))
    model = Dense(data.sample_RD, NUM_LATENTS, K)
    names = ("encoder", "b_enc", "decoder", "b_dec")
    model.load_state_dict(dict(zip(names, _weights(start), strict=True)))
    optimizer = torch.optim.Adam(model.parameters(), eps=6.25e-10, fused=True)
    none_dead_N = torch.zeros(NUM_LATENTS, dtype=torch.bool)

    def step(index: int, x_BD: Tensor) -> None:
        optimizer.zero_grad()
        model.loss(x_BD, none_dead_N).backward()
        grad, rows = model.decoder.grad, model.decoder.data
        assert grad is not None
        grad -= (grad * rows).sum(1, keepdim=True) * rows
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = data.rate(index)
        optimizer.step()
        rows /= rows.norm(dim=1, keepdim=True)

    weights = lambda: (model.encoder, model.b_enc, model.decoder, model.b_dec)  # noqa: E731
    return Side("dense torch", "our formulas in dense PyTorch, from our start; no AuxK; batches in memory", step, weights)


def sparsify(data: Data, own: bool) -> Side:
    """Its SparseCoder, in the order of its Trainer."""
    coder, config, sign_sgd = _import("sparsify", "sparse_coder", "config", "sign_sgd")
    torch.manual_seed(data.seed)
    sae = coder.SparseCoder(data.blocks.d, config.SparseCoderConfig(num_latents=NUM_LATENTS, k=K))
    optimizer: Any
    if own:
        schedulefree = importlib.import_module("schedulefree")
        rate = 5e-3 / (NUM_LATENTS / 2**14) ** 0.5
        optimizer = schedulefree.ScheduleFreeWrapper(sign_sgd.SignSGD(sae.parameters(), lr=rate), momentum=0.95)
        optimizer.train()
        how = f"schedule-free signum at {rate:.1e}, no clipping"
    else:
        optimizer, how = torch.optim.Adam(sae.parameters(), fused=True), "fused Adam, clipping"

    def step(index: int, x_BD: Tensor) -> None:
        if index == 0:
            sae.b_dec.data = x_BD.mean(0)
        sae(x_BD).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        if not own:
            nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = data.rate(index)
        optimizer.step()
        optimizer.zero_grad()
        sae.set_decoder_norm_to_unit_norm()

    def weights() -> Weights:
        if own:
            optimizer.eval()  # to the averaged weights
        return sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec

    note = f"{how}; AuxK off as by its default; its plain PyTorch decoder; batches in memory"
    return Side(f"sparsify {version('eai-sparsify')}", note, step, weights, lambda x_BD: sae(x_BD).sae_out)


def dictionary_learning(data: Data, own: bool) -> Side:
    """Its TopKTrainer, whose rate is the shared one by default."""
    (top_k,) = _import("dictionary_learning", "trainers.top_k")
    trainer = top_k.TopKTrainer(
        steps=data.steps, activation_dim=data.blocks.d, dict_size=NUM_LATENTS, k=K, layer=0, lm_name="",
        warmup_steps=data.warmup, decay_start=None if own else round((1 - DECAY) * data.steps), seed=data.seed,
        device="cpu",
    )  # fmt: skip
    ae = trainer.ae
    how = "no decay; its warm-up of 1,000 steps, longer than the run, cut to ours" if own else "the same warm-up and decay"
    note = f"its Adam, {how}; AuxK 1/32 as by its default, idle (dead after 10 M tokens); batches in memory"
    weights = lambda: (ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.T, ae.b_dec)  # noqa: E731
    return Side(f"dictionary_learning {version('dictionary-learning')}", note, trainer.update, weights, ae)


def limit(data: Data) -> Side:
    """What no step does without: the product with the encoder, and the optimiser's pass over its state."""
    parameters = [nn.Parameter(torch.randn_like(weight)) for weight in _weights(TopK(data.blocks.d, NUM_LATENTS, K))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.Adam(parameters, fused=True)
    scores_BN = torch.empty(BATCH, NUM_LATENTS)

    def step(_: int, x_BD: Tensor) -> None:
        torch.mm(x_BD, parameters[0].detach().t(), out=scores_BN)
        optimizer.step()

    return Side("limit (encoder GEMM + Adam)", "float32, into a buffer made once", step)


def _weights(model: Any) -> Weights:
    return model.w_enc_ND, model.b_enc_N, model.w_dec_ND, model.b_dec_D


def _import(package: str, *names: str) -> list[ModuleType]:
    """Modules of a peer, passing over its `__init__`, which wants a language model's tooling, as do some modules."""
    spec = find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit(f"{package} is not installed\nhint: see the top of {Path(__file__).name}")
    bare = ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules.setdefault(package, bare)
    for tooling in ("accelerate", "accelerate.utils", "transformers", "huggingface_hub"):
        sys.modules.setdefault(tooling, MagicMock())
    return [importlib.import_module(f"{package}.{name}") for name in names]


def train(sides: list[Side], data: Data) -> None:
    """All sides through all steps, a turn each; who begins rotates."""
    with BlockStream(data.blocks, BATCH, data.seed) as stream:
        for turn, first in enumerate(range(0, data.steps, STEPS_A_TURN)):
            steps = range(first, min(first + STEPS_A_TURN, data.steps))
            batches = [data.standardise(stream.rows(step)) for step in steps]
            for place in range(len(sides)):
                side = sides[(turn + place) % len(sides)]
                begin = time.perf_counter()
                for step, x_BD in zip(steps, batches, strict=True):
                    side.step(step, x_BD)
                side.turns.append((time.perf_counter() - begin) / len(steps))


@torch.no_grad()
def score(side: Side, data: Data) -> dict[str, Any]:
    """Fidelity over all held-out rows; the standardised inputs' mean over the dataset is 0."""
    assert side.weights is not None
    model, figures = TopK(data.blocks.d, NUM_LATENTS, K), Fidelity(NUM_LATENTS)
    for ours, theirs in zip(_weights(model), side.weights(), strict=True):
        ours.copy_(theirs)
    for start in range(0, data.heldout.stop, BATCH):
        rows_BD = torch.empty(min(BATCH, data.heldout.stop - start), data.heldout.d)
        data.heldout.read_into(start, rows_BD)
        x_BD = data.standardise(rows_BD)
        latents = model.encode(x_BD)
        xhat_BD = model.decode(latents)
        if side.reconstruct is not None:
            torch.testing.assert_close(side.reconstruct(x_BD), xhat_BD, rtol=1e-3, atol=1e-3)
        figures.update(x_BD, xhat_BD, latents, torch.zeros(data.blocks.d))
    return figures.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of an optimized dataset of float32 activations")
    parser.add_argument("--recipe", choices=["shared", "own"], default="shared")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--append", action="store_true", help="add the figures to results.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data, own = Data(options.data, options.tokens, options.seed), options.recipe == "own"
    load = os.getloadavg()[0]
    sides = [plmsae(data), sparsify(data, own), dictionary_learning(data, own)]
    if not own:
        sides += [dense(data), limit(data)]
    train(sides, data)

    cpu = next(line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    common = {
        "run": f"sae-train-cpu-{options.recipe}-{time.strftime('%Y%m%dT%H%M%S')}",
        "device": f"{cpu}, {options.threads} threads, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip(),
        "command": shlex.join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
    }  # fmt: skip
    name = f"sae-train/cpu-d{data.blocks.d}-n{NUM_LATENTS}-k{K}"
    lines = []
    for side in sides:
        if not own:
            slow, fast = (BATCH / q for q in (max(side.turns), min(side.turns)))
            note = f"{side.note}; median of {len(side.turns)} interleaved turns, {slow:,.0f} to {fast:,.0f}; load {load:.1f} at start"
            value = round(side.tokens_per_second())
            lines.append({"name": name, "who": side.who, "value": value, "unit": "tokens/s", **common, "note": note})
        if side.weights is not None:
            found = score(side, data)
            note = f"dead {found['dead_share']:.1%} and L0 {found['l0_mean']:.1f} on {found['tokens']:,} held-out tokens, after {data.steps * BATCH:,} of training; {side.note}"
            fvu = {"name": f"{name}-fvu{'-own' * own}", "who": side.who, "value": round(found["fvu"], 5), "unit": "FVU"}
            lines.append({**fvu, **common, "note": note})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    print(text, end="")
    if options.append:
        with (HERE / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    main()
