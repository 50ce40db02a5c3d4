"""Running the language model over many sequences: longest first, packed to a token budget, backed off on out-of-memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.plm.alphabet import encode, pack
from plmsae_cli.plm.attention import attention_backend
from plmsae_cli.runtime.device import compute_dtype, pick_device
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.store.fs import Store

CPU_TOKENS = 4096
SPECIAL_TOKENS = 2  # <cls> and <eos>


class Embedder:
    """A language model on this process's device, kept warm between shards."""

    _shared: dict[tuple[str, str], Embedder] = {}

    def __init__(self, weights: str, store: Store, compute: str) -> None:
        self.device = pick_device()
        self.dtype = compute_dtype(compute, self.device)
        self.compute = str(self.dtype).removeprefix("torch.")
        self.model = load_plm(weights, store, self.device, self.dtype)
        self.attention = attention_backend(self.device, self.dtype, self.model.config.head_dim)

    @classmethod
    def shared(cls, weights: str, store: Store, compute: str) -> Embedder:
        """The process's one instance for these weights."""
        key = (weights, compute)
        if key not in cls._shared:
            cls._shared[key] = cls(weights, store, compute)
        return cls._shared[key]

    def budget(self, wanted: str | int) -> int:
        """Tokens of one pass: as asked, or what fits a third of the free memory of the device."""
        if isinstance(wanted, int):
            return wanted
        if self.device.type == "cpu":
            return CPU_TOKENS
        free, _ = torch.cuda.mem_get_info(self.device)
        width = self.model.config.d
        # About 24 activations of width d live at the widest point of a block (4 d hidden, q, k, v, residuals).
        return int(min(65_536, max(2048, free // 3 // (24 * width * self.dtype.itemsize))))

    @torch.inference_mode()
    def run(
        self,
        sequences: Sequence[str],
        layers: Sequence[int],
        heldout: Sequence[bool],
        dtype: str,
        batch_tokens: str | int,
        progress: Callable[..., None],
        check_stop: Callable[[], None],
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Residue rows of each layer, in the order of the sequences, training and held-out apart.

        Args:
            sequences: proteins; every residue gets a row, <cls> and <eos> none.
            layers: which representations, by the convention of `ESM2.forward`.
            heldout: for each sequence, which of the two results its rows go to.
            dtype: stored type.
            batch_tokens: budget of one pass, or `auto`; halved where the GPU's memory runs out.

        Returns:
            layer -> (training rows [R, d], held-out rows [H, d]) on the CPU.

        Raises:
            UserError: memory runs out on a single protein.
        """
        lengths = np.array([len(s) for s in sequences], dtype=np.int64)
        out_of = np.array(heldout, dtype=bool)
        starts = np.zeros_like(lengths)
        for side in (False, True):
            chosen = out_of == side
            starts[chosen] = np.cumsum(lengths[chosen]) - lengths[chosen]
        totals = [int(lengths[out_of == side].sum()) for side in (False, True)]
        stored = getattr(torch, dtype)
        width = self.model.config.d
        rows = {
            layer: (torch.empty(totals[0], width, dtype=stored), torch.empty(totals[1], width, dtype=stored))
            for layer in layers
        }
        budget = self.budget(batch_tokens)
        # Longest first: memory that does not suffice shows in the first pass, not in the last.
        queue = list(np.argsort(-lengths, kind="stable"))
        done = 0
        while queue:
            check_stop()
            taken = _fill(queue, lengths, budget)
            hidden: dict[int, torch.Tensor] | None = None
            try:
                hidden = self._forward([sequences[i] for i in taken], layers, stored)
            except torch.cuda.OutOfMemoryError as error:
                if len(taken) == 1:
                    raise UserError(
                        f"the GPU's memory does not hold one protein of {lengths[taken[0]]:,} residues",
                        "lower embed.max_length, or use a GPU with more memory",
                    ) from error
            if hidden is None:
                # Only here: inside the handler the traceback still holds the pass's tensors.
                torch.cuda.empty_cache()
                budget //= 2
                print(f"out of GPU memory: embed.batch_tokens halved to {budget:,}", file=sys.stderr, flush=True)
                continue
            offset = 0
            for i in taken:
                size = int(lengths[i])
                for layer in layers:
                    rows[layer][int(out_of[i])][starts[i] : starts[i] + size] = hidden[layer][offset : offset + size]
                offset += size
            queue = queue[len(taken) :]
            done += offset
            progress(done, int(lengths.sum()), unit="residues")
        return rows

    def _forward(self, sequences: Sequence[str], layers: Sequence[int], stored: torch.dtype) -> dict[int, torch.Tensor]:
        """layer -> residue rows [R, d] of type `stored` on the CPU, in the order of the sequences."""
        packed = pack([encode(s) for s in sequences]).to(self.device)
        output = self.model(packed.tokens_T, packed.documents, layers=layers)
        residues_T = packed.residue_mask_T
        return {layer: output.hidden[layer][residues_T].to(stored).cpu() for layer in layers}


def _fill(queue: Sequence[int], lengths: np.ndarray[Any, np.dtype[np.int64]], budget: int) -> list[int]:
    """The first sequences of the queue that fit the budget together; at least one."""
    taken: list[int] = []
    used = 0
    for i in queue:
        used += int(lengths[i]) + SPECIAL_TOKENS
        if taken and used > budget:
            break
        taken.append(int(i))
    return taken
