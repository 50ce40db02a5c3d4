"""Three steps of every architecture on one of four gloo ranks, then of two: `python rank_steps.py RANK FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from plmsae_cli.config.sae import SAE
from plmsae_cli.config.training import Train
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.store import checkpoint
from plmsae_cli.store.checkpoint import Part
from plmsae_cli.training.sae_objective import SAEObjective
from plmsae_cli.training.stream import BlockStream

D, N, BATCH, STEPS = 16, 64, 64, 3
KINDS: dict[str, SAE] = {
    "topk": SAE(num_latents=N, k=3),
    "multi_topk": SAE(num_latents=N, architecture="multi_topk", k=3),
    "annealed": SAE(num_latents=N, k=3, k_start=9, k_anneal=1.0),
    "matryoshka_topk": SAE(num_latents=N, architecture="matryoshka_topk", k=3),
    "batch_topk": SAE(num_latents=N, architecture="batch_topk", k=3),
    "matryoshka_batch_topk": SAE(num_latents=N, architecture="matryoshka_batch_topk", k=3),
    "jumprelu": SAE(num_latents=N, architecture="jumprelu", bandwidth=1.0),
    "jumprelu_target": SAE(num_latents=N, architecture="jumprelu", bandwidth=1.0, target_l0=5.0),
    "jumprelu_tanh": SAE(num_latents=N, architecture="jumprelu", penalty="tanh"),
    "gated": SAE(num_latents=N, architecture="gated"),
    "relu_l1": SAE(num_latents=N, architecture="relu_l1"),
    "relu_l1_norm": SAE(num_latents=N, architecture="relu_l1", unit_rows=True, error="norm"),
    "switch": SAE(num_latents=N, architecture="switch", k=3, num_experts=4),
    "latents_topk": SAE(num_latents=N, k=3),
    "latents_wide": SAE(num_latents=N, k=20, k_aux=60),
    "latents_annealed": SAE(num_latents=N, k=3, k_start=9, k_anneal=1.0),
    "latents_matryoshka_topk": SAE(num_latents=N, architecture="matryoshka_topk", k=3),
}


class Rows:
    """The global batch of each step, of which a rank reads its share."""

    def __init__(self, rank: int, world: int) -> None:
        self.blocks = SimpleNamespace(d=D, quantiser=None)
        self.wait_seconds = 0.0
        self._rank, self._world = rank, world

    def rows(self, step: int) -> torch.Tensor:
        rows_BD = torch.randn(BATCH, D, generator=torch.Generator().manual_seed(step))
        return rows_BD.chunk(self._world)[self._rank]


def steps(kind: str, gang: Gang) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """State, gradients of the last step, and figures of every step, summed over ranks."""
    # A large eps: where a gradient is all rounding, Adam's step would be as well.
    options = Train(sae=KINDS[kind], batch_tokens=BATCH, dead_tokens=BATCH, lr=1e-3, eps=1e-3, grad_clip=0.5)
    if kind.startswith("latents"):
        options = options.model_copy(update={"parallel": "latents"})
    stream = cast(BlockStream, Rows(gang.rank, gang.world))
    objective = SAEObjective(
        options, stream, torch.zeros(D), 1.0, STEPS, gang, torch.device("cpu"), torch.float32
    )  # fmt: skip
    first, own = objective.model.first_row, stream.rows(0)
    assert torch.equal(own, Rows(0, 1).rows(0)[first : first + len(own)]), "first_row is the place of this rank's rows"
    objective.start(torch.randn(200, D, generator=torch.Generator().manual_seed(99)))
    figures = []
    for step in range(STEPS):
        found = {name: gang.sum(value.detach().clone().double()) for name, value in objective.step(step).items()}
        figures.append({name: float(value) for name, value in found.items()})
    tensors = {name: whole(tensor, gang) for name, tensor in objective.tensors().items()}
    shard = objective._shard
    trained = dict(objective.model.named_parameters()) if shard is None else shard.parameters
    for name, parameter in trained.items():
        assert parameter.grad is not None
        grad = parameter.grad
        tensors[f"grad.{name}"] = whole(grad if shard is None else shard.parts({name: grad})[name], gang)
    return tensors, figures


def sum_terms(world: int) -> torch.Tensor:
    """What each rank adds to a sum, as it sends it."""
    return torch.randn(world, 80_000, generator=torch.Generator().manual_seed(world)).bfloat16()


def training(gang: Gang, parallel: str) -> SAEObjective:
    options = Train(
        sae=SAE(num_latents=N, k=3), batch_tokens=BATCH, dead_tokens=BATCH, lr=1e-3, eps=1e-3, parallel=parallel
    )
    stream = cast(BlockStream, Rows(gang.rank, gang.world))
    return SAEObjective(options, stream, torch.zeros(D), 1.0, STEPS, gang, torch.device("cpu"), torch.float32)


def begin(gang: Gang, folder: Path) -> dict[str, torch.Tensor]:
    """Two steps with the latents spread, saved; the state saved, whole."""
    objective = training(gang, "latents")
    objective.start(torch.randn(200, D, generator=torch.Generator().manual_seed(99)))
    for step in range(2):
        objective.step(step)
    saved = checkpoint.Checkpoint(2, objective.tensors(), {})
    checkpoint.save(folder, saved, 2, gang.rank, gang.world, gang.barrier)
    return {name: whole(tensor, gang) for name, tensor in saved.tensors.items()}


def resume(gang: Gang, folder: Path, parallel: str) -> dict[str, torch.Tensor]:
    """The third step, from what `begin` saved; parameters as exported."""
    objective = training(gang, parallel)
    found = checkpoint.load_newest(folder)
    assert found is not None
    objective.start(torch.randn(200, D, generator=torch.Generator().manual_seed(99)))
    objective.load(found.tensors)
    objective.step(found.step)
    objective.release()
    return {name: p.detach().clone() for name, p in objective.model.named_parameters()}


def whole(tensor: torch.Tensor | Part, gang: Gang) -> torch.Tensor:
    if not isinstance(tensor, Part):
        return tensor.clone()
    found = tensor.rows.new_empty(tensor.length, *tensor.rows.shape[1:])
    gang.gather_rows_later(tensor.rows.detach().contiguous(), found).wait()
    return found


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for world in (4, 2):
        if rank >= world:
            return
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
        every: dict[str, Any] = {}
        for kind in KINDS:
            tensors, figures = steps(kind, Gang(rank, world, rank))
            save_file(tensors, folder / f"{kind}-{rank}-of-{world}.safetensors")
            every[kind] = figures
        (folder / f"figures-{rank}-of-{world}.json").write_text(json.dumps(every))
        save_file(
            begin(Gang(rank, world, rank), folder / f"saved-by-{world}"),
            folder / f"whole-{rank}-of-{world}.safetensors",
        )
        again, _ = steps("latents_topk", Gang(rank, world, rank))
        save_file(again, folder / f"again-{rank}-of-{world}.safetensors")
        terms_WN = sum_terms(world)
        own_P = terms_WN.new_empty(terms_WN.shape[1] // world)
        Gang(rank, world, rank).sum_rows_later(terms_WN[rank].clone(), own_P).wait()
        save_file({"own_P": own_P}, folder / f"sum-{rank}-of-{world}.safetensors")
        if world == 2:
            for parallel in ("latents", "data"):
                resumed = resume(Gang(rank, world, rank), folder / "saved-by-4", parallel)
                save_file(resumed, folder / f"resumed-{parallel}-{rank}.safetensors")
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
