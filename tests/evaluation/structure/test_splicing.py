"""ESMFold's path with a small random head on the bundled model: layers are ours, splices are those of a slow layer loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.structure.esmfold import ESMFold, _require_same, load
from plmsae_cli.evaluation.structure.splicing import Mode, spliced
from plmsae_cli.plm.alphabet import encode, pack, wrap
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.store.fs import Store
from plmsae_cli.store.weights import save_model

pytest.importorskip("transformers")
pytest.importorskip("tmtools")
SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLI"
LAYERS = 8


@pytest.fixture(scope="module")
def folder() -> ESMFold:
    return load("random", "bundled", Store(), 1, 5, "esmfold")


def states(folder: ESMFold) -> Tensor:
    """Hidden states [L, layers + 1, D] as the average sees them."""
    tokens = torch.from_numpy(encode(SEQUENCE)).long()
    with torch.inference_mode():
        return folder.model.compute_language_model_representations(tokens[None])[0]


def loop(folder: ESMFold, layer: int, mode: Mode, value: Callable[[Tensor], Tensor]) -> Tensor:
    """The same by a loop over blocks, written from the definition."""
    trunk = folder.trunk
    tokens = torch.from_numpy(wrap(encode(SEQUENCE))).long()[None]

    def new(x: Tensor) -> Tensor:
        changed = x.clone()
        changed[0, 1:-1] = value(x[0, 1:-1])
        return changed

    with torch.inference_mode():
        x = trunk.embeddings(tokens, torch.ones_like(tokens))
        turn = trunk.rotary_embeddings(x, torch.arange(tokens.shape[1])[None])
        found = []
        for k in range(LAYERS + 1):
            if k > 0:
                x = trunk.encoder.layer[k - 1](x, position_embeddings=turn)
            if k == LAYERS:
                x = trunk.encoder.emb_layer_norm_after(x)
            if k == layer and mode == "propagated":
                x = new(x)
            shown = new(x) if k == layer and mode != "propagated" else x
            found.append(torch.zeros_like(x) if mode == "isolated" and k != layer else shown)
    return torch.stack(found, 2)[0, 1:-1]


def test_layers_are_those_of_our_model(folder: ESMFold) -> None:
    plm = load_plm("bundled")
    packed = pack([encode(SEQUENCE)])
    with torch.inference_mode():
        ours = plm(packed.tokens_T, packed.documents, layers=tuple(range(LAYERS + 1))).hidden
    theirs = states(folder)
    assert theirs.shape == (len(SEQUENCE), LAYERS + 1, plm.config.d)
    for k in range(LAYERS + 1):
        torch.testing.assert_close(theirs[:, k], ours[k][1:-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["isolated", "in_place", "propagated"])
@pytest.mark.parametrize("layer", [0, 3, LAYERS])
def test_splices_are_those_of_an_explicit_loop(folder: ESMFold, mode: Mode, layer: int) -> None:
    def value(x: Tensor) -> Tensor:
        return 0.3 * x + torch.linspace(-1, 1, x.shape[1])

    wanted = loop(folder, layer, mode, value)
    with spliced(folder.trunk, layer, mode, value):
        found = states(folder)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    # One layer off is another result.
    beside = layer + 1 if layer < LAYERS else layer - 1
    assert float((loop(folder, beside, mode, value) - found).abs().max()) > 0.1
    changed = {k for k in range(LAYERS + 1) if not torch.equal(found[:, k], states(folder)[:, k])}
    later = set(range(layer, LAYERS + 1))
    assert changed == {"isolated": set(range(LAYERS + 1)), "in_place": {layer}, "propagated": later}[mode]


def test_without_a_replacement_nothing_changes_a_bit(folder: ESMFold) -> None:
    plain = folder.fold(SEQUENCE)
    identity: Any
    for identity in (None, torch.clone):
        for mode in ("in_place", "propagated"):
            with spliced(folder.trunk, 5, mode, identity):  # type: ignore[arg-type]
                again = folder.fold(SEQUENCE)
            assert np.array_equal(again.alpha_L3, plain.alpha_L3)
            assert np.array_equal(again.plddt_L, plain.plddt_L)
    after = folder.fold(SEQUENCE)  # and hooks leave nothing behind
    assert np.array_equal(after.alpha_L3, plain.alpha_L3)
    with spliced(folder.trunk, 5, "propagated", torch.zeros_like):
        assert not np.array_equal(folder.fold(SEQUENCE).alpha_L3, plain.alpha_L3)


def test_the_output_is_transformers_own(folder: ESMFold) -> None:
    fold = folder.fold(SEQUENCE)
    atoms = folder.atoms(fold)
    alpha = atoms[atoms.atom_name == "CA"]
    np.testing.assert_allclose(alpha.coord, fold.alpha_L3, atol=1e-3)
    np.testing.assert_allclose(folder.model.infer(SEQUENCE)["plddt"][0, :, 1].numpy() * 100, fold.plddt_L, rtol=1e-6)
    assert ((fold.plddt_L >= 0) & (fold.plddt_L <= 100)).all()


def test_another_language_model_is_refused(folder: ESMFold) -> None:
    _require_same(folder.trunk, "bundled", Store(), 5, "field", "it")
    weight = folder.trunk.encoder.layer[4].intermediate.dense.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.1)
    try:
        with pytest.raises(UserError, match="other weights"):
            _require_same(folder.trunk, "bundled", Store(), 5, "field", "it")
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_folder_of_transformers_is_the_same_model(folder: ESMFold, tmp_path: Path) -> None:
    folder.model.save_pretrained(tmp_path / "fold")
    again = load(str(tmp_path / "fold"), "bundled", Store(), 1, 5, "esmfold")
    assert np.array_equal(again.fold(SEQUENCE).alpha_L3, folder.fold(SEQUENCE).alpha_L3)
    with pytest.raises(UserError, match="has num_layers 8, other has 2"):
        _require_same(folder.trunk, str(other_model(tmp_path)), Store(), 1, "field", "it")
    with pytest.raises(UserError, match="no weights"):
        load(str(tmp_path), "bundled", Store(), 1, 5, "field")


def other_model(root: Path) -> Path:
    config = ESM2Config(num_layers=2, d=16, num_heads=2)
    save_model(Store(), str(root / "other"), dict(ESM2(config).state_dict()), asdict(config), {})
    return root / "other"
