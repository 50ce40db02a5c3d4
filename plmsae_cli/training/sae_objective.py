"""A sparse autoencoder on a stream of activation blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Train
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.sae.architectures import ARCHITECTURES
from plmsae_cli.sae.dead import DeadLatents, dead_window
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.initialise import initialise
from plmsae_cli.sae.latent_shard import LatentShard
from plmsae_cli.sae.topk import TopK
from plmsae_cli.store.checkpoint import Part
from plmsae_cli.training.latent_step import LatentStep
from plmsae_cli.training.mixing import BatchEntropy
from plmsae_cli.training.optimizers import Group, build_optimizer
from plmsae_cli.training.parallel import demand_latents, sharing
from plmsae_cli.training.plain_step import PlainStep, StepParts
from plmsae_cli.training.sae_kernels import demand_fused, fused_step, goes_fused, why_no_kernels
from plmsae_cli.training.schedules import learning_rate, sae_learning_rate
from plmsae_cli.training.shard import AGES, Shard
from plmsae_cli.training.stream import Stream

DEAD_BOUND = "dead_bound"
"""In checkpoints of the fused step: what it goes by until it has counted the dead again."""
MEDIAN_ROWS = 32_768
"""Rows whose geometric median starts b_dec (Gao et al. 2024)."""


def build(options: Train, d: int) -> Dictionary:
    """The untrained dictionary of these options for activations of dimension `d`.

    Raises ValueError where its architecture cannot have them at this width.
    """
    sae = options.autoencoder()
    model = ARCHITECTURES[sae.architecture](d, sae.width(d), **sae.options())
    if isinstance(model, TopK):
        model.aux_fitted = sae.aux_fitted
    return model


def outline(options: Train, d: int, world: int) -> Dictionary:
    """The same without memory for its weights: what a plan asks before anything runs.

    Raises UserError where the options do not fit its width, or what they insist on cannot be had on any `world` ranks.
    """
    sae = options.autoencoder()
    width = sae.width(d)
    if not width:
        raise UserError(
            f"train.sae.expansion ({sae.expansion}) x {d} dimensions is less than one latent",
            "raise expansion, or set num_latents",
        )
    if sae.has("k") and sae.k > width:
        raise UserError(
            f"train.sae.k ({sae.k}) is larger than the dictionary ({width} latents)", "lower k or raise expansion"
        )
    try:
        with torch.device("meta"):
            model = build(options, d)
    except ValueError as error:
        raise UserError(f"train.sae: {error}", "the width is expansion x d, or num_latents") from None
    demand_latents(model, options, world)
    demand_fused(options, why_no_kernels(model, options, world))
    return model


def peak_rate(options: Train, model: Dictionary, total_steps: int) -> float:
    """The peak learning rate of a run: the one asked for, or what `auto` is for this model and length."""
    if options.lr != "auto":
        return options.lr
    return sae_learning_rate(options.optimizer, model.num_latents, model.d, total_steps)


class SAEObjective:
    """Step, state and figures of one SAE.

    A step (Gao et al. 2024): backward, sum over ranks, remove the gradient along each decoder row, clip, update, renormalise
    rows. Inputs are (x - mean) * scale with the dataset's statistics, so that E||x||^2 = d.
    """

    def __init__(
        self,
        options: Train,
        stream: Stream,
        mean_D: torch.Tensor,
        scale: float,
        total_steps: int,
        gang: Gang,
        device: torch.device,
        compute: torch.dtype,
        entropy: BatchEntropy | None = None,
    ) -> None:
        self.device = device
        self.tokens_per_step = options.batch_tokens
        self.model = build(options, stream.blocks.d).to(device)
        self.model.first_row = gang.rank * (options.batch_tokens // gang.world)
        self._options, self._stream, self._gang, self._entropy = options, stream, gang, entropy
        self._mean_D, self._scale, self.compute = mean_D.to(device), scale, compute
        quantiser = stream.blocks.quantiser
        self._raw = None if quantiser is None else quantiser.to(device)
        self._standard = None if self._raw is None else self._raw.folded(self._mean_D, scale)
        self._total_steps = total_steps
        fused = goes_fused(self.model, options, device, compute, gang.world)
        self.sharing = sharing(self.model, options, gang.world, fused)
        """What ranks share: `data` or `latents`."""
        spread = gang.world > 1 and (fused or self.sharing == "latents")
        self._shard = Shard(self.model, gang, ages=self.sharing == "latents") if spread else None
        trained, first_rows = dict(self.model.named_parameters()), {}
        if self._shard is not None:
            trained, first_rows = self._shard.parameters, self._shard.first_rows
        self._optimizer = build_optimizer(options, [Group("sae", trained, first_rows=first_rows)])
        own = self.model.num_latents if self.sharing == "data" else len(trained["w_enc_ND"])
        self._dead = DeadLatents(own, device)
        tokens = total_steps * options.batch_tokens
        self._window = dead_window(tokens) if options.dead_tokens == "auto" else options.dead_tokens
        self._peak = peak_rate(options, self.model, total_steps)
        # The loss is a mean over d; the clip is meant for the gradient of the sum.
        self._max_norm = None if options.grad_clip is None else options.grad_clip / self.model.d
        wanted = options.lr_warmup_steps
        self._warmup = min(1000, total_steps // 20) if wanted == "auto" else wanted
        self._plain: PlainStep | LatentStep | None = None
        if not fused:
            parts = StepParts(
                self._optimizer,
                self._dead,
                self._window,
                self._max_norm,
                self.standardise,
                compute,
                total_steps,
                gang,
                options.compile,
            )
            if self.sharing == "latents":
                assert self._shard is not None
                assert isinstance(self.model, TopK)
                part = LatentShard(self.model, self._shard.rows, self._shard.parameters, gang)
                self._plain = LatentStep(part, parts)
            else:
                self._plain = PlainStep(self.model, parts)
        self._fused = None
        if fused:
            self._fused = fused_step(
                self.model,
                options,
                {name: parameter.detach() for name, parameter in trained.items()},
                {name.removeprefix("sae."): tensor for name, tensor in self._optimizer.state_tensors().items()},
                self._dead.tokens_since_fired_N,
                self._mean_D,
                scale,
                self._window,
                self._max_norm,
                gang,
                latents=self.sharing == "latents",
            )

    def start(self, sample_RD: torch.Tensor) -> None:
        """Initialise from a sample of raw rows (the first of the dataset, the same on every rank)."""
        initialise(self.model, self._options.seed, self.standardise(sample_RD), self._options.autoencoder().init)
        if self._shard is not None:
            self._shard.take()
        self._renew()

    def release(self) -> None:
        """Free what only training needs and make `model` whole, on all ranks; `step` may not follow."""
        if self._fused is not None:
            self._fused.settle()
        self._fused = None
        self._optimizer.zero_grad()
        if self._shard is not None:
            self._shard.give_back()

    def _renew(self) -> None:
        if self._fused is not None:
            self._fused.copy_parameters()

    def standardise(self, rows_BD: torch.Tensor) -> torch.Tensor:
        """Rows as stored, as the model sees them, float32; one step where they are quantised."""
        if self._standard is not None:
            return self._standard.decode(rows_BD.to(self.device))
        return (rows_BD.to(self.device).float() - self._mean_D) * self._scale

    def _in_full(self, rows_BD: torch.Tensor) -> torch.Tensor:
        """Raw rows as numbers: int8 ones decoded."""
        return rows_BD if self._raw is None else self._raw.decode(rows_BD)

    def step(self, step: int) -> Mapping[str, torch.Tensor]:
        rows_BD = self._stream.rows(step)
        if self._plain is not None:
            return self._plain(rows_BD, step, self._rate(step))
        assert self._fused is not None
        self.model.schedule(step, self._total_steps)
        return self._fused(self._in_full(rows_BD), step, self._rate(step))

    def _rate(self, step: int) -> float:
        return learning_rate(step, self._total_steps, self._peak, self._warmup, self._options.lr_decay)

    def rates(self, step: int) -> Mapping[str, float]:
        mixed = {} if self._entropy is None else {"batch_entropy": self._entropy(step)}
        return {"lr": self._rate(step), "loader_wait": round(self._stream.wait_seconds, 4), **mixed}

    def read_at(self, step: int) -> str:
        block, rows = self._stream.block_of(step), self.tokens_per_step
        return f"rows {block * rows:,} to {(block + 1) * rows - 1:,} of the dataset (block {block})"

    def flops_per_step(self) -> float:
        """What the mathematics of a step needs, over all ranks."""
        return self.tokens_per_step * self.model.flops_per_token()

    def _trained(self) -> dict[str, torch.Tensor]:
        """The live tensors that training changes: the model's, of those that are spread this rank's part."""
        trained = self.model.trained()
        if self._shard is not None:
            trained |= {name: parameter.detach() for name, parameter in self._shard.parameters.items()}
        return trained

    def tensors(self) -> Mapping[str, torch.Tensor | Part]:
        tensors = {f"model.{name}": tensor for name, tensor in self._trained().items()}
        tensors |= {f"optimizer.{name}": t for name, t in self._optimizer.state_tensors().items()}
        tensors[AGES] = self._dead.tokens_since_fired_N
        state: dict[str, torch.Tensor | Part] = dict(tensors)
        if self._shard is not None:
            state |= self._shard.parts(tensors)
        if self._fused is not None and (bound := self._fused.dead_bound.state()):
            state[DEAD_BOUND] = torch.tensor(bound)
        return state

    def state(self) -> Mapping[str, Any]:
        return {}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any] | None = None) -> None:
        if self._shard is not None:
            tensors = self._shard.own(tensors)
        for name, tensor in self._trained().items():
            tensor.copy_(tensors[f"model.{name}"])
        prefix = "optimizer."
        state = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        self._optimizer.load_state_tensors(state)
        self._dead.tokens_since_fired_N.copy_(tensors[AGES])
        if self._fused is not None and DEAD_BOUND in tensors:
            self._fused.dead_bound.load(tensors[DEAD_BOUND].tolist())
        self._renew()

    def validate(self, step: int) -> Mapping[str, Any]:
        return {}

    def over(self, step: int) -> bool:
        return False
