"""BatchTopK (Bussmann et al. 2024, "BatchTopK sparse autoencoders", arXiv 2412.06410)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from plmsae_cli.sae.batch_selection import keep_largest, nth_largest
from plmsae_cli.sae.interface import Latents, Reduce, one_process
from plmsae_cli.sae.selection import active_latents
from plmsae_cli.sae.sparse import Pairs
from plmsae_cli.sae.topk import TopK

Selection = Literal["global", "local"]
THETA_WINDOW = 1000
"""Steps over which theta is averaged: decay 0.999."""


class BatchTopK(TopK):
    """Training keeps the B k largest of ReLU(a) over the batch; afterwards z = a H(a - theta).

    theta is the moving average, with decay 0.999 a training step, of the smallest activation kept, corrected for its
    start as Adam's moments are. In runs of fewer than 20,000 steps the decay is 1 - 20 / steps: the average would
    otherwise be of a time when activations were other ones.
    """

    theta: Tensor
    theta_steps: Tensor
    """int64: training steps in which something fired."""

    def __init__(
        self,
        d: int,
        num_latents: int,
        k: int,
        k_aux: int | None = None,
        aux_coefficient: float = 1 / 32,
        k_start: int | None = None,
        k_anneal: float = 0.1,
        selection: Selection = "global",
    ) -> None:
        """`selection`: over the batch of all ranks, or (`local`) each rank's own share of it.

        Raises ValueError where k or k_start is not in 1..num_latents or k_aux is below 1.
        """
        super().__init__(d, num_latents, k, k_aux, aux_coefficient, k_start, k_anneal)
        self.selection = selection
        self.theta_decay = 1 - 1 / THETA_WINDOW
        self.register_buffer("theta", torch.zeros(()))
        self.register_buffer("theta_steps", torch.zeros((), dtype=torch.int64), persistent=False)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""
        return super().settings() | {"selection": self.selection}

    def schedule(self, step: int, total_steps: int) -> None:
        """Anneal k; average theta over no more than a twentieth of the run."""
        super().schedule(step, total_steps)
        self.theta_decay = 1 - 1 / min(THETA_WINDOW, max(1.0, total_steps / 20))

    def trained(self) -> dict[str, Tensor]:
        """Parameters, theta and its count of steps."""
        return super().trained() | {"theta": self.theta, "theta_steps": self.theta_steps}

    def step_bytes(self, rows: int) -> int:
        """Pre-activations of all latents are held, and their bits twice."""
        return 4 * rows * self.num_latents * 4

    def encode_dense(self, x_BD: Tensor) -> Tensor:
        """a H(a - theta): [B, N], independent of the other tokens of the batch."""
        pre_BN = F.linear(x_BD - self.b_dec_D, self.w_enc_ND, self.b_enc_N).to(x_BD.dtype)
        return torch.where(pre_BN > self.theta, pre_BN, 0.0)

    def encode(self, x_BD: Tensor) -> Latents:
        """Latents above theta; K is the largest number of them in a token of this batch."""
        return active_latents(self.encode_dense(x_BD))

    def largest(self, x_BD: Tensor) -> Tensor:
        """The largest activation of each latent among these tokens: [N]; none is sorted for it."""
        return self.encode_dense(x_BD).amax(0)

    @torch.no_grad()
    def fold_(self, mean_D: Tensor, scale: float) -> None:
        """From the input (x - mean) * scale to raw activations x, in place; theta is in raw units too."""
        super().fold_(mean_D, scale)
        self.theta.div_(scale)

    @torch.no_grad()
    def _choose(self, x_BD: Tensor, global_rows: int, reduce: Reduce) -> tuple[Tensor, Pairs]:
        rows, k = len(x_BD), self.training_k
        acts_BN = F.linear(x_BD - self.b_dec_D, self.w_enc_ND, self.b_enc_N).float().relu()
        if self.selection == "global":
            kept_BN, smallest = keep_largest(acts_BN, global_rows * k, self.first_row, global_rows, reduce)
        else:
            kept_BN, own = keep_largest(acts_BN, rows * k, 0, rows, one_process)
            ranks = reduce((own > 0).long())
            bits, _ = nth_largest(own.view(1).view(torch.int32), ranks, reduce)
            smallest = torch.where(ranks > 0, bits.view(torch.float32), 0.0)
        if self.training:
            self.follow(smallest)
        # A rank's share of the kept pairs varies. Of shuffled tokens none comes near twice the mean, which bounds
        # what a GPU is given; a batch that did would show as NaN.
        capacity = min(global_rows, 2 * rows) * k
        pairs = Pairs.of_mask(kept_BN, capacity)
        acts_P = pairs.read(acts_BN)
        if kept_BN.is_cuda and global_rows > 2 * rows:
            acts_P = torch.where(kept_BN.sum() <= capacity, acts_P, torch.nan)
        return acts_P, pairs

    @torch.no_grad()
    def follow(self, smallest: Tensor) -> None:
        """Move theta towards the smallest activation kept in a step (0-dim; 0 where none was), in place.

        Not towards one that is no finite number, from which theta would never come back: such a step is skipped.
        """
        fired = (smallest > 0) & smallest.isfinite()
        self.theta_steps.add_(fired)
        rate = (1 - self.theta_decay) / (1 - self.theta_decay ** self.theta_steps.double())
        self.theta.copy_(torch.where(fired, self.theta + rate.float() * (smallest - self.theta), self.theta))
