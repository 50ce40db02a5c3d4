"""Steering against layers computed by hand, and a direction of known effect."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from plmsae_cli.evaluation.steering.edits import VARIANTS, Steer, edit, equal_density, random_direction
from plmsae_cli.evaluation.steering.readout import Batch, measure, prepare, steerable
from plmsae_cli.plm.alphabet import AMINO_ACIDS, encode, pack
from plmsae_cli.plm.attention import Documents
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.plm.passes import Partway
from plmsae_cli.sae.relu_l1 import ReLUL1
from plmsae_cli.sae.topk import TopK

D, N = 24, 32


def dictionary(kind: str = "topk") -> Any:
    generator = torch.Generator().manual_seed(1)
    sae = TopK(D, N, k=4) if kind == "topk" else ReLUL1(D, N)
    with torch.no_grad():
        sae.w_enc_ND.copy_(torch.randn(N, D, generator=generator))
        sae.w_dec_ND.copy_(torch.nn.functional.normalize(torch.randn(N, D, generator=generator), dim=1))
        sae.b_dec_D.copy_(torch.randn(D, generator=generator))
    sae.maximum_N.fill_(2.0)
    return sae.eval()


def where(rows: int) -> torch.Tensor:
    return (torch.arange(rows) % 3 != 0)[:, None]


@pytest.mark.parametrize("kind", ["topk", "relu_l1"])
@pytest.mark.parametrize("mode", ["clamp", "ablate"])
def test_clamping_keeps_the_error_term(kind: str, mode: Any) -> None:
    sae, x = dictionary(kind), torch.randn(12, D, generator=torch.Generator().manual_seed(2))
    latent = int(sae.encode(x).indices_BK[1, 0])
    z = sae.encode_dense(x)
    edited = z.clone()
    edited[:, latent] = 3.0 * 2.0 if mode == "clamp" else 0.0
    decoded = (edited @ sae.w_dec_ND + sae.b_dec_D) + (x - (z @ sae.w_dec_ND + sae.b_dec_D))
    found = edit(sae, Steer(latent, 0, 3.0), "latent", mode, where(12), False)(x)
    assert not torch.equal(found, x)
    torch.testing.assert_close(found, torch.where(where(12), decoded, x), rtol=0, atol=1e-5)
    assert torch.equal(found[::3], x[::3])


def test_the_controls_are_as_strong_as_the_latent() -> None:
    sae, x = dictionary(), torch.randn(9, D)
    everywhere = torch.ones(9, 1, dtype=torch.bool)
    moved = {v: edit(sae, Steer(3, 7, 1.5), v, "add", everywhere, False)(x) - x for v in VARIANTS}
    torch.testing.assert_close(moved["latent"], (1.5 * 2.0 * sae.w_dec_ND[3]).expand(9, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(moved["flipped"], -moved["latent"], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved["other"], (3.0 * sae.w_dec_ND[7]).expand(9, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(moved["direction"].norm(dim=1), torch.full((9,), 3.0), rtol=1e-5, atol=0)
    assert abs(torch.cosine_similarity(moved["direction"][0], moved["latent"][0], dim=0)) < 0.8
    assert torch.equal(random_direction(sae.w_dec_ND[3], 3), random_direction(sae.w_dec_ND[3], 3))


def test_only_where_it_is_active() -> None:
    sae, x = dictionary(), torch.randn(40, D)
    everywhere = torch.ones(40, 1, dtype=torch.bool)
    active = sae.encode_dense(x)[:, 5] > 0
    assert 0 < active.sum() < 40
    for variant in VARIANTS:  # the controls where the latent is, not where they are themselves
        moved = (edit(sae, Steer(5, 6, 1.0), variant, "add", everywhere, True)(x) != x).any(1)
        assert torch.equal(moved, active)


def test_the_other_latent_is_of_equal_density_and_none_of_the_chosen() -> None:
    density = torch.tensor([0.1, 0.1001, 0.1002, 0.0, 1e-4] + [0.01] * 20)
    assert equal_density(density, 0, {0, 1}, among=1) == 2
    assert equal_density(density, 0, {0, 1, 2}, among=5) >= 5
    # Latent 3 fires nowhere here: nearest are the rarest that do, never another silent one.
    silent = torch.cat([density, torch.zeros(10)])
    assert equal_density(silent, 3, {3}, among=1) == 4


@pytest.fixture(scope="module")
def model() -> ESM2:
    made = ESM2(ESM2Config(num_layers=4, d=D, num_heads=2)).eval()
    made.init_weights(5)
    generator = torch.Generator().manual_seed(6)
    for parameter in made.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return made


def batch_of(model: Any, sequences: list[str], layer: int) -> Batch:
    packed = pack([encode(s) for s in sequences])
    masked = packed.residue_mask_T & (torch.arange(len(packed.tokens_T)) % 4 == 1)
    return prepare(model, packed, masked, layer)


def by_hand(
    model: ESM2, batch: Batch, layer: int, vector_D: torch.Tensor, skipped: tuple[int, ...] = ()
) -> torch.Tensor:
    """Blocks one after the other; those of `skipped` are left out, as a published notebook does."""
    tokens, documents = batch.below.tokens_T, batch.packed.documents
    document_T, place_T = documents.locate(len(tokens))
    rope = model.rotary(place_T)
    with torch.no_grad():
        x = model.embed(tokens, documents, document_T)
        for k in range(1, 5):
            if k - 1 == layer:
                x = torch.where(batch.packed.residue_mask_T[:, None], x + vector_D, x)
            if k not in skipped:
                x = model.layers[k - 1](x, rope, documents)
        logits = model.lm_head(model.emb_layer_norm_after(x), model.embed_tokens.weight)
    return logits[batch.read_Q, 4:24].double().log_softmax(-1)


def test_all_later_layers_are_computed_anew(model: ESM2) -> None:
    sequences = ["MKTWACDEFG", "ACDEFGHIKLMN", "WWYA"]
    batch, sae = batch_of(model, sequences, 1), dictionary()
    where_T1 = steerable(batch, None)
    steer = Steer(3, 7, 2.0)
    values = measure(model, sae, batch, [steer], "add", where_T1, False)
    assert values.shape == (1, 4, 3, 21)

    def wanted(skipped: tuple[int, ...]) -> torch.Tensor:
        base, now = (
            by_hand(model, batch, 1, vector, skipped) for vector in (torch.zeros(D), 4.0 * sae.w_dec_ND[3].detach())
        )
        rows = []
        for protein in range(3):
            mine = batch.protein_Q == protein
            kl = (base[mine].exp() * (base[mine] - now[mine])).sum(1).mean()
            rows.append(torch.cat([kl[None], (now[mine] - base[mine]).mean(0)]))
        return torch.stack(rows)

    torch.testing.assert_close(values[0, 0], wanted(()), rtol=0, atol=1e-4)
    for skipped in ((2,), (3,), (4,), (3, 4)):
        assert (values[0, 0] - wanted(skipped)).abs().max() > 1e-2
    assert (values[0, :, :, 0] > 0).all()  # a KL is


def test_positions_are_counted_from_one_in_each_protein(model: ESM2) -> None:
    batch = batch_of(model, ["MKT", "WA"], 1)
    assert steerable(batch, [1, 3])[:, 0].tolist() == [False, True, False, True, False, False, True, False, False]


class Linear(torch.nn.Module):
    """Layer 0 is 0 everywhere, and the logits of amino acid a are the a-th number of it."""

    def below(self, tokens_T: torch.Tensor, documents: Documents, layer: int) -> Partway:
        nothing = torch.zeros(0)
        return Partway(layer, torch.zeros(len(tokens_T), D), tokens_T, documents, (nothing, nothing))

    def above(self, state: Partway, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD

    def head(self, x_MD: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x_MD[:, :20], (4, 9))


def test_a_planted_direction_has_the_effect_worked_out_by_hand_and_is_first() -> None:
    model, sae = Linear(), dictionary()
    for letter, latent in (("W", 11), ("A", 12)):
        with torch.no_grad():
            sae.w_dec_ND[latent] = 0.0
            sae.w_dec_ND[latent, AMINO_ACIDS.index(letter)] = 1.0
    batch = batch_of(model, ["MKTWAC", "ACDEFGHI"], 0)
    steers = [Steer(latent, 20, 1.0) for latent in range(20)]
    values = measure(model, sae, batch, steers, "add", steerable(batch, None), False).mean(2)
    # From uniform, the logit of W grows by strength x maximum = 2: log p by 2 - log((19 + e^2) / 20), all others' by less 2.
    total = math.log((19 + math.e**2) / 20)
    found = values[11, 0]
    wanted = torch.full((21,), -total, dtype=torch.float64)
    wanted[1 + AMINO_ACIDS.index("W")] = 2 - total
    wanted[0] = total - 2 / 20
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    down = math.log((19 + math.e**-2) / 20)
    assert float(values[11, 1, 0]) == pytest.approx(down + 2 / 20, abs=1e-6)  # flipped
    for letter, latent in (("W", 11), ("A", 12)):
        change = values[:, 0, 1 + AMINO_ACIDS.index(letter)] - values[:, 2, 1 + AMINO_ACIDS.index(letter)]
        assert int(change.argmax()) == latent


def test_packs_of_any_size_give_the_same(model: ESM2) -> None:
    sequences, sae = ["MKTWACDEFG", "ACDEFGHIKLMN", "WWYA"], dictionary()

    def found(groups: list[list[str]]) -> torch.Tensor:
        parts = []
        for group in groups:
            packed = pack([encode(s) for s in group])
            masked = packed.residue_mask_T & (packed.tokens_T == 5)  # A
            batch = prepare(model, packed, masked, 2)
            parts.append(measure(model, sae, batch, [Steer(1, 2, 1.0)], "clamp", steerable(batch, None), False))
        return torch.cat(parts, dim=2)

    np.testing.assert_allclose(found([sequences]), found([[s] for s in sequences]), rtol=1e-4, atol=1e-5)
