"""What `plm_quality.py` trains: our model, and SpeedrunningPLMs' with its own Muon, step by step on the same questions."""

from __future__ import annotations

import importlib
import sys
import types
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

from plmsae_cli.config.training import Train
from plmsae_cli.plm import unet
from plmsae_cli.plm.alphabet import MASK
from plmsae_cli.plm.attention import attention
from plmsae_cli.runtime.device import training_dtype
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.training.masking import IGNORED, Masked, masked, question
from plmsae_cli.training.packs import Packs
from plmsae_cli.training.plm_objective import PLMObjective
from plmsae_cli.training.schedules import learning_rate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BETAS = (0.8, 0.95)
MUON_WARMUP = 300
_AHEAD = 4
"""Packs that are made beside the training."""


class Side(Protocol):
    """A model in training."""

    parameters: int

    def step(self, step: int) -> Tensor:
        """The loss of a training step, on the device."""

    def logits(self, pack: Masked) -> Tensor:
        """[M, V] at the pack's places."""


class Ours:
    def __init__(self, train: Train, packs: Packs, steps: int, eager: bool, autocast: bool = False) -> None:
        dtype = training_dtype(train.compute, DEVICE)
        train = train.model_copy(update={"compile": not eager})
        self._objective = PLMObjective(train, packs, {}, steps, Gang(), DEVICE, dtype)
        self.parameters = self._objective.config.num_parameters
        vars(unet)["attention"] = _halved if autocast else attention
        if autocast:
            trained: Any = self._objective._trained
            trained.arithmetic = lambda: torch.autocast(DEVICE.type, torch.bfloat16)

    def step(self, step: int) -> Tensor:
        return self._objective.step(step)["loss"]

    def logits(self, pack: Masked) -> Tensor:
        trained = self._objective._trained
        with trained.arithmetic():
            return trained.head(trained.last_layer(pack, None, self._objective._passes))


def _halved(q: Tensor, k: Tensor, v: Tensor, *documents: Any, **options: Any) -> Tensor:
    """`attention` in bfloat16: autocast leaves queries and values in float32."""
    return attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), *documents, **options)


