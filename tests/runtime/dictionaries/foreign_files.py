"""State dicts of other projects with random numbers in them, and what their own formulas make of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

D, N, K = 6, 16, 3
State = dict[str, Tensor]


class Sample(NamedTuple):
    """Tensors as they are saved, and the latents that their project makes of activations [B, D]."""

    state: State
    encode: Callable[[Tensor], Tensor]
    w_dec_ND: Tensor
    b_dec_D: Tensor

    def decode(self, z_BN: Tensor) -> Tensor:
        return z_BN @ self.w_dec_ND + self.b_dec_D


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations(rows: int = 64) -> Tensor:
    return 2 * draw(rows, D, seed=99) + 0.5


def unit(w_dec_ND: Tensor) -> Tensor:
    return w_dec_ND / w_dec_ND.norm(dim=1, keepdim=True)


def top(a_BN: Tensor, k: int = K) -> Tensor:
    """ReLU of the k largest of each row, zeros elsewhere."""
    values, places = a_BN.topk(k)
    return torch.zeros_like(a_BN).scatter(1, places, values.relu())


W, B, V, C = draw(N, D, seed=1), draw(N, seed=2), 3 * draw(N, D, seed=3), draw(D, seed=4)
THETA = draw(N, seed=5).abs() + 0.2


def learning() -> dict[str, Sample]:
    """The classes of dictionary_learning's `dictionary.py` and `trainers/`, by name."""
    linear = {"encoder.weight": W, "encoder.bias": B}
    unit_ND = unit(V)
    k = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.7)}
    groups = torch.tensor([4, 4, 8])
    r, mag = draw(N, seed=6), draw(N, seed=7)

    def gated(x: Tensor) -> Tensor:
        a = (x - C) @ W.T
        return (a + B > 0).float() * (r.exp() * a + mag).relu()

    def above(a: Tensor, theta: Tensor) -> Tensor:
        return a.relu() * (a.relu() > theta)

    return {
        "AutoEncoder": Sample({**linear, "decoder.weight": V.T, "bias": C}, lambda x: ((x - C) @ W.T + B).relu(), V, C),
        "AutoEncoderNew": Sample(
            {**linear, "decoder.weight": V.T, "decoder.bias": C}, lambda x: (x @ W.T + B).relu(), V, C
        ),
        "AutoEncoderTopK": Sample(
            {**linear, "decoder.weight": unit_ND.T, "b_dec": C, **k},
            lambda x: top(((x - C) @ W.T + B).relu()),
            unit_ND,
            C,
        ),
        "BatchTopKSAE": Sample(
            {**linear, "decoder.weight": unit_ND.T, "b_dec": C, **k},
            lambda x: above((x - C) @ W.T + B, k["threshold"]),
            unit_ND,
            C,
        ),
        "MatryoshkaBatchTopKSAE": Sample(
            {"W_enc": W.T, "b_enc": B, "W_dec": unit_ND, "b_dec": C, "group_sizes": groups, **k},
            lambda x: above((x - C) @ W.T + B, k["threshold"]),
            unit_ND,
            C,
        ),
        "JumpReluAutoEncoder": Sample(
            {"W_enc": W.T, "b_enc": B, "W_dec": V, "b_dec": C, "threshold": THETA},
            lambda x: above(x @ W.T + B, THETA),
            V,
            C,
        ),
        "GatedAutoEncoder": Sample(
            {
                "encoder.weight": W,
                "decoder.weight": V.T,
                "decoder_bias": C,
                "r_mag": r,
                "gate_bias": B,
                "mag_bias": mag,
            },
            gated,
            V,
            C,
        ),
    }


def saelens(kind: str, centred: bool, by_length: bool = False) -> tuple[dict[str, object], Sample]:
    """cfg.json and the weights of one architecture of SAELens' `saes/`."""
    config: dict[str, object] = {
        "architecture": kind,
        "d_in": D,
        "d_sae": N,
        "apply_b_dec_to_input": centred,
        "normalize_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12"},
    }
    state = {"W_enc": W.T, "W_dec": V, "b_dec": C, "b_enc": B}
    centre = C if centred else torch.zeros(D)
    r, mag = draw(N, seed=6), draw(N, seed=7)

    def encode(x: Tensor) -> Tensor:
        a = (x - centre) @ W.T
        if kind == "standard":
            return (a + B).relu()
        if kind == "jumprelu":
            return (a + B).relu() * (a + B > THETA)
        if kind == "gated":
            return (a + B > 0).float() * (a * r.exp() + mag).relu()
        return top((a + B) * V.norm(dim=1) if by_length else a + B)

    if kind == "topk":
        config |= {"k": K, "rescale_acts_by_decoder_norm": by_length}
    if kind == "jumprelu":
        state["threshold"] = THETA
    if kind == "gated":
        state = {"W_enc": W.T, "W_dec": V, "b_dec": C, "b_gate": B, "r_mag": r, "b_mag": mag}
    # With `by_length`, activations come times the rows' norms, by which the decoder divides them.
    rows_ND = unit(V) if by_length else V
    return config, Sample(state, encode, rows_ND, C)
