"""Masked language modelling (Devlin et al. 2019) and masked diffusion (Sahoo et al. 2024) of proteins."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from plmsae_cli.config.experiment import Train
from plmsae_cli.config.plm import raced
from plmsae_cli.plm.attention import without_block_ops
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.runtime.masked_scores import MASK_RATE, MaskedScores, mask, masks_of_pack
from plmsae_cli.training.agreed import Agreed
from plmsae_cli.training.averaging import Average
from plmsae_cli.training.clock import TrainingClock
from plmsae_cli.training.compiled_gradients import demand_same_gradients, few_documents
from plmsae_cli.training.masking import IGNORED, Masked, chosen_places, masked, question
from plmsae_cli.training.optimizers import GroupedMuon
from plmsae_cli.training.packs import Packs
from plmsae_cli.training.plm_model import (
    TrainedModel,
    compiled_passes,
    parameter_groups,
    plm_config,
    plm_optimizer,
    train_flops,
)
from plmsae_cli.training.schedules import learning_rate, window

PREFETCH = 4


class PLMObjective:
    """Step, state, validation of one language model. The global batch is `batch_tokens // pack_tokens` packs."""

    def __init__(
        self,
        options: Train,
        packs: Packs,
        valid: Mapping[str, Packs],
        total_steps: int,
        gang: Gang,
        device: torch.device,
        compute: torch.dtype,
    ) -> None:
        plm = options.plm
        assert plm is not None
        self.device, self.compute = device, compute
        self.tokens_per_step = options.batch_tokens
        self.config = plm_config(plm)
        self._trained = TrainedModel(self.config, options.seed, device, compute)
        self.model = self._trained.model
        # Constant shapes, and kernels fused by the compiler where there are kernels to fuse.
        self._compiles = device.type == "cuda" and options.compile
        self._passes = compiled_passes(self._trained) if self._compiles else self._trained.passes
        self._compiled: set[tuple[int | None, int]] = set()
        self._options, self._plm, self._packs, self._valid, self._gang = options, plm, packs, valid, gang
        self._total_steps = total_steps
        wanted = options.lr_warmup_steps
        self._warmup = min(1000, total_steps // 20) if wanted == "auto" else wanted
        groups = parameter_groups(self.model, options)
        self._optimizer = plm_optimizer(groups, options, gang)
        self._peak = next(group.lr_scale for group in groups if group.name == "hidden")
        self._average = None if plm.ema is None else Average(self.model, plm.ema)
        self._per_rank = options.batch_tokens // plm.pack_tokens // gang.world
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="packs")
        self._ahead: dict[int, Future[list[Masked]]] = {}
        self._waited = 0.0
        self.clock = TrainingClock(device)
        self._least = math.inf
        """Of the losses that a race is about."""
        self._late = False
        self._scored: tuple[int, Mapping[str, Any]] = (-1, {})
        self._hours = Agreed(gang, device, self._out_of_time)

    # Data

    def _load(self, step: int) -> list[Masked]:
        """This rank's packs of a step, masked by the background thread some steps ahead."""
        for wanted in range(step, min(step + PREFETCH, self._total_steps)):
            if wanted not in self._ahead:
                self._ahead[wanted] = self._threads.submit(self._make, wanted)
        for old in [s for s in self._ahead if s < step]:
            del self._ahead[old]
        begun = time.monotonic()
        packs = self._ahead.pop(step).result()
        self._waited += time.monotonic() - begun
        return [pack.to(self.device) for pack in packs]

    def _make(self, step: int) -> list[Masked]:
        asked = question(self._plm, step)
        first = step * self._per_rank * self._gang.world + self._gang.rank
        numbers = range(first, first + self._per_rank * self._gang.world, self._gang.world)
        made = [masked(self._packs.pack(n), self._plm, asked, self._options.seed, n) for n in numbers]
        return [pack.pin_memory() for pack in made] if self.device.type == "cuda" else made

    # The step

    def step(self, step: int) -> Mapping[str, Tensor]:
        self._scored = (-1, {})
        packs = self._load(step)
        near = self._window(step)
        self._compile(packs, near)
        self.clock.run()
        chosen, residues = sum(pack.chosen for pack in packs), sum(pack.residues for pack in packs)
        # Every figure is one mean over the global batch, however many ranks and packs it is spread over.
        counts = self._gang.sum(torch.stack([self._full(chosen), self._full(residues)])).clamp(min=1)
        all_chosen, all_residues = counts.unbind()
        per_residue = self._plm.objective == "masked_diffusion"
        terms = all_residues if per_residue else all_chosen
        self._optimizer.zero_grad()
        total, correct = self._full(0.0), self._full(0.0)
        for pack in packs:
            loss_sum, hits = self._score(pack, near)
            loss = loss_sum / terms
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            correct += hits / all_chosen
        self._gang.sum_gradients(self.model.parameters())
        if isinstance(self._optimizer, GroupedMuon):
            self._optimizer.steps_done = step
        norm = self._optimizer.step(self._schedule(step), self._options.grad_clip)
        if self._average is not None:
            self._average.update()
        figures = {"loss": total, "accuracy": correct, "grad_norm": norm / self._gang.world}
        if per_residue or self._plm.starting_mask_rate is not None:
            figures["masked"] = chosen / all_residues
        return figures

    def _full(self, value: float) -> Tensor:
        # Filled on the device: a tensor made on the host would wait for the stream.
        return torch.full((), float(value), device=self.device)

    def _score(self, pack: Masked, near: int | None) -> tuple[Tensor, Tensor]:
        return self._trained.score(pack, near, self._passes)

    def _compile(self, packs: list[Masked], near: int | None) -> None:
        """Have the kernels of such packs made now, off the clock: a pass whose gradients are thrown away, after a look at them
        where the compiler makes another graph.

        Raises UserError where they are not what they are without the compiler.
        """
        if self.device.type != "cuda" and not self._compiles:
            return
        for pack in packs:
            if (near, len(pack.places_M)) in self._compiled:
                continue
            self.clock.pause()
            if not self._compiled and isinstance(self._optimizer, GroupedMuon):
                self._optimizer.prepare()
            # A graph a window; and the head's second serves all numbers of places but the first.
            if self._compiles and (len(self._compiled) < 2 or near not in {window for window, _ in self._compiled}):
                self._check(pack, near)
            self._score(pack, near)[0].backward()  # type: ignore[no-untyped-call]
            self._optimizer.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._compiled.add((near, len(pack.places_M)))

    def _check(self, pack: Masked, near: int | None) -> None:
        self._optimizer.zero_grad()
        few, whole = few_documents(pack)

        def plain() -> Tensor:
            with without_block_ops():
                return self._trained.score(few, near, self._trained.passes)[0]

        parameters = dict(self.model.named_parameters())
        demand_same_gradients(parameters, lambda: self._score(whole, near)[0], plain, self._gang.maximum)

    # Schedules and figures

    def _window(self, step: int) -> int | None:
        if self._plm.architecture == "esm2":
            return None
        return window(step, self._total_steps, self._plm.window, self._plm.max_length + 2)

    def _schedule(self, step: int) -> float:
        """What all peak rates are multiplied by."""
        cooldown = self._plm.cooldown_steps
        decay = self._options.lr_decay if cooldown is None else min(1.0, cooldown / self._total_steps)
        return learning_rate(step, self._total_steps, 1.0, self._warmup, decay, shape=self._plm.scheduler_type)

    def rates(self, step: int) -> Mapping[str, float]:
        return {
            "lr": self._peak * self._schedule(step),
            "loader_wait": round(self._waited, 4),
            "train_seconds": round(self.clock.seconds, 3),
        }

    def read_at(self, step: int) -> str:
        packs = self._per_rank * self._gang.world
        return f"packs {step * packs:,} to {(step + 1) * packs - 1:,}" if packs > 1 else f"pack {step:,}"

    def flops_per_step(self) -> float:
        """What the mathematics of a step needs: the head reads the residues to predict alone."""
        predicted = self._plm.mask_rate if self._plm.objective == "mlm" else 0.5
        return self.tokens_per_step * train_flops(self.config, self._packs.mean_context, predicted)

    # State

    def tensors(self) -> Mapping[str, Tensor]:
        parameters = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        optimizer = {f"optimizer.{name}": t for name, t in self._optimizer.state_tensors().items()}
        average = {} if self._average is None else {f"ema.{name}": t for name, t in self._average.tensors().items()}
        return {**parameters, **optimizer, **average}

    def state(self) -> Mapping[str, Any]:
        self.clock.pause()  # saving is no training
        return {"train_seconds": self.clock.seconds, "least_loss": None if math.isinf(self._least) else self._least}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any] | None = None) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
        self._optimizer.load_state_tensors(_under("optimizer.", tensors))
        if self._average is not None:
            self._average.load(_under("ema.", tensors))
        state = state or {}
        self.clock.set(float(state.get("train_seconds", 0.0)))
        least = state.get("least_loss")
        self._least = math.inf if least is None else float(least)
        self._late = self._out_of_time()

    def released(self) -> dict[str, Tensor]:
        """The weights to save: of the average, where there is one."""
        state = dict(self.model.state_dict())
        return state if self._average is None else state | self._average.tensors()

    # The end

    def _out_of_time(self) -> bool:
        hours = self._plm.max_hours
        return hours is not None and self.clock.seconds >= 3600 * hours

    def _won(self) -> bool:
        race = self._plm.speedrun
        return race is not None and self._least < race.target_loss

    def over(self, step: int) -> bool:
        if self._plm.max_hours is not None and self._hours.asked(step):
            self._late = True
        return self._late or self._won()

    def validate(self, step: int) -> Mapping[str, Any]:
        """`score` where it is due and not known; a loss below `speedrun.target_loss` ends the training."""
        due = step % self._plm.eval_every == 0 or step == self._total_steps or self._late or self._won()
        if not due or self._scored[0] == step:
            return {}
        figures = self.score(step)
        name = raced(figures)
        if self._plm.speedrun is not None and name is not None:
            self._least = min(self._least, figures[name]["loss"])
        return figures

    def score(self, step: int) -> Mapping[str, Any]:
        """Each validation set's figures after `step` steps, as `eval.lm` has them: fixed masks, one confusion matrix over all
        ranks."""
        if self._scored[0] != step:
            self._scored = step, self._figures(step)
        return self._scored[1]

    @torch.no_grad()
    def _figures(self, step: int) -> Mapping[str, Any]:
        self.clock.pause()
        near = self._window(min(step, self._total_steps - 1))
        figures = {}
        if self._average is not None:
            self._average.swap()
        for name, packs in self._valid.items():
            count = min(packs.epoch_packs(0), max(1, self._plm.eval_tokens // self._plm.pack_tokens))
            scores = MaskedScores(count, self.device)
            for number in range(self._gang.rank, count, self._gang.world):
                packed = packs.pack(number)
                masked_T = masks_of_pack(packed, MASK_RATE)
                targets_T = packed.tokens_T.long().masked_fill(~masked_T, IGNORED)
                hidden_T = mask(packed.tokens_T, masked_T)
                pack = chosen_places(packed, hidden_T, targets_T, torch.ones(len(targets_T))).to(self.device)
                with self._trained.arithmetic():
                    logits_MV = self._trained.head(self._trained.last_layer(pack, near, self._passes))
                scores.add(number, logits_MV, pack.targets_M, pack.weights_M > 0)
            if (found := scores.figures(self._gang.sum)) is not None:
                figures[name] = found
        if self._average is not None:
            self._average.swap()
        return figures


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