@cache
def _reference_modules(folder: Path) -> tuple[Any, Any]:
    """Its `model.model` and `optimizer`, with classes in place of those it takes from transformers."""

    class Tokenizer:
        cls_token_id, pad_token_id, eos_token_id, mask_token_id, vocab_size = 0, 1, 2, MASK, 33

        @classmethod
        def from_pretrained(cls, name: str) -> Tokenizer:
            return cls()

    class Config:
        def __init__(self, **options: Any) -> None:
            self.__dict__.update(options)

    class Model(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()

    stand_in, outputs = types.ModuleType("transformers"), types.ModuleType("transformers.modeling_outputs")
    stand_in.EsmTokenizer, stand_in.PretrainedConfig, stand_in.PreTrainedModel = Tokenizer, Config, Model  # type: ignore[attr-defined]
    outputs.ModelOutput = object  # type: ignore[attr-defined]
    sys.modules |= {"transformers": stand_in, "transformers.modeling_outputs": outputs}
    sys.path.insert(0, str(folder))
    return importlib.import_module("model.model"), importlib.import_module("optimizer")


class Theirs:
    """The reference's model and optimisers, in steps as its trainer takes them."""

    def __init__(self, train: Train, packs: Packs, steps: int, folder: Path, half: bool, whole: bool) -> None:
        """`half`: bfloat16 autocast, else TF32. `whole`: all of it compiled, else its attention and its block mask."""
        plm = train.plm
        assert plm is not None
        module, optimizer = _reference_modules(folder)
        compiled = DEVICE.type == "cuda"
        whole = whole and compiled
        torch._dynamo.config.capture_scalar_outputs = whole  # as its entry point has it
        config = module.PLMConfig(
            hidden_size=plm.hidden_size, num_attention_heads=plm.num_attention_heads, num_hidden_layers=plm.num_layers,
            expansion_ratio=plm.expansion_ratio, soft_logit_cap=plm.soft_logit_cap, unet=True, mlm=True,
            token_dropout=True, sliding_window_size=plm.max_length + 2, max_sequence_length=plm.max_length + 2,
            compile_flex_attention=False,
        )  # fmt: skip
        self._model = module.PLM(config).to(DEVICE).train()
        # Where the whole is compiled these become a part of it; scoring is not, and needs them.
        flex, module.create_block_mask = _attention(half)
        for block in self._model.transformer.layers:
            block.attn.flex_attention = flex
        self._loss: Any = torch.compile(self._model) if whole else self._model
        named = list(self._model.named_parameters())
        self.parameters = sum(p.numel() for _, p in named)
        head = [p for name, p in named if "lm_head" in name]
        embed = [p for name, p in named if "embed" in name]
        blocks = [p for name, p in named if "lm_head" not in name and "embed" not in name]
        groups = [
            {"params": embed, "lr": plm.lr_embed},
            {"params": head, "lr": plm.lr_head},
            {"params": [p for p in blocks if p.ndim < 2], "lr": plm.lr_scalar},
        ]
        # Its Muon names the device of its buffers.
        empty = torch.empty if compiled else lambda size, device, dtype: torch.zeros(size, dtype=dtype)
        with mock.patch("torch.empty", empty):
            muon = optimizer.Muon([p for p in blocks if p.ndim >= 2], lr=plm.lr_hidden, momentum=0.95)
        self._optimizers = [torch.optim.Adam(groups, betas=BETAS, fused=True), muon]
        self._peaks = [[group["lr"] for group in each.param_groups] for each in self._optimizers]
        self._train, self._plm, self._packs, self._steps, self._half = train, plm, packs, steps, half
        self._window = torch.tensor(plm.max_length + 2, device=DEVICE)
        self._rate = torch.tensor(plm.mask_rate, device=DEVICE)
        self._threads = ThreadPoolExecutor(1)
        self._ahead = deque(self._threads.submit(self._make, step) for step in range(min(_AHEAD, steps)))

    def _make(self, step: int) -> Masked:
        made = masked(self._packs.pack(step), self._plm, question(self._plm, step), self._train.seed, step)
        return made.pin_memory() if DEVICE.type == "cuda" else made

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self._half and DEVICE.type == "cuda")

    def step(self, step: int) -> Tensor:
        pack = self._ahead.popleft().result().to(DEVICE)
        if step + _AHEAD < self._steps:
            self._ahead.append(self._threads.submit(self._make, step + _AHEAD))
        labels_T = torch.full(pack.inputs_T.shape, IGNORED, dtype=torch.int64, device=DEVICE)
        labels_T[pack.places_M] = torch.where(pack.weights_M > 0, pack.targets_M, IGNORED)
        with self._arithmetic():
            loss: Tensor = self._loss(pack.inputs_T.int(), labels_T, self._rate, sliding_window_size=self._window)
        loss.backward()  # type: ignore[no-untyped-call]
        assert self._plm.cooldown_steps is not None
        assert isinstance(self._train.lr_warmup_steps, int)
        scale = learning_rate(step, self._steps, 1.0, self._train.lr_warmup_steps, 1.0, shape="cosine")
        for optimizer, peaks in zip(self._optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
        done = min(1.0, step / MUON_WARMUP)
        for group in self._optimizers[1].param_groups:
            group["momentum"] = 0.85 + (0.95 - 0.85) * done
        for optimizer in self._optimizers:
            optimizer.step()
        self._model.zero_grad(set_to_none=True)
        return loss.detach()

    def logits(self, pack: Masked) -> Tensor:
        self._model.eval()
        with self._arithmetic():
            logits_TV: Tensor = self._model.get_logits(pack.inputs_T.int(), self._window)
        self._model.train()
        return logits_TV[pack.places_M]


def _attention(half: bool) -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    """flex_attention and create_block_mask for the reference: uncompiled, the mask would have a place for every pair."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if DEVICE.type == "cuda":
        fast: Any = torch.compile(flex_attention, dynamic=False)

        def attend(q: Tensor, k: Tensor, v: Tensor, **others: Any) -> Tensor:
            # Autocast leaves its queries and values in different types.
            q, k, v = (x.to(torch.bfloat16) if half else x for x in (q, k, v))
            found: Tensor = fast(q, k, v, **others)
            return found

        compiled: Any = torch.compile(create_block_mask, dynamic=False)

        def block_mask(mask_mod: Any, H: int, **others: Any) -> Any:
            return compiled(mask_mod, H=1, **others)  # all heads see the same

        return attend, block_mask

    def plain(q: Tensor, k: Tensor, v: Tensor, block_mask: Any, **others: Any) -> Tensor:
        places = torch.arange(q.shape[2])
        seen = block_mask(0, 0, places[:, None], places)
        # Padding sees nothing there; here it must see something.
        seen = seen | torch.eye(len(places), dtype=torch.bool)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    return plain, lambda mask_mod, **others: mask_mod
