"""Tokens a second of one SAE training step on a CPU: ours beside the same step in plain dense PyTorch.

A step is forward, backward, projection of the decoder's gradient, clipping, Adam, renormalisation; no
loading.

    python benchmarks/sae_step_cpu.py [--threads 2] [--steps 5] [--dead 0.0 0.3] [--shape 4096 320 2560 32]

One JSON line a shape, share of dead latents and side. The sides take turns and the fastest step counts, so
that other load on the machine disturbs both alike.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from plmsae_cli.sae.initialise import initialise
from plmsae_cli.sae.matryoshka import MatryoshkaTopK
from plmsae_cli.sae.topk import TopK
from plmsae_cli.training.optimizers import Adam, Group

SHAPES = [(2048, 192, 1536, 16), (4096, 320, 2560, 32), (8192, 320, 2560, 64), (4096, 320, 5120, 64)]
LEARNING_RATE, MAX_NORM = 2e-4, 1.0


def synthetic(rows: int, d: int) -> Tensor:
    """Sparse sums of 4 d directions plus noise, of mean square norm near d."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d, d, generator=generator) / d**0.5
    active = torch.rand(rows, 4 * d, generator=generator) < 0.01
    x = (active * torch.rand(rows, 4 * d, generator=generator)) @ directions
    x = x + 0.05 * torch.randn(rows, d, generator=generator)
    return x * (d / x.square().sum(1).mean()).sqrt()


def ours(kind: type[TopK], x: Tensor, num_latents: int, k: int, dead: Tensor) -> Callable[[], None]:
    """The package's step."""
    model = kind(x.shape[1], num_latents, k)
    initialise(model, 0, x[:1024])
    optimizer = Adam([Group("sae", dict(model.named_parameters()))], betas=(0.9, 0.999), eps=6.25e-10)

    def step() -> None:
        optimizer.zero_grad()
        model.loss(x, dead, len(x)).total.backward()
        model.project_gradients()
        optimizer.step(LEARNING_RATE, MAX_NORM)
        model.normalize_decoder()

    return step


class Dense(nn.Module):
    """The formulas as written, with torch's dense operations throughout."""

    def __init__(self, x: Tensor, num_latents: int, k: int) -> None:
        super().__init__()
        d = x.shape[1]
        self.k, self.k_aux = k, d // 2
        self.decoder = nn.Parameter(nn.functional.normalize(torch.randn(num_latents, d), dim=1))
        self.encoder = nn.Parameter(self.decoder.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(num_latents))
        self.b_dec = nn.Parameter(x.mean(0))

    def loss(self, x: Tensor, dead: Tensor) -> Tensor:
        pre = nn.functional.linear(x - self.b_dec, self.encoder, self.b_enc)
        top = pre.topk(self.k, dim=1)
        xhat = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu()) @ self.decoder + self.b_dec
        total = (x - xhat).square().sum() / x.numel()
        num_dead = int(dead.sum())
        if num_dead:
            error = (x - xhat).detach()
            top = pre.masked_fill(~dead, -torch.inf).topk(min(self.k_aux, num_dead), dim=1)
            ehat = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu()) @ self.decoder
            ramp = min(num_dead / self.k_aux, 1.0)
            total = total + ramp / 32 * (ehat - error).square().sum() / error.square().sum()
        return total


def dense(x: Tensor, num_latents: int, k: int, dead: Tensor) -> Callable[[], None]:
    """The twin's step, with torch's fused Adam."""
    model = Dense(x, num_latents, k)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, eps=6.25e-10, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model.loss(x, dead).backward()
        grad, rows = model.decoder.grad, model.decoder.data
        assert grad is not None
        grad -= (grad * rows).sum(1, keepdim=True) * rows
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        rows /= rows.norm(dim=1, keepdim=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dead", type=float, nargs="+", default=[0.0])
    parser.add_argument("--shape", type=int, nargs=4, action="append", metavar=("B", "D", "N", "K"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for rows, d, num_latents, k in options.shape or SHAPES:
        x = synthetic(rows, d)
        for share in options.dead:
            dead = torch.arange(num_latents) < share * num_latents
            sides = {
                "plmsae topk": ours(TopK, x, num_latents, k, dead),
                "plmsae matryoshka_topk": ours(MatryoshkaTopK, x, num_latents, k, dead),
                "dense torch topk": dense(x, num_latents, k, dead),
            }
            seconds = dict.fromkeys(sides, float("inf"))
            for turn in range(options.steps + 1):
                for who, step in sides.items():
                    begin = time.perf_counter()
                    step()
                    if turn:  # the first warms up
                        seconds[who] = min(seconds[who], time.perf_counter() - begin)
            for who, best in seconds.items():
                shape = {"batch": rows, "d": d, "num_latents": num_latents, "k": k, "dead": share}
                figures = {"step_ms": round(best * 1e3, 1), "tokens_per_s": round(rows / best)}
                print(json.dumps({"who": who, **shape, "threads": options.threads, **figures}), flush=True)


if __name__ == "__main__":
    main()
