"""What is put in place of a layer to steer along a latent, and along its controls.

h' = h + delta_t d on the residues chosen. `add`: delta = strength x the latent's maximum; `clamp`: delta_t = strength x
maximum - z_t, which is dec(z') + (h - dec(z)), the reconstruction's error kept, since decoding is linear in z; `ablate`:
delta_t = -z_t.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plmsae_cli.sae.dictionary import Dictionary

Mode = Literal["add", "clamp", "ablate"]
VARIANTS = ("latent", "flipped", "direction", "other")
"""The latent; the sign flipped; a random direction of the same length; a random latent of about equal density."""


@dataclass(frozen=True)
class Steer:
    """One latent at one strength."""

    latent: int
    other: int
    """The latent it is compared with."""
    strength: float


def steers(chosen: Mapping[str, Any], strengths: Sequence[float]) -> list[Steer]:
    """Every latent of `chosen` (`latents` and, as many, `other`) at every strength, in the order of the tables."""
    pairs = zip(chosen["latents"], chosen["other"], strict=True)
    return [Steer(latent, other, strength) for latent, other in pairs for strength in strengths]


def random_direction(like_D: Tensor, latent: int) -> Tensor:
    """A direction drawn uniformly, of the same norm: the same for a latent on any device."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(b"steer %d" % latent).digest()[:7]))
    drawn_D = torch.randn(len(like_D), generator=generator, dtype=torch.float64).to(like_D.device)
    scaled_D: Tensor = drawn_D / drawn_D.norm() * like_D.double().norm()
    return scaled_D.to(like_D.dtype)


def equal_density(density_N: Tensor, latent: int, chosen: set[int], among: int = 10) -> int:
    """One of the `among` latents outside `chosen` that fire (density above 0) and whose density is nearest in logarithm, drawn
    by a hash of the latent."""
    distance_N = ((density_N + 1e-12).log() - (density_N[latent] + 1e-12).log()).abs()
    usable: list[int] = [
        n for n in distance_N.argsort(stable=True).tolist() if n not in chosen and n != latent and density_N[n] > 0
    ]
    near = usable[:among]
    return near[int.from_bytes(hashlib.sha256(b"other %d" % latent).digest()[:7]) % len(near)]


def edit(
    sae: Dictionary, steer: Steer, variant: str, mode: Mode, where_T1: Tensor, only_active: bool
) -> Callable[[Tensor], Tensor]:
    """What replaces layer activations [T, D].

    Args:
        where_T1: residues that may be steered; others stay as they are, bit for bit.
        only_active: steer only where the latent itself (whatever the variant) is active.
    """
    latent = steer.other if variant == "other" else steer.latent
    row_D = sae.w_dec_ND[latent].detach()
    if variant == "direction":
        row_D = random_direction(row_D, steer.latent)
    sign = -1.0 if variant == "flipped" else 1.0
    target = steer.strength * sae.maximum_N[latent]

    def steered(x_TD: Tensor) -> Tensor:
        needs_codes = mode != "add" or only_active
        z_TN = sae.encode_dense(x_TD.float()) if needs_codes else None
        if z_TN is None or mode == "add":
            delta_T1 = target.expand(len(x_TD))[:, None]
        else:
            delta_T1 = (target if mode == "clamp" else 0.0) - z_TN[:, latent, None]
        where = where_T1
        if only_active:
            assert z_TN is not None
            where = where & (z_TN[:, steer.latent, None] > 0)
        moved_TD = (x_TD.float() + sign * delta_T1 * row_D).to(x_TD.dtype)
        return torch.where(where, moved_TD, x_TD)

    return steered
