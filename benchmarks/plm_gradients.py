"""Gradients of a UNet's training step as the device takes it, beside float32 without compiler and without our kernels.

    python benchmarks/plm_gradients.py --fasta train.fasta.xz [--hidden 512 --heads 4 --layers 8]

Trains as `plm_quality.py` does, and at some steps prints for each kind of parameter the least cosine of both gradients, and of
the one under autocast, whose stream is float32, on a pack that is not trained on. About a minute on a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from plm_data import proteins, stream
from plm_quality import settings
from plm_sides import DEVICE, Ours
from torch import Tensor

from plmsae_cli.training.masking import Masked
from plmsae_cli.training.packs import Packs

KINDS = (
    "embedding",
    "value_tables",
    "qkv",
    "out_DD",
    "up_FD",
    "down_DF",
    "value_mix",
    "residual_mix",
    "skip",
    "lm_head",
)
AT = (1, 2, 5, 20, 100)
"""Steps after which gradients are compared."""


def gradients(side: Ours, weights: dict[str, Tensor], pack: Masked) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradient of each parameter) of a pack under these weights."""
    objective = side._objective
    model = objective.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    model.zero_grad()
    total, _ = objective._score(pack, None)
    loss = total / pack.chosen
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def cosine(a: Tensor, b: Tensor) -> float:
    """1 where both are 0, as those of matrices behind one that still is."""
    if not a.any() and not b.any():
        return 1.0
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-300))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1022)
    parser.add_argument("--pack-tokens", type=int, default=65_536)
    parser.add_argument("--steps", type=int, default=max(AT))
    options = parser.parse_args()
    options.mask_rate, options.warmup = 0.2, 10
    shards = stream(proteins(options.fasta), options.max_length)
    packs = Packs(shards, options.pack_tokens, options.max_length + 2, 0)
    for embedded in (True, False):
        plain = {"compute": "float32"}
        made = [settings(options, 0, {"mask_embedding": embedded}, train) for train in ({}, plain, plain)]
        trained, exact, half = (Ours(train, packs, options.steps, n > 0) for n, train in enumerate(made))
        print("<mask> with an embedding" if embedded else "<mask> without an embedding", flush=True)
        for step in range(options.steps):
            trained.step(step)
            if step + 1 not in AT:
                continue
            weights = {name: p.detach().clone() for name, p in trained._objective.model.named_parameters()}
            pack = trained._objective._make(options.steps + 1)[0].to(DEVICE)
            found = [gradients(each, weights, pack) for each in (trained, exact)]
            with torch.autocast(DEVICE.type, torch.bfloat16):
                found.append(gradients(half, weights, pack))
            losses = ", ".join(f"{loss:.5f}" for loss, _ in found)
            print(f"  after {step + 1} steps: losses {losses} (as trained, float32, autocast)")
            for kind in KINDS:
                names = [name for name in weights if kind in name]
                as_trained, autocast = (
                    min(cosine(g[name], found[1][1][name]) for name in names) for g in (found[0][1], found[2][1])
                )
                print(f"    {kind:14} {as_trained:8.5f} as trained, {autocast:8.5f} autocast", flush=True)


if __name__ == "__main__":
    main()
