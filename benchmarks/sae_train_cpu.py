"""Training a TopK dictionary on a CPU: ours beside sparsify's and dictionary_learning's, one run, the same rows.

Peers go into an environment that shares this one's torch, without what their language-model tooling needs:

    pip install --no-deps eai-sparsify==1.3.3 dictionary-learning==0.1.0
    pip install einops natsort simple-parsing schedulefree
    plmsae optimize blocks.yaml --with-inputs       # any experiment; figures are of the bundled model's layer 5
    python benchmarks/sae_train_cpu.py runs/data/optimize-<key> [--recipe shared | own] [--append]

Every side sees the blocks of the dataset in the same order, standardised alike. Sides take turns, some steps each, so that
other load on the machine disturbs all alike; tokens a second are those of the median turn. Held-out rows are scored by
`Fidelity`, peers' weights being copied into our TopK (and checked to reconstruct as the peer does).

`shared`: one learning rate and schedule for all, clipping and Adam for all, the rest as each side's defaults have it.
`own`: each side's own optimiser and schedule; only the fidelity is recorded, as the steps differ in kind.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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
from plmsae_cli.store.fs import Store, join
from plmsae_cli.training.sae_objective import MEDIAN_ROWS, SAEObjective
from plmsae_cli.training.schedules import learning_rate, topk_learning_rate
from plmsae_cli.training.stream import BlockStream

NUM_LATENTS, K, BATCH = 1536, 32, 2048
DECAY = 0.2
STEPS_A_TURN = 8
RESULTS = Path(__file__).with_name("results.jsonl")


@dataclass
class Side:
    """One contestant: its step on a standardised batch, and what it has learnt."""

    who: str
    note: str
    step: Callable[[int, Tensor], Any]
    weights: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
    """w_enc [N, D], b_enc [N], w_dec [N, D], b_dec [D]."""
    reconstruct: Callable[[Tensor], Tensor] | None = None
    turns: list[float] = field(default_factory=list)
    """Seconds a step, of each turn."""

    def dictionary(self, x_BD: Tensor) -> TopK:
        """Our TopK with this side's weights; `x_BD` shows that it is the same function."""
        assert self.weights is not None and self.reconstruct is not None
        w_enc_ND, b_enc_N, w_dec_ND, b_dec_D = self.weights()
        model = TopK(x_BD.shape[1], NUM_LATENTS, K)
        state = {"w_enc_ND": w_enc_ND, "b_enc_N": b_enc_N, "w_dec_ND": w_dec_ND, "b_dec_D": b_dec_D}
        model.load_state_dict(state, strict=False)
        torch.testing.assert_close(model(x_BD), self.reconstruct(x_BD), rtol=1e-3, atol=1e-3)
        return model


