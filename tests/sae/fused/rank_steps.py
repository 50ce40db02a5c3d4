"""Two fused steps on one of WORLD gloo ranks: `python rank_steps.py RANK WORLD FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import interpreter
import torch
import torch.distributed as dist
from safetensors.torch import save_file

interpreter.correct()

from plmsae_cli.runtime.dist import Gang  # noqa: E402
from plmsae_cli.sae.fused.latents import FusedLatentStep  # noqa: E402
from plmsae_cli.sae.fused.step import Batch, FusedStep  # noqa: E402
from plmsae_cli.sae.fused.update import AdamOptions  # noqa: E402
from plmsae_cli.sae.matryoshka import MatryoshkaTopK  # noqa: E402
from plmsae_cli.sae.topk import TopK  # noqa: E402
from plmsae_cli.training.shard import Shard  # noqa: E402

D, K, ROWS = 32, 4, 16


CASES = {
    "data-TopK": (TopK, 63),  # of two ranks, one has a latent less
    "data-MatryoshkaTopK": (MatryoshkaTopK, 64),
    "latents-TopK": (TopK, 64),
    "latents-MatryoshkaTopK": (MatryoshkaTopK, 64),
}


def steps(kind: type[TopK], n: int, latents: bool, gang: Gang) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    model = kind(D, n, K, k_aux=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        model.b_enc_N[::4] = -9.0
    model.normalize_decoder()
    state = {}
    shard = Shard(model, gang, ages=latents)
    for name, parameter in shard.parameters.items():
        state |= {f"{name}.{what}": torch.zeros_like(parameter) for what in ("exp_avg", "exp_avg_sq")}
        state[f"{name}.step"] = torch.zeros(())
    ages_N = torch.zeros(n, dtype=torch.int64)
    ages_N[::4] = 10**6  # dead from the start
    batch = Batch(ROWS // gang.world, torch.zeros(D), 1.0, 1000)
    # A large eps: where a gradient is all rounding, Adam's step would be as well.
    if latents:
        ages_N = ages_N[shard.rows.latents].clone()
    masters = {name: p.detach() for name, p in shard.parameters.items()}
    adam = AdamOptions((0.9, 0.999), 1e-3, 0.05)
    step = (FusedLatentStep if latents else FusedStep)(model, masters, state, ages_N, batch, adam, gang)
    out = {}
    for index in range(2):
        rows_BD = torch.randn(ROWS, D, generator=generator).chunk(gang.world)[gang.rank]
        for name, value in step(rows_BD, index, 1e-2).items():
            out[f"figure.{index}.{name}"] = gang.sum(value.clone().double())
    step.settle()
    shard.give_back()
    if latents:
        own, ages_N = ages_N, torch.empty(n, dtype=torch.int64)
        gang.gather_rows_later(own, ages_N).wait()
    return out | {name: p.detach().clone() for name, p in model.named_parameters()} | {"ages_N": ages_N}


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    for name, (kind, num_latents) in CASES.items():
        latents = world > 1 and name.startswith("latents")
        if world == 1 and name == "latents-MatryoshkaTopK":
            continue  # that of data
        tensors = steps(kind, num_latents, latents, Gang(rank, world, rank))
        save_file(tensors, folder / f"{name}-{rank}-of-{world}.safetensors")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
