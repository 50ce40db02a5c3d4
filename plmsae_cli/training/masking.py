"""What a language model is asked to predict: masked inputs, where, and what each prediction weighs.

Drawn on the host, beside the training, from counters alone: (seed, pack of the run, place in the pack). So masks are the
same for any number of ranks, and how many there are is known before the device sees them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from plmsae_cli.config.plm import PLM
from plmsae_cli.plm.alphabet import AMINO_ACIDS, FIRST_LETTER, MASK, Packed
from plmsae_cli.plm.attention import Documents
from plmsae_cli.training.counter import uniform

IGNORED = -100
LEAST_SHARE = 1e-3
"""Of masked residues under diffusion: the weight 1 / t has this bound."""
_PARTS = 16
"""Places to predict come in so many steps of a pack: few shapes, at most a sixteenth of them unused."""


class Question(NamedTuple):
    """How a step masks."""

    rate: float
    """Share of the residues that are masked in the manner of `mlm`."""
    diffusion: float
    """Share of the documents that have a share t of their own."""


class Masked(NamedTuple):
    """A pack to train on. Shape letters: T tokens, M places, all of them different."""

    inputs_T: Tensor
    documents: Documents
    places_M: Tensor
    """int64: the chosen residues in order, then others that fill up."""
    targets_M: Tensor
    """int64 tokens; of places that fill up anything."""
    weights_M: Tensor
    """float32 factor of each cross-entropy; 0 where a place fills up."""
    chosen: int
    residues: int

    def pin_memory(self) -> Masked:
        """In memory that a GPU copies from without waiting."""
        return self._moved(Tensor.pin_memory, self.documents.lengths)

    def to(self, device: torch.device) -> Masked:
        """On the device, where pinned memory arrives without waiting."""
        if device.type == "cpu":
            return self
        # Lengths would be a constant of what is compiled.
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True), None)

    def _moved(self, move: Callable[[Tensor], Tensor], lengths: tuple[int, ...] | None) -> Masked:
        inputs, places, targets, weights = map(move, (self.inputs_T, self.places_M, self.targets_M, self.weights_M))
        documents = Documents(move(self.documents.cu_seqlens), self.documents.max_len, lengths)
        return Masked(inputs, documents, places, targets, weights, self.chosen, self.residues)


def question(plm: PLM, step: int) -> Question:
    """How step `step`, from 0, masks: both schedules are straight lines."""
    rate = plm.mask_rate
    if plm.starting_mask_rate is not None:
        done = min(1.0, step / plm.mask_rate_steps)
        rate = plm.starting_mask_rate + (plm.mask_rate - plm.starting_mask_rate) * done
    if plm.objective == "mlm":
        return Question(rate, 0.0)
    warm = plm.diffusion_warmup_steps
    return Question(rate, min(1.0, step / warm) if warm else 1.0)


def corrupt(
    tokens_T: Tensor, residues_T: Tensor, rate: float | Tensor, corruption: str, *keys: int
) -> tuple[Tensor, Tensor]:
    """Masked inputs and targets, a function of the keys and of the position in the pack alone.

    Each residue is chosen with probability `rate` (one number, or one a token). `mask`: chosen ones become <mask>. `bert`:
    80 % <mask>, 10 % a random amino acid, 10 % unchanged (Devlin et al. 2019). Targets are IGNORED at residues not chosen.
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


def shares(packed: Packed, asked: Question, *keys: int) -> Tensor:
    """t of each document [S]: uniform in .001 to 1 for diffusion, `rate` for the others (Sahoo et al. 2024, MDLM)."""
    index_S = torch.arange(len(packed.lengths))
    own_S = LEAST_SHARE + (1 - LEAST_SHARE) * uniform(index_S, *keys, 3)
    return torch.where(uniform(index_S, *keys, 4) < asked.diffusion, own_S, asked.rate)


def masked(packed: Packed, plm: PLM, asked: Question, *keys: int) -> Masked:
    """The pack under the objective of `plm`. Under `masked_diffusion` each cross-entropy weighs 1 / t, once."""
    residues_T = packed.residue_mask_T
    if plm.objective == "mlm":
        inputs_T, targets_T = corrupt(packed.tokens_T, residues_T, asked.rate, plm.corruption, *keys)
        weights_T = torch.ones(len(targets_T))
    else:
        lengths_S = torch.tensor(packed.lengths)
        share_T = shares(packed, asked, *keys).repeat_interleave(lengths_S)
        inputs_T, targets_T = corrupt(packed.tokens_T, residues_T, share_T, "mask", *keys)
        weights_T = 1.0 / share_T
    return chosen_places(packed, inputs_T, targets_T, weights_T)


def chosen_places(packed: Packed, inputs_T: Tensor, targets_T: Tensor, weights_T: Tensor) -> Masked:
    """The same with the targets alone, in a number of places that is one of sixteen for packs of this size."""
    chosen_T = targets_T != IGNORED
    places = chosen_T.nonzero()[:, 0]
    size = len(targets_T)
    part = math.ceil(size / _PARTS)
    fitting = min(size, max(1, math.ceil(len(places) / part)) * part)
    places_M = torch.cat([places, (~chosen_T).nonzero()[: fitting - len(places), 0]])
    weights_M = weights_T[places_M].masked_fill(~chosen_T[places_M], 0.0)
    return Masked(
        inputs_T.to(torch.uint8),
        packed.documents,
        places_M,
        packed.tokens_T.long()[places_M],
        weights_M,
        len(places),
        int(packed.residue_mask_T.sum()),
    )
