"""Two fused steps on one of WORLD gloo ranks: `python rank_steps.py RANK WORLD FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import interpreter
import torch
import torch.distributed as dist
from safetensors.torch import save_file

interpreter.correct()

from plmsae_cli.config.sae import SAE  # noqa: E402
from plmsae_cli.config.training import Train  # noqa: E402
from plmsae_cli.runtime.dist import Gang  # noqa: E402
from plmsae_cli.sae.batch_topk import BatchTopK  # noqa: E402
from plmsae_cli.sae.fused import gradients, update  # noqa: E402
from plmsae_cli.sae.fused.given import AdamOptions, Batch, Masters  # noqa: E402
from plmsae_cli.sae.fused.latents import FusedLatentStep  # noqa: E402
from plmsae_cli.sae.fused.step import FusedStep  # noqa: E402
from plmsae_cli.sae.matryoshka import MatryoshkaTopK  # noqa: E402
from plmsae_cli.sae.topk import TopK  # noqa: E402
from plmsae_cli.store import checkpoint  # noqa: E402
from plmsae_cli.training import sae_kernels  # noqa: E402
from plmsae_cli.training.sae_objective import SAEObjective  # noqa: E402
from plmsae_cli.training.shard import Shard  # noqa: E402
from plmsae_cli.training.stream import BlockStream  # noqa: E402

D, K, ROWS = 32, 4, 8


CASES = {
    "data-TopK": (TopK, 15),  # of two ranks, one has a latent less
    "data-MatryoshkaTopK": (MatryoshkaTopK, 16),
    "data-BatchTopK": (BatchTopK, 16),
    "latents-TopK": (TopK, 16),
    "latents-MatryoshkaTopK": (MatryoshkaTopK, 16),
}


def steps(kind: type[TopK], n: int, latents: bool, gang: Gang) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    model = kind(D, n, K, k_aux=3)
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
    step = (FusedLatentStep if latents else FusedStep)(model, Masters(masters, state, ages_N), batch, adam, gang)
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


class Rows:
    """The global batch of each step, of which a rank reads its share."""

    def __init__(self, gang: Gang) -> None:
        self.blocks, self.wait_seconds, self._gang = SimpleNamespace(d=D, quantiser=None), 0.0, gang

    def rows(self, step: int) -> torch.Tensor:
        rows_BD = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(step))
        return rows_BD.chunk(self._gang.world)[self._gang.rank]


def training(gang: Gang, parallel: str, architecture: str = "topk") -> SAEObjective:
    """As `plmsae train` has it, but on a CPU; some latents are dead from the start."""
    sae_kernels.why_plain = lambda *_: None
    sae = SAE.model_validate({"num_latents": 16, "architecture": architecture, "k": K, "k_aux": 3, "init": "random"})
    options = Train(
        sae=sae, batch_tokens=ROWS, dead_tokens=ROWS, lr=1e-2, eps=1e-3, parallel=parallel, moments="bfloat16"
    )
    stream = cast(BlockStream, Rows(gang))
    objective = SAEObjective(options, stream, torch.zeros(D), 1.0, 3, gang, torch.device("cpu"), torch.bfloat16)
    objective.start(torch.randn(50, D, generator=torch.Generator().manual_seed(99)))
    return objective


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    update.PROGRAMS, gradients.SPLITS = 8, 4  # as many as a GPU is given would only take time
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    for name, (kind, num_latents) in CASES.items():
        latents = world > 1 and name.startswith("latents")
        if world == 1 and name == "latents-MatryoshkaTopK":
            continue  # that of data
        tensors = steps(kind, num_latents, latents, Gang(rank, world, rank))
        save_file(tensors, folder / f"{name}-{rank}-of-{world}.safetensors")
    gang = Gang(rank, world, rank)
    for parallel in ("data", "latents") if world > 1 else ("data",):
        objective = training(gang, parallel)
        for step in range(2):
            objective.step(step)
        if world > 1:
            saved = checkpoint.Checkpoint(2, objective.tensors(), {})
            checkpoint.save(folder / f"saved-{parallel}", saved, 2, rank, world, gang.barrier)
        else:
            objective.step(2)
        objective.release()
        state = {name: p.detach().clone() for name, p in objective.model.named_parameters()}
        save_file(state, folder / f"trained-{parallel}-{rank}-of-{world}.safetensors")
    if world > 1:
        batch_topk = training(gang, "data", "batch_topk")
        batch_topk.step(0)
        checkpoint.save(
            folder / "saved-batch-topk",
            checkpoint.Checkpoint(1, batch_topk.tensors(), {}),
            2,
            rank,
            world,
            gang.barrier,
        )
        batch_topk.release()
        trained = {name: tensor.clone() for name, tensor in batch_topk.model.trained().items()}
        save_file(trained, folder / f"trained-batch-topk-{rank}.safetensors")
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
