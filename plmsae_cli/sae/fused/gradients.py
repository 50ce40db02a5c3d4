"""Weight gradients: for each latent, the sum over the tokens it fired on, in the order of the tokens.

Real dictionaries have latents that fire on most tokens. One program would walk thousands of rows while the others
wait, so a long list is cut into chunks of fixed length, summed apart and then added up in order.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from plmsae_cli.sae.fused import pair_sums
from plmsae_cli.sae.fused.pair_sums import OfLatents, SortedPairs
from plmsae_cli.sae.fused.pairs import ActivePairs

CHUNK = 256
"""Tokens that one program adds up; longer lists are cut."""
UNROLL = 4
LONG_PROGRAMS = 1024
"""Each looks at some of the chunks of places, of which few may hold pairs."""
SPLITS = 64
PAIRS_A_PROGRAM = 1024


class WeightGradients:
    """Gradients of all parameters from the active pairs, in buffers made once.

    grad_dec_ND and grad_enc_ND (bfloat16; not yet without the part along the decoder row), grad_b_N; `counts_N`, on
    how many tokens each latent fired; `square_SN`, parts of each latent's squared gradient norm; `along_N`, <gradient
    of its decoder row, that row>; `touched_N`: whose gradient is not 0. Other rows are left as they were unless there
    are terms of other ranks to add. `grad_b_SD` sums over its splits to the gradient of b_dec.
    """

    def __init__(
        self,
        rows: int,
        num_latents: int,
        d: int,
        pairs: int,
        prefixes_G: Tensor,
        device: torch.device,
        padded: int | None = None,
    ) -> None:
        """`pairs`: places for active ones, as in `ActivePairs`; `padded`: rows of the matrices that are summed over ranks,
        at least N, None where none are.
        """
        self._shape = (rows, num_latents, d)
        self.prefixes_G, self._write_zeros = prefixes_G, padded is not None
        self._tile = tile_of(d, 512)
        self.whole_dec, self.whole_enc = torch.zeros(2, padded or num_latents, d, dtype=torch.bfloat16, device=device)
        self.grad_dec_ND, self.grad_enc_ND = self.whole_dec[:num_latents], self.whole_enc[:num_latents]
        self.grad_b_N = torch.zeros(num_latents, device=device)
        self.along_N = torch.zeros(num_latents, device=device)
        self.square_SN = torch.zeros(triton.cdiv(d, self._tile), num_latents, device=device)
        self.counts_N = torch.zeros(num_latents, dtype=torch.int32, device=device)
        self.touched_N = torch.zeros(num_latents, dtype=torch.int32, device=device)
        self.of_latents = OfLatents(
            self.grad_dec_ND,
            self.grad_enc_ND,
            self.grad_b_N,
            self.along_N,
            self.square_SN,
            self.counts_N,
            self.touched_N,
        )
        self.grad_b_SD = torch.zeros(SPLITS, d, device=device)
        self.token_P = torch.empty(pairs, dtype=torch.int32, device=device)
        self._pairs = SortedPairs(self.token_P, *(torch.empty(pairs, device=device) for _ in range(3)))
        self._latents_N1 = torch.arange(num_latents + 1, dtype=torch.int32, device=device)
        self.offsets_N1 = torch.empty_like(self._latents_N1)
        self._partial = torch.empty(triton.cdiv(pairs, CHUNK), 2, d, device=device)
        self._sorted_P: Tensor | None = None
        self._shift = 0
        self._total = self.offsets_N1[num_latents:]
        self.order_P = torch.empty(pairs, dtype=torch.int64, device=device)

    def order(self, active: ActivePairs) -> None:
        """Find the order of the pairs by latent, then token."""
        if self._sorted_P is None:
            self._sorted_P = torch.empty_like(active.sort_keys_P)
        torch.sort(active.sort_keys_P, stable=True, out=(self._sorted_P, self.order_P))
        wanted_N1 = (self._latents_N1 - active.shift).to(self._sorted_P.dtype)
        torch.searchsorted(self._sorted_P, wanted_N1, out_int32=True, out=self.offsets_N1)
        self._shift = active.shift

    def permute(self, active: ActivePairs, slope_P: Tensor, weight_B: Tensor | None = None) -> None:
        """Bring the pairs into that order; with `weight_B`, activations are the encoder's times their token's weight."""
        pairs, ragged = len(self.order_P), active.token_P is not None
        pair_sums.permute[(triton.cdiv(pairs, PAIRS_A_PROGRAM),)](
            self.order_P, active.acts_P, slope_P, active.token_P, weight_B, self._pairs, self._total,
            pairs, pairs // self._shape[0], ragged, weight_B is not None, PAIRS_A_PROGRAM,
        )  # fmt: skip

    def sum(
        self, x_BD: Tensor, residual_BGD: Tensor, factor: float, decoder: bool = True, encoder: bool = True
    ) -> None:
        """Gradients of the pairs brought last, with dL/dr = `factor` * residual; all but `grad_b_SD`.

        Of one matrix or of both; what belongs to neither comes with the decoder's. Apart, there are no squares.
        """
        _, n, d = self._shape
        of_tokens = (x_BD, residual_BGD, self.prefixes_G, self._partial)
        tiles = len(self.square_SN)
        sizes = (CHUNK, residual_BGD.shape[1], decoder, encoder, UNROLL, self._tile)
        warps = max(1, self._tile // 256)  # a warp then holds whole rows: no sum crosses warps
        pair_sums.long[(min(LONG_PROGRAMS, len(self._partial)), tiles)](
            self.offsets_N1, self._sorted_P, self._pairs, *of_tokens, self._shift, n, d, *sizes, num_warps=warps
        )
        pair_sums.gradients[(n, tiles)](
            self.offsets_N1, self._pairs, *of_tokens, self.of_latents, n, d, factor, self._write_zeros, *sizes,
            num_warps=warps,
        )  # fmt: skip

    def of_decoder_bias(self, residual_BGD: Tensor, w_enc_ND: Tensor, factor: float) -> None:
        """grad_b_SD, from the residuals and, through x - b_dec, from the encoder's bias."""
        rows = len(residual_BGD)
        _, n, d = self._shape
        tile = tile_of(d, 128)
        pair_sums.columns[(SPLITS, triton.cdiv(d, tile))](
            residual_BGD,
            self.grad_b_N,
            w_enc_ND,
            self.grad_b_SD,
            rows,
            n,
            d,
            factor,
            triton.cdiv(rows, SPLITS),
            triton.cdiv(n, SPLITS),
            residual_BGD.shape[1],
            64,
            tile,
            num_warps=2,
        )


def tile_of(d: int, largest: int) -> int:
    """Columns a pass: the power of two up to `largest` that wastes least of `d`, the larger where two do."""
    sizes = [largest >> i for i in range(4) if largest >> i >= 16]
    return min(sizes, key=lambda size: (-(-d // size) * size, -size))
