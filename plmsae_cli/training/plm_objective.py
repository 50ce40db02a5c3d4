"""Masked language modelling of proteins (Devlin et al. 2019; Lin et al. 2023) with the ESM-2 encoder."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F

from plmsae_cli.config.experiment import Train
from plmsae_cli.plm.alphabet import AMINO_ACIDS, FIRST_LETTER, MASK, Packed
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.training.counter import uniform
from plmsae_cli.training.optimizers import Group, build_optimizer
from plmsae_cli.training.packs import Packs
from plmsae_cli.training.schedules import learning_rate

IGNORED = -100
PREFETCH = 4
PEAK = {"adam": 1e-3, "muon": 1e-3, "signum": 1e-4}
"""`lr: auto`. Muon's updates are as large as Adam's; signs want a third to a tenth (Chen et al. 2023, arXiv 2302.06675)."""
VALIDATION_SEED = 0
LARGEST_EXPONENT = 700.0
"""exp of more than 709 is no float64: a run that diverges must not end in its validation."""


def corrupt(
    tokens_T: torch.Tensor, residues_T: torch.Tensor, rate: float, corruption: str, *keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked inputs and targets, a function of the keys and of the position in the pack alone.

    Each residue is chosen with probability `rate`. `mask`: chosen ones become <mask>. `bert`: 80 % <mask>, 10 % a random
    amino acid, 10 % unchanged (Devlin et al. 2019). Targets are IGNORED at residues not chosen.
    """
    index_T = torch.arange(tokens_T.shape[0], device=tokens_T.device)
    tokens_T = tokens_T.long()
    chosen_T = residues_T & (uniform(index_T, *keys, 0) < rate)
    inputs_T = tokens_T.masked_fill(chosen_T, MASK)
    if corruption == "bert":
        fate_T = uniform(index_T, *keys, 1)
        random_T = FIRST_LETTER + (uniform(index_T, *keys, 2) * len(AMINO_ACIDS)).long()
        inputs_T = torch.where(chosen_T & (fate_T >= 0.8), torch.where(fate_T < 0.9, random_T, tokens_T), inputs_T)
    return inputs_T, tokens_T.masked_fill(~chosen_T, IGNORED)


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
        self.device = device
        self.tokens_per_step = options.batch_tokens
        self.config = ESM2Config(plm.num_layers, plm.hidden_size, plm.num_attention_heads)
        self.model = ESM2(self.config)
        self.model.init_weights(options.seed)
        self.model.to(device)
        # Constant shapes, and kernels fused by the compiler where there are kernels to fuse.
        self._forward: Any = torch.compile(self.model, dynamic=False) if device.type == "cuda" else self.model
        self._options, self._plm, self._packs, self._valid, self._gang = options, plm, packs, valid, gang
        self.compute = compute
        self._total_steps = total_steps
        self._peak = PEAK[options.optimizer] if options.lr == "auto" else options.lr
        wanted = options.lr_warmup_steps
        self._warmup = min(1000, total_steps // 20) if wanted == "auto" else wanted
        named = dict(self.model.named_parameters())
        matrices = {n: p for n, p in named.items() if p.ndim == 2 and n != "embed_tokens.weight"}
        rest = {n: p for n, p in named.items() if n not in matrices}
        groups = [Group("matrices", matrices, weight_decay=plm.weight_decay), Group("rest", rest, linear_maps=False)]
        self._optimizer = build_optimizer(options, groups)
        self._per_rank = options.batch_tokens // plm.pack_tokens // gang.world
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="packs")
        self._ahead: dict[int, Future[list[Packed]]] = {}
        self._waited = 0.0

    def _load(self, step: int) -> list[Packed]:
        """This rank's packs of a step, made by the background thread some steps ahead."""
        for wanted in range(step, min(step + PREFETCH, self._total_steps)):
            if wanted not in self._ahead:
                self._ahead[wanted] = self._threads.submit(self._make, wanted)
        for old in [s for s in self._ahead if s < step]:
            del self._ahead[old]
        begun = time.monotonic()
        packs = self._ahead.pop(step).result()
        self._waited += time.monotonic() - begun
        return [packed.to(self.device) for packed in packs]

    def _make(self, step: int) -> list[Packed]:
        first = step * self._per_rank * self._gang.world
        made = [self._packs.pack(first + i * self._gang.world + self._gang.rank) for i in range(self._per_rank)]
        return [p.pin_memory() for p in made] if self.device.type == "cuda" else made

    def step(self, step: int) -> Mapping[str, torch.Tensor]:
        packs = self._load(step)
        prepared = []
        for i, packed in enumerate(packs):
            number = step * self._per_rank * self._gang.world + i * self._gang.world + self._gang.rank
            seed = self._options.seed
            masked = corrupt(
                packed.tokens_T, packed.residue_mask_T, self._plm.mask_rate, self._plm.corruption, seed, number
            )
            prepared.append((packed, *masked))
        targets = torch.stack([(targets_T != IGNORED).sum() for _, _, targets_T in prepared]).sum()
        # The loss is one mean over the global batch, however many ranks and packs it is spread over.
        count = self._gang.sum(targets.float().reshape(1)).clamp(min=1)
        self._optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        for packed, inputs_T, targets_T in prepared:
            loss_sum, hits = self._score(packed, inputs_T, targets_T)
            loss = loss_sum / count[0]
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            correct += hits / count[0]
        self._gang.sum_gradients(self.model.parameters())
        norm = self._optimizer.step(self._rate(step), self._options.grad_clip)
        return {"loss": total, "accuracy": correct, "grad_norm": norm / self._gang.world}

    def _score(
        self, packed: Packed, inputs_T: torch.Tensor, targets_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(summed cross-entropy in nats, number of correct predictions) over the chosen residues."""
        documents = packed.documents
        if self.device.type == "cuda":
            documents = documents._replace(lengths=None)  # a constant for the compiler
        with torch.autocast(self.device.type, self.compute, enabled=self.compute != torch.float32):
            logits_TV = self._forward(inputs_T, documents, logits=True).logits
        logits_TV = logits_TV.float()
        loss = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="sum")
        return loss, (logits_TV.argmax(-1) == targets_T).sum()

    def _rate(self, step: int) -> float:
        return learning_rate(step, self._total_steps, self._peak, self._warmup, self._options.lr_decay)

    def rates(self, step: int) -> Mapping[str, float]:
        return {"lr": self._rate(step), "loader_wait": round(self._waited, 4)}

    def flops_per_step(self) -> float:
        """Forward and twice as much backward: 6 a token and weight of a product, 12 d a layer, token and attended token."""
        d, layers = self.config.d, self.config.num_layers
        products = layers * 12 * d * d + d * d + self.config.vocab * d
        return float(self.tokens_per_step * (6 * products + 12 * layers * d * self._packs.mean_context))

    def tensors(self) -> Mapping[str, torch.Tensor]:
        parameters = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        return {**parameters, **{f"optimizer.{name}": t for name, t in self._optimizer.state_tensors().items()}}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
        prefix = "optimizer."
        state = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        self._optimizer.load_state_tensors(state)

    @torch.no_grad()
    def validate(self, step: int) -> Mapping[str, Any]:
        """Loss (nats), perplexity and accuracy on each validation set, with masks that never change (100 % <mask>)."""
        if step % self._plm.eval_every and step != self._total_steps:
            return {}
        figures = {}
        for name, packs in self._valid.items():
            count = min(packs.epoch_packs(0), max(1, self._plm.eval_tokens // self._plm.pack_tokens))
            sums = torch.zeros(3, dtype=torch.float64, device=self.device)
            for number in range(self._gang.rank, count, self._gang.world):
                packed = packs.pack(number).to(self.device)
                inputs_T, targets_T = corrupt(
                    packed.tokens_T, packed.residue_mask_T, self._plm.mask_rate, "mask", VALIDATION_SEED, number
                )
                loss, hits = self._score(packed, inputs_T, targets_T)
                sums += torch.stack([loss.double(), hits.double(), (targets_T != IGNORED).sum().double()])
            loss_sum, hit_sum, chosen = self._gang.sum(sums).tolist()
            if not chosen:
                continue  # a few short proteins may have no residue that is masked
            figures[name] = {
                "loss": loss_sum / chosen,
                "perplexity": math.exp(min(loss_sum / chosen, LARGEST_EXPONENT)),
                "accuracy": hit_sum / chosen,
                "residues": int(chosen),
            }
        return figures
