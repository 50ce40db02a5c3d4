"""Steps of a UNet's training against its formulas in float64: plain autograd, Adam, and Muon matrix by matrix."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plmsae_cli.config.experiment import Train
from plmsae_cli.plm.alphabet import AMINO_ACIDS, MASK, PAD, Packed, encode, wrap
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.training.counter import uniform
from plmsae_cli.training.masking import IGNORED, corrupt
from plmsae_cli.training.packs import Packs
from plmsae_cli.training.plm_objective import PLMObjective
from tests.plm.unet_formulas import written_out

STEPS, WARMUP, MOMENTUM_WARMUP = 12, 3, 8
RATES = {"lr_hidden": 0.05, "lr_embed": 0.06, "lr_head": 0.008, "lr_scalar": 0.04}
BETAS = (0.8, 0.95)
EPS = 1e-6
"""Of Adam: gradients that are 0 but for rounding, as those of the stream's factors in the first step, stay without effect."""


def rate_of(name: str, parameter: Tensor) -> float:
    if name.startswith(("embedding_VD", "value_tables")):
        return RATES["lr_embed"]
    if name.startswith("lm_head"):
        return RATES["lr_head"]
    return RATES["lr_hidden"] if parameter.ndim > 1 else RATES["lr_scalar"]


def orthogonal(matrix: Tensor) -> Tensor:
    """Five quintic steps of Newton-Schulz, on the singular values themselves."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum().sqrt().clamp(min=1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ vh


Document = tuple[Tensor, Tensor, float]
"""Inputs, targets, and what each of its cross-entropies weighs."""


class Formulas:
    """The model and its optimisers in float64."""

    def __init__(self, config: Any, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.weights = {name: w.double().clone().requires_grad_() for name, w in weights.items()}
        self.muons = {n: torch.zeros_like(w) for n, w in self.weights.items() if n.startswith("layers") and w.ndim > 1}
        adams = [{"params": [w], "peak": rate_of(n, w)} for n, w in self.weights.items() if n not in self.muons]
        self.adam = torch.optim.Adam(adams, lr=0.0, betas=BETAS, eps=EPS)

    def loss(self, documents: list[Document], terms: int) -> tuple[Tensor, int]:
        """The weighted cross-entropies summed over `terms`, and how many of the predictions are right."""
        loss, hits = torch.zeros((), dtype=torch.float64), 0
        for inputs, targets, weight in documents:
            logits = written_out(self.config, self.weights, inputs)[1]
            loss = loss + F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") * weight / terms
            hits += int((logits.argmax(-1) == targets).sum())
        return loss, hits

    def step(self, number: int, documents: list[Document]) -> float:
        """Of documents of which each target counts alike."""
        loss, _ = self.loss(documents, sum(int((targets != IGNORED).sum()) for _, targets, _ in documents))
        grads = dict(zip(self.weights, torch.autograd.grad(loss, list(self.weights.values())), strict=True))
        scale = min((number + 1) / (WARMUP + 1), (1 + np.cos(np.pi * (1 - (STEPS - number) / (STEPS + 1)))) / 2)
        mu = 0.85 + 0.1 * min(1.0, number / MOMENTUM_WARMUP)
        with torch.no_grad():
            for name, w in self.weights.items():
                if name not in self.muons:
                    w.grad = grads[name]
                    continue
                momentum = self.muons[name].mul_(mu).add_(grads[name], alpha=1 - mu)
                mixed = (1 - mu) * grads[name] + mu * momentum
                shape = w.shape[-2:]
                updates = torch.stack([orthogonal(each) for each in mixed.view(-1, *shape)]).view(w.shape)
                w -= scale * RATES["lr_hidden"] * max(1.0, shape[0] / shape[1]) ** 0.5 * updates
            for group in self.adam.param_groups:
                group["lr"] = scale * group["peak"]
        self.adam.step()
        return float(loss.detach())


def packs_of(count: int) -> Packs:
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list(AMINO_ACIDS), rng.integers(20, 50))) for _ in range(count)]
    return Packs([np.concatenate([wrap(encode(s)) for s in sequences])], 256, 64, 0)


def trained(packs: Packs, **plm: Any) -> PLMObjective:
    options = Train.model_validate(
        {
            "kind": "plm", "optimizer": "muon", "batch_tokens": 256, "betas": list(BETAS), "eps": EPS, "grad_clip": None,
            "lr_warmup_steps": WARMUP, "seed": 1,
            "plm": {
                "architecture": "unet", "fasta": "none.fasta", "num_layers": 4, "hidden_size": 32, "num_attention_heads": 2,
                "max_length": 62, "pack_tokens": 256, "mask_rate": 0.2, "weight_decay": 0.0,
                "window": None, "scheduler_type": "cosine", "cooldown_steps": STEPS,
                "muon_momentum_warmup_steps": MOMENTUM_WARMUP, **RATES, **plm,
            },
        }
    )  # fmt: skip
    return PLMObjective(options, packs, {}, STEPS, Gang(), torch.device("cpu"), torch.float32)


def edges_of(packed: Packed) -> list[tuple[int, int]]:
    """Where the documents of a pack begin and end."""
    return [(a, b) for a, b in pairwise(packed.cu_seqlens.tolist()) if b > a and packed.tokens_T[a] != PAD]


@pytest.mark.parametrize("mask_embedding", [True, False])
def test_losses_of_a_dozen_steps_are_the_formulas(mask_embedding: bool) -> None:
    """Without an embedding of <mask> the first gradient, of the blocks' last matrices, is a million times those to come, and
    Muon's momentum keeps its direction: a slip of any norm's eps shows in the second loss."""
    packs = packs_of(60)
    one = trained(packs, corruption="mask", mask_embedding=mask_embedding)
    peer = Formulas(one.config, {name: p.detach() for name, p in one.model.named_parameters()})
    for step in range(STEPS):
        packed = packs.pack(step)
        inputs_T, targets_T = corrupt(packed.tokens_T, packed.residue_mask_T, 0.2, "mask", 1, step)
        documents = [(inputs_T[a:b], targets_T[a:b], 1.0) for a, b in edges_of(packed)]
        assert float(one.step(step)["loss"]) == pytest.approx(peer.step(step, documents), rel=2e-5), step


def test_losses_of_masked_diffusion_and_its_warm_up_are_the_formulas() -> None:
    """sum(CE / t) over all residues there are: t a document's own, or the mask rate of those that the warm-up has not reached."""
    steps, warm = 6, 4
    packs = packs_of(60)
    one = trained(packs, objective="masked_diffusion", diffusion_warmup_steps=warm)
    kinds: set[bool] = set()
    for step in range(steps):
        packed = packs.pack(step)
        edges = edges_of(packed)
        index_S = torch.arange(len(edges))
        own_S = uniform(index_S, 1, step, 4) < min(1.0, step / warm)
        share_S = torch.where(own_S, 0.001 + 0.999 * uniform(index_S, 1, step, 3), 0.2).double()
        kinds |= set(own_S.tolist()) if 0 < step < warm else set()
        place_T = torch.arange(len(packed.tokens_T))
        chosen_T, documents = torch.zeros(len(place_T), dtype=torch.bool), []
        for share, (a, b) in zip(share_S.tolist(), edges, strict=True):
            chosen_T[a + 1 : b - 1] = uniform(place_T[a + 1 : b - 1], 1, step, 0) < share
            tokens, chosen = packed.tokens_T[a:b].long(), chosen_T[a:b]
            documents.append((tokens.masked_fill(chosen, MASK), tokens.masked_fill(~chosen, IGNORED), 1 / share))
        residues = sum(b - a - 2 for a, b in edges)
        loss, hits = Formulas(one.config, {n: p.detach() for n, p in one.model.named_parameters()}).loss(
            documents, residues
        )
        found = one.step(step)
        assert float(found["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4), step
        assert float(found["accuracy"]) == pytest.approx(hits / int(chosen_T.sum()), abs=1e-6), step
        assert float(found["masked"]) == pytest.approx(int(chosen_T.sum()) / residues, rel=1e-6), step
    assert kinds == {False, True}, "the warm-up has both kinds of documents"