@dataclass(frozen=True)
class Data:
    """The dataset, and the run's length."""

    blocks: Blocks
    mean_D: Tensor
    scale: float
    steps: int
    seed: int

    def standardise(self, rows_BD: Tensor) -> Tensor:
        return (rows_BD.float() - self.mean_D) * self.scale

    def rate(self, step: int) -> float:
        """The shared schedule: ours by default."""
        return learning_rate(step, self.steps, topk_learning_rate(NUM_LATENTS), self.warmup, DECAY)

    @property
    def warmup(self) -> int:
        return min(1000, self.steps // 20)


def plmsae(data: Data) -> Side:
    """The product: SAEObjective on a BlockStream."""
    options = Train(sae=SAE(num_latents=NUM_LATENTS, k=K), batch_tokens=BATCH, seed=data.seed, lr_decay=DECAY)
    stream = BlockStream(data.blocks, BATCH, data.seed)
    cpu = torch.device("cpu")
    objective = SAEObjective(options, stream, data.mean_D, data.scale, data.steps, Gang(), cpu, torch.float32)
    sample_RD = torch.empty(MEDIAN_ROWS, data.blocks.d, dtype=data.blocks.dtype)
    data.blocks.read_into(0, sample_RD)
    objective.start(sample_RD)
    model = objective.model
    note = f"SAEObjective with BlockStream; AuxK 1/32, dead after {data.steps * BATCH // 10:,} tokens"
    weights = lambda: (model.w_enc_ND, model.b_enc_N, model.w_dec_ND, model.b_dec_D)  # noqa: E731
    return Side("plmsae", note, lambda step, _: objective.step(step), weights, model)


def sparsify(data: Data, own: bool) -> Side:
    """Its SparseCoder, in the order of its Trainer."""
    sparse_coder, config = _import("sparsify", "sparse_coder", "config")
    torch.manual_seed(data.seed)
    sae = sparse_coder.SparseCoder(data.blocks.d, config.SparseCoderConfig(num_latents=NUM_LATENTS, k=K))
    if own:
        (sign_sgd,) = _import("sparsify", "sign_sgd")
        from schedulefree import ScheduleFreeWrapper  # type: ignore[import-not-found]

        rate = 5e-3 / (NUM_LATENTS / 2**14) ** 0.5
        optimizer = ScheduleFreeWrapper(sign_sgd.SignSGD(sae.parameters(), lr=rate), momentum=0.95)
        optimizer.train()
        how = f"schedule-free signum, lr {rate:.2g}, no clipping"
    else:
        optimizer = torch.optim.Adam(sae.parameters(), fused=True)
        how = "fused Adam, clipping"

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

    def reconstruct(x_BD: Tensor) -> Tensor:
        return sae(x_BD).sae_out

    def weights() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if own:
            optimizer.eval()  # the averaged weights
        return sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec

    note = f"{how}; AuxK off by its default; eager decoder; batches ready in memory"
    return Side(f"sparsify {importlib.metadata.version('eai-sparsify')}", note, step, weights, reconstruct)


def dictionary_learning(data: Data, own: bool) -> Side:
    """Its TopKTrainer."""
    (top_k,) = _import("dictionary_learning", "trainers.top_k")
    decay_start = None if own else round((1 - DECAY) * data.steps)
    trainer = top_k.TopKTrainer(
        steps=data.steps, activation_dim=data.blocks.d, dict_size=NUM_LATENTS, k=K, layer=0, lm_name="",
        warmup_steps=data.warmup, decay_start=decay_start, seed=data.seed, device="cpu",
    )  # fmt: skip
    ae = trainer.ae
    note = (
        f"its Adam, {'no decay' if own else 'the same decay'}, warm-up {data.warmup} steps; AuxK 1/32 on by its default, "
        "but idle: dead after 10 M tokens; batches ready in memory"
    )
    if own:
        note += "; its default warm-up of 1,000 steps is longer than the run"
    weights = lambda: (ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.T, ae.b_dec)  # noqa: E731
    who = f"dictionary_learning {importlib.metadata.version('dictionary-learning')}"
    return Side(who, note, trainer.update, weights, ae)


def dense(data: Data) -> Side:
    """The plain twin, from our initial weights and without AuxK."""
    start = TopK(data.blocks.d, NUM_LATENTS, K)
    sample_RD = torch.empty(MEDIAN_ROWS, data.blocks.d, dtype=data.blocks.dtype)
    data.blocks.read_into(0, sample_RD)
    initialise(start, data.seed, data.standardise(sample_RD))
    model = Dense(data.standardise(sample_RD), NUM_LATENTS, K)
    parameters = {"encoder": start.w_enc_ND, "decoder": start.w_dec_ND, "b_enc": start.b_enc_N, "b_dec": start.b_dec_D}
    model.load_state_dict(parameters)
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

    twin = TopK(data.blocks.d, NUM_LATENTS, K)
    weights = lambda: (model.encoder, model.b_enc, model.decoder, model.b_dec)  # noqa: E731
    return Side("dense torch", "our formulas in dense PyTorch; AuxK off; batches ready in memory", step, weights, twin)


def limit(data: Data) -> Side:
    """What no step can do without: the product with the encoder, and a pass over the optimiser's state."""
    d = data.blocks.d
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((NUM_LATENTS, d), (NUM_LATENTS, d), (NUM_LATENTS,), (d,))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.Adam(parameters, fused=True)
    scores_BN = torch.empty(BATCH, NUM_LATENTS)
    weights_DN = torch.randn(NUM_LATENTS, d).t()

    def step(_: int, x_BD: Tensor) -> None:
        torch.mm(x_BD, weights_DN, out=scores_BN)
        optimizer.step()

    return Side("limit (encoder GEMM + Adam)", "float32; nothing else of the step", step)
