"""The groups of neighbouring latents that hold some of a token's pairs, and the scores of those groups alone."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _list_reaching(marks, bound, lists, lengths, groups, GROUPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    mark = tl.load(marks + row * groups + group, mask=group < groups, other=-1).to(tl.int32)
    low = 1
    if bound is not None:
        low = tl.maximum(tl.load(bound), 1)
    reaching = (mark >= low).to(tl.int32)
    place = tl.cumsum(reaching, 0) - 1
    tl.store(lists + row * groups + place, group.to(lists.dtype.element_ty), mask=reaching == 1)
    tl.store(lengths + row, tl.sum(reaching, 0))


@triton.jit
def load_listed(scores, lists, row, slot, length, groups, n, MEMBERS: tl.constexpr):
    """Latents and scores of the groups in these slots of the row's list, and which of them there are; other scores are -1."""
    group = tl.load(lists + row * groups + slot, mask=slot < length, other=0).to(tl.int32)
    latent = group[:, None] * MEMBERS + tl.arange(0, MEMBERS)[None, :]
    wanted = (slot < length)[:, None] & (latent < n)
    return latent, tl.load(scores + row * n + latent, mask=wanted, other=-1), wanted


@triton.jit
def counts_up_to(marked):
    """Of marks [groups, members], how many there are up to each one, in order of latents, and in all.

    A group's are added up within few threads, so that only the groups' sums are scanned across all of them.
    """
    of_group = tl.sum(marked, 1)
    before = tl.cumsum(of_group, 0) - of_group
    return before[:, None] + tl.cumsum(marked, 1), tl.sum(of_group, 0)


@triton.jit
def store_pairs(written, to, act, latent, row, mask):
    """Pairs of the token `row`, at these places."""
    tl.store(written.acts_P + to, act, mask=mask)
    tl.store(written.indices_P + to, latent, mask=mask)
    tl.store(written.sort_keys_P + to, (latent - written.shift).to(written.sort_keys_P.dtype.element_ty), mask=mask)
    tl.store(written.token_P + to, tl.zeros_like(latent) + row.to(tl.int32), mask=mask)


class GroupLists:
    """For each of B tokens its groups whose mark is wanted, in order; in buffers made once."""

    def __init__(self, rows: int, groups: int, device: torch.device) -> None:
        self.marks_BG = torch.empty(rows, groups, dtype=torch.int16, device=device)
        self.lists_BG = torch.empty(rows, groups, dtype=torch.int32, device=device)
        self.lengths_B = torch.empty(rows, dtype=torch.int32, device=device)

    def fill(self, bound: Tensor | None = None) -> None:
        """List the groups whose mark is at least 1 and, where there is one, `bound` (int32, 0-dim)."""
        rows, groups = self.marks_BG.shape
        GROUPS = triton.next_power_of_2(groups)
        _list_reaching[(rows,)](
            self.marks_BG, bound, self.lists_BG, self.lengths_B, groups, GROUPS,
            num_warps=max(1, min(8, GROUPS // 512)),
        )  # fmt: skip
