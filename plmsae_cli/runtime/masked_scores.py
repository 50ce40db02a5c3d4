"""What a language model's predictions of masked residues are worth, the same number however the work is shared.

Masks are a function of the sequence alone. Counts go into one confusion matrix, losses into one number a pack, in places of
their own: ranks add both up once, and their sum has the same bits for any number of them. Letters: T tokens of a pack, G packs,
V tokens of the alphabet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from plmsae_cli.plm.alphabet import CLS, MASK, VOCAB_SIZE, Packed, letters
from plmsae_cli.store.permutation import counter_hash
from plmsae_cli.store.split import split_hash

MASK_SEED = 0
MASK_RATE = 0.15
"""Share of the residues that validation masks, whatever training masks."""
LARGEST_EXPONENT = 700.0
"""exp of more than 709 is no float64: a model that diverged still has a perplexity."""
_IGNORED = -100


def masks(sequence: str | bytes, rate: float) -> npt.NDArray[np.bool_]:
    """Which residues are masked, at least one: a function of the sequence and the position, the same on every machine."""
    position = np.arange(len(sequence), dtype=np.uint64)
    word = np.full(len(sequence), split_hash(sequence), dtype=np.uint64)
    chosen = counter_hash(MASK_SEED, word, position) < np.uint64(int(rate * 2**64))
    if not chosen.any() and len(sequence):
        chosen[int(counter_hash(MASK_SEED, word[:1])[0] % np.uint64(len(sequence)))] = True
    return chosen


def masks_of_pack(packed: Packed, rate: float) -> Tensor:
    """Which tokens [T] of a pack on the host are masked: the masks of each document's residues, as far as they are in it."""
    tokens_T, residue_T = packed.tokens_T.numpy(), packed.residue_mask_T.numpy()
    masked_T = np.zeros(len(tokens_T), dtype=np.bool_)
    for start, length in zip(packed.cu_seqlens.tolist(), packed.lengths, strict=False):
        if length and tokens_T[start] == CLS:  # else it is padding
            inner = slice(start, start + length)
            masked_T[inner][residue_T[inner]] = masks(letters(tokens_T[inner][residue_T[inner]]), rate)
    return torch.from_numpy(masked_T)


def mask(tokens_T: Tensor, masked_T: Tensor) -> Tensor:
    """The tokens with `<mask>` at every chosen residue."""
    return tokens_T.long().masked_fill(masked_T, MASK)


class MaskedScores:
    """Counts and losses of `num_packs` packs, wherever each is scored. Nothing waits for the device before `figures`."""

    def __init__(self, num_packs: int, device: torch.device) -> None:
        self.counts = torch.zeros(VOCAB_SIZE * VOCAB_SIZE + 1, dtype=torch.int64, device=device)
        """Flattened [V, V], true token by predicted token; then the tokens that were not masked."""
        self.loss_G = torch.zeros(num_packs, dtype=torch.float64, device=device)
        """Summed cross-entropy of each pack, nats."""

    def add(self, number: int, logits_TV: Tensor, tokens_T: Tensor, masked_T: Tensor) -> None:
        """One pack's predictions; `tokens_T` as they were before masking."""
        logits_TV, tokens_T = logits_TV.float(), tokens_T.long()
        targets_T = tokens_T.masked_fill(~masked_T, _IGNORED)
        losses_T = F.cross_entropy(logits_TV, targets_T, ignore_index=_IGNORED, reduction="none")
        self.loss_G[number] = losses_T.double().sum()
        pair_T = torch.where(masked_T, tokens_T * VOCAB_SIZE + logits_TV.argmax(-1), VOCAB_SIZE * VOCAB_SIZE)
        self.counts.scatter_add_(0, pair_T, torch.ones_like(pair_T))

    def figures(self, sum_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, Any] | None:
        """`figures` of the sums over ranks, which one message carries; None where nothing was masked."""
        sums = sum_over_ranks(torch.cat([self.counts.double(), self.loss_G])).cpu()
        confusion_VV = sums[: VOCAB_SIZE * VOCAB_SIZE].view(VOCAB_SIZE, VOCAB_SIZE).numpy()
        losses: list[float] = sums[len(self.counts) :].tolist()
        return figures(confusion_VV, math.fsum(losses)) if confusion_VV.any() else None


def figures(confusion_VV: npt.NDArray[np.float64], loss: float) -> dict[str, Any]:
    """The figures of a confusion matrix (true by predicted) and of the summed loss (nats).

    `loss` and `perplexity` a residue; `accuracy`; `precision`, `recall`, `f1` weighted by how often each true token occurs, 0
    where a token is never predicted; `mcc`, Matthews' coefficient for several classes (Gorodkin 2004), 0 where undefined. As
    scikit-learn's with `average="weighted", zero_division=0`.
    """
    hit_V, true_V, predicted_V = np.diag(confusion_VV), confusion_VV.sum(1), confusion_VV.sum(0)
    total, hits = float(true_V.sum()), float(hit_V.sum())
    weight_V = true_V / total
    precision_V = hit_V / np.maximum(predicted_V, 1)
    recall_V = hit_V / np.maximum(true_V, 1)
    f1_V = 2 * hit_V / np.maximum(true_V + predicted_V, 1)
    spread = (total**2 - float(predicted_V @ predicted_V)) * (total**2 - float(true_V @ true_V))
    covariance = hits * total - float(true_V @ predicted_V)
    mean = loss / total
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, LARGEST_EXPONENT)),
        "accuracy": hits / total,
        "precision": float(weight_V @ precision_V),
        "recall": float(weight_V @ recall_V),
        "f1": float(weight_V @ f1_V),
        "mcc": covariance / math.sqrt(spread) if spread > 0 else 0.0,
        "residues": int(total),
    }
