"""Contacts by the categorical Jacobian (Zhang et al., PNAS 2024): which residue's letter the model heeds at which other.

J_iajb = logits_jb(residue i made a) - logits_jb(as it is), centred over each of its four axes, made symmetric; the coupling of i
and j is the Frobenius norm over both letters, the diagonal 0, less the average product correction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from plmsae_cli.evaluation.splices import at_residues
from plmsae_cli.plm.alphabet import AMINO_ACIDS, FIRST_LETTER, Tokens, wrap
from plmsae_cli.plm.attention import Documents
from plmsae_cli.plm.contacts import apc
from plmsae_cli.plm.passes import ESM2Output, Splice

LETTERS = len(AMINO_ACIDS)
_BLOCK_BYTES = 256_000_000


class Model(Protocol):
    """What is asked of a language model: logits of a pack, with a layer replaced."""

    def __call__(
        self,
        tokens_T: Tensor,
        documents: Documents,
        layers: tuple[int, ...] = (),
        splice: dict[int, Splice] | None = None,
        logits: bool = False,
    ) -> ESM2Output: ...


def same_length(tokens_MT: Tensor) -> tuple[Documents, Tensor]:
    """Where documents of one length lie in their stream, and which tokens are residues, as a column."""
    count, length = tokens_MT.shape
    edges = torch.arange(count + 1, dtype=torch.int32, device=tokens_MT.device) * length
    residue_MT = torch.ones_like(tokens_MT, dtype=torch.bool)
    residue_MT[:, 0] = residue_MT[:, -1] = False
    return Documents(edges, length, (length,) * count), residue_MT.flatten()[:, None]


def letter_logits(plm: Model, tokens_MT: Tensor, layer: int, value: Splice | None) -> Tensor:
    """Logits [M, L, 20] of the amino acids at the residues of M sequences of one length."""
    documents, residue_T1 = same_length(tokens_MT)
    splice = None if value is None else {layer: at_residues(residue_T1, value)}
    logits_TV = plm(tokens_MT.flatten(), documents, (), splice, True).logits
    assert logits_TV is not None
    return logits_TV.view(*tokens_MT.shape, -1)[:, 1:-1, FIRST_LETTER : FIRST_LETTER + LETTERS].float()


@torch.inference_mode()
def jacobian(
    plm: Model,
    residues_L: Tokens,
    layer: int,
    value: Splice | None,
    batch_tokens: int,
    device: torch.device,
    check_stop: Callable[[], None] = lambda: None,
) -> Tensor:
    """J [L, 20, L, 20], float32, by 19 L forward passes (the wild type's letter changes nothing), many in a pack.

    Args:
        residues_L: tokens without `<cls>` and `<eos>`.
        layer: where `value` replaces the residues' activations; None leaves the model as it is.
        batch_tokens: tokens of a pack.
    """
    wild_T = torch.from_numpy(wrap(residues_L)).to(device)
    length = len(residues_L)
    base_LA = letter_logits(plm, wild_T[None], layer, value)[0]
    found = torch.zeros(length * LETTERS, length, LETTERS, device=device)
    own = torch.from_numpy(residues_L.astype("int64")) - FIRST_LETTER
    mutant_M = torch.arange(length * LETTERS)
    mutant_M = mutant_M[mutant_M % LETTERS != own.repeat_interleave(LETTERS)].to(device)
    for chosen_M in torch.split(mutant_M, max(1, batch_tokens // (length + 2))):
        check_stop()
        place_M1 = (chosen_M // LETTERS + 1)[:, None]
        letter_M1 = (chosen_M % LETTERS + FIRST_LETTER)[:, None].to(wild_T.dtype)
        tokens_MT = wild_T.expand(len(chosen_M), -1).scatter(1, place_M1, letter_M1)
        found[chosen_M] = letter_logits(plm, tokens_MT, layer, value) - base_LA
    return found.view(length, LETTERS, length, LETTERS)


@torch.inference_mode()
def coupling(jacobian_LALA: Tensor) -> Tensor:
    """Scores [L, L], float64 and symmetric; the Jacobian is centred in place."""
    for axis in range(4):
        jacobian_LALA -= jacobian_LALA.mean(axis, keepdim=True)
    length = jacobian_LALA.shape[0]
    rows = max(1, _BLOCK_BYTES // (length * LETTERS * LETTERS * 4))
    norm_LL = torch.empty(length, length, dtype=torch.float64, device=jacobian_LALA.device)
    for first in range(0, length, rows):
        some = slice(first, first + rows)
        both = (jacobian_LALA[some] + jacobian_LALA[:, :, some].permute(2, 3, 0, 1)) / 2
        norm_LL[some] = both.double().square().sum((1, 3)).sqrt()
    norm_LL = (norm_LL + norm_LL.T) / 2  # sums of the same squares in another order
    return apc(norm_LL.fill_diagonal_(0.0)).fill_diagonal_(0.0)
