"""A step of an SAE whose latents are spread over ranks, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from plmsae_cli.sae.latent_shard import LatentShard
from plmsae_cli.training.plain_step import StepParts


class LatentStep:
    """Gathers the ranks' rows, and trains this rank's latents on all of them."""

    def __init__(self, model: LatentShard, parts: StepParts) -> None:
        self._model, self._parts = model, parts

    def __call__(self, rows_BD: Tensor, step: int, rate: float) -> Mapping[str, Tensor]:
        """Train on the ranks' raw rows, of which `rows_BD` are this one's; figures are shares of a sum over ranks."""
        model, gang = self._model, self._parts.gang
        batch = len(rows_BD) * gang.world
        whole_BD = rows_BD.new_empty(batch, rows_BD.shape[1])
        gang.gather_rows_later(rows_BD, whole_BD).wait()
        x_BD = self._parts.standardise(whole_BD)
        dead_N = self._parts.dead.mask(self._parts.window)
        model.schedule(step, self._parts.total_steps)
        compute = self._parts.compute
        with torch.autocast(x_BD.device.type, compute, enabled=compute != torch.float32):
            losses = model.loss(x_BD, dead_N, batch)
        self._parts.optimizer.zero_grad()
        losses.total.backward()  # type: ignore[no-untyped-call]
        assert model.b_dec_D.grad is not None
        gang.sum(model.b_dec_D.grad)
        model.project_gradients()
        norm = self._norm()
        self._parts.optimizer.step(rate, self._parts.max_norm, norm)
        model.normalize_decoder()
        self._parts.dead.update(losses.fired_N, batch)
        active_B = gang.sum(losses.active_B.double())
        l0, squares = active_B.mean(), active_B.square().mean()
        figures = {
            "loss": losses.total,
            "reconstruction": losses.reconstruction,
            "aux": losses.aux,
            "fvu": (losses.xhat_BD - x_BD).square().sum() / x_BD.square().sum(),
            "l0": l0,
            "l0_std": (squares - l0.square()).clamp(min=0.0).sqrt(),
            "grad_norm": model.d * norm,
        }
        share = 1.0 / gang.world  # of figures that every rank knows whole
        return {name: value * share for name, value in figures.items()} | {"dead": dead_N.float().mean() * share}

    def _norm(self) -> Tensor:
        """Of the gradient over all ranks' latents."""
        squares = torch.zeros((), device=self._model.b_dec_D.device)
        for name, parameter in self._model.named_parameters():
            assert parameter.grad is not None
            square = torch.linalg.vector_norm(parameter.grad).square()
            squares = squares + (square if name != "b_dec_D" else square / self._parts.gang.world)
        return self._parts.gang.sum(squares).sqrt()
