"""AuxK on the dead latents alone: dense products over their rows, gathered into a fixed number of places.

How many places is known on the host without asking the device: `dead_bound.DeadBound`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plmsae_cli.sae.auxk import fitted_length
from plmsae_cli.sae.fused.gradients import WeightGradients


@triton.jit
def _keep_top(values, n, k, TILE: tl.constexpr, TILES: tl.constexpr):
    row = values + tl.program_id(0).to(tl.int64) * n
    t = 0
    for i in tl.static_range(15):
        trial = t | (1 << (14 - i))
        reached = 0
        for tile in range(TILES):
            o = tile * TILE + tl.arange(0, TILE)
            keys = tl.load(row + o, mask=o < n, other=-1).to(tl.int32)
            reached += tl.sum((keys >= trial).to(tl.int32), 0)
        t = tl.where(reached >= k, trial, t)
    above = 0
    for tile in range(TILES):
        o = tile * TILE + tl.arange(0, TILE)
        above += tl.sum((tl.load(row + o, mask=o < n, other=-1).to(tl.int32) > t).to(tl.int32), 0)
    ties = 0
    for tile in range(TILES):
        o = tile * TILE + tl.arange(0, TILE)
        stored = tl.load(row + o, mask=o < n, other=-1)
        keys = stored.to(tl.int32)
        tie = ((keys == t) & (o < n)).to(tl.int32)
        kept = (keys > t) | ((tie == 1) & (ties + tl.cumsum(tie, 0) <= k - above))
        tl.store(row + o, tl.where(kept, stored, 0), mask=o < n)
        ties += tl.sum(tie, 0)


@triton.jit
def _add_rows(
    dead, dec, enc, bias, w_dec, out, n, d: tl.constexpr, S: tl.constexpr, DEC: tl.constexpr, ENC: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    latent = tl.load(dead + place)
    if latent < n:
        o = tl.arange(0, D)
        mask = o < d
        to = latent.to(tl.int64) * d + o
        source = place.to(tl.int64) * d + o
        # Apart, untouched rows hold zeros: other ranks add theirs.
        before = mask
        if DEC and ENC:
            before = mask & (tl.load(out.touched_N + latent) > 0)
        squares = 0.0
        if DEC:
            extra = tl.load(dec + source, mask=mask, other=0.0).to(tl.float32)
            row = tl.load(w_dec + to, mask=mask, other=0.0).to(tl.float32)
            total_dec = (tl.load(out.grad_dec_ND + to, mask=before, other=0.0).to(tl.float32) + extra).to(tl.bfloat16)
            tl.store(out.grad_dec_ND + to, total_dec, mask=mask)
            a = total_dec.to(tl.float32)
            squares += tl.sum(a * a, 0)
            tl.store(out.along_N + latent, tl.load(out.along_N + latent) + tl.sum(extra * row, 0))
            tl.store(out.grad_b_N + latent, tl.load(out.grad_b_N + latent) + tl.load(bias + place))
        if ENC:
            total_enc = tl.load(out.grad_enc_ND + to, mask=before, other=0.0).to(tl.float32)
            total_enc = (total_enc + tl.load(enc + source, mask=mask, other=0.0).to(tl.float32)).to(tl.bfloat16)
            tl.store(out.grad_enc_ND + to, total_enc, mask=mask)
            b = total_enc.to(tl.float32)
            squares += tl.sum(b * b, 0)
        if DEC and ENC:
            tl.store(out.square_SN + latent, squares)
            for part in tl.static_range(1, S):
                tl.store(out.square_SN + part * n + latent, 0.0)
            tl.store(out.touched_N + latent, 1)


def keep_top_(acts_BC: Tensor, k: int) -> None:
    """Set all but the k largest of each row to 0, ties to the lowest column, in place; bfloat16, at least 0."""
    rows, columns = acts_BC.shape
    tile = min(4096, triton.next_power_of_2(columns))
    _keep_top[(rows,)](acts_BC.view(torch.int16), columns, k, tile, triton.cdiv(columns, tile), num_warps=4)


def compact(mask_N: Tensor, places: int) -> Tensor:
    """Indices of the set entries of `mask_N` in order, int32 [places]; N fills up. At most `places` may be set."""
    n = len(mask_N)
    place_N = torch.where(mask_N, mask_N.cumsum(0) - 1, places)
    out = torch.full((places + 1,), n, dtype=torch.int32, device=mask_N.device)
    out.scatter_(0, place_N, torch.arange(n, dtype=torch.int32, device=mask_N.device))
    return out[:-1]


def products(ehat_BD: Tensor, error_BD: Tensor) -> Tensor:
    """<ehat, e> and ||ehat||^2 over these tokens: [2]."""
    along = (ehat_BD * error_BD).sum(dtype=torch.float32)
    return torch.stack([along, torch.linalg.vector_norm(ehat_BD, dtype=torch.float32).square()])


class AuxK:
    """Adds AuxK's gradients to those of the reconstruction; formulas in `sae.auxk`.

    `reconstruct`, then `differentiate`, then `add` on one rank's tokens; what passes between them lies in buffers made
    once for a number of places, so that each may be a CUDA graph of its own.
    """

    def __init__(self, k_aux: int, coefficient: float, fitted: bool) -> None:
        self._k_aux, self._coefficient, self._fitted = k_aux, coefficient, fitted
        self._places = self._room = 0

    def prepare(self, places: int, x_BD: Tensor) -> None:
        """Buffers for so many places; those of more serve, so that graphs of more stay what they are."""
        (rows, d), device = x_BD.shape, x_BD.device
        self._places = places
        if places > self._room:
            self._room = places
            self._dead_R = torch.empty(places, dtype=torch.int32, device=device)
            self._bias_R = torch.empty(places, device=device)
            self._acts = x_BD.new_empty(rows * places)
            self._rows_3RD = x_BD.new_empty(3, places, d)
            self._misfit_BD = torch.empty_like(x_BD)
        self._dead_C, self._bias_C = self._dead_R[:places], self._bias_R[:places]
        self.acts_BC = self._acts[: rows * places].view(rows, places)
        self._w_dec_CD, self._dec_CD, self._enc_CD = self._rows_3RD[:, :places]

    def reconstruct(
        self,
        dead_N: Tensor,
        places: int,
        x_BD: Tensor,
        error_BD: Tensor,
        w_enc_ND: Tensor,
        b_enc_N: Tensor,
        w_dec_ND: Tensor,
    ) -> Tensor:
        """<ehat, e> and ||ehat||^2, this rank's shares: [2].

        `places`: an upper bound of the number of dead; `error_BD`: the full residual, bfloat16.
        """
        acts_BC = self.activate(dead_N, places, x_BD, w_enc_ND, b_enc_N, w_dec_ND)
        if self._k_aux < places:
            keep_top_(acts_BC, self._k_aux)
        return products(self.decode(), error_BD)

    def activate(
        self, dead_N: Tensor, places: int, x_BD: Tensor, w_enc_ND: Tensor, b_enc_N: Tensor, w_dec_ND: Tensor
    ) -> Tensor:
        """Activations of the dead, all of them; to be cut to the k_aux largest of each token in place."""
        self.prepare(places, x_BD)
        n = len(w_enc_ND)
        self._dead_C.copy_(compact(dead_N, places))
        row_C = self._dead_C.clamp(max=n - 1)
        torch.index_select(w_dec_ND, 0, row_C, out=self._w_dec_CD)
        acts_BC = torch.addmm(b_enc_N[row_C], x_BD, w_enc_ND[row_C].t(), out=self.acts_BC)
        return acts_BC.relu_().mul_(self._dead_C < n)

    def decode(self) -> Tensor:
        """ehat of these activations."""
        return torch.mm(self.acts_BC, self._w_dec_CD, out=self._misfit_BD)

    def differentiate(
        self, dead_N: Tensor, x_BD: Tensor, error_BD: Tensor, energy: Tensor, along: Tensor, length: Tensor
    ) -> Tensor:
        """This rank's share of the loss before its coefficient; `energy`, ||e||^2, and the others over all ranks."""
        aux = self.slope_(self._misfit_BD, dead_N.sum(), error_BD, energy, along, length)
        self.gradients(self._misfit_BD, x_BD)
        return aux

    def slope_(
        self, ehat_BD: Tensor, dead: Tensor, error_BD: Tensor, energy: Tensor, along: Tensor, length: Tensor
    ) -> Tensor:
        """The loss of these tokens before its coefficient; `ehat_BD` becomes its derivative by ehat, coefficient included."""
        ramp = (dead / self._k_aux).clamp(max=1.0)
        share = torch.where(energy > 0, ramp / energy, 0.0)
        factor = fitted_length(along, length, energy) if self._fitted else share.new_ones(())
        ehat_BD.mul_(factor).sub_(error_BD)
        aux = share * torch.linalg.vector_norm(ehat_BD, dtype=torch.float32).square()
        ehat_BD.mul_(2 * self._coefficient * share * factor)
        return aux

    def gradients(self, slope_BD: Tensor, x_BD: Tensor) -> None:
        """Of the activated latents, from the derivative by ehat."""
        acts_BC = self.acts_BC
        torch.mm(acts_BC.t(), slope_BD, out=self._dec_CD)
        slope_BC = (slope_BD @ self._w_dec_CD.t()).mul_(acts_BC > 0)
        torch.mm(slope_BC.t(), x_BD, out=self._enc_CD)
        torch.sum(slope_BC, 0, dtype=torch.float32, out=self._bias_C)

    def add(self, w_dec_ND: Tensor, gradients: WeightGradients, decoder: bool = True, encoder: bool = True) -> None:
        """To the gradients of one matrix or of both, as in `WeightGradients.sum`."""
        n, d = w_dec_ND.shape
        D = triton.next_power_of_2(d)
        _add_rows[(self._places,)](
            self._dead_C,
            self._dec_CD,
            self._enc_CD,
            self._bias_C,
            w_dec_ND,
            gradients.of_latents,
            n,
            d,
            len(gradients.square_SN),
            decoder,
            encoder,
            D,
            num_warps=max(1, min(16, D // 512)),
        )
