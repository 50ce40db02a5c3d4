"""Frozen features against a forward pass of each protein alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from plmsae_cli.evaluation.representations import features
from plmsae_cli.evaluation.representations.features import layer_features
from plmsae_cli.plm.alphabet import encode, pack
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.runtime.embedding import Embedder
from plmsae_cli.store.fs import Store
from plmsae_cli.store.weights import save_model

SEQUENCES = ["MKTAYIAKQR", "GAVL", "M", "WWKDEFGHIKLMNP", "CC"]


@pytest.mark.parametrize("residues", [12, 1000])
def test_features_are_those_of_each_protein_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, residues: int
) -> None:
    """In groups of few proteins and all at once: their means, or the residues asked for."""
    config = ESM2Config(num_layers=2, d=32, num_heads=2)
    model = ESM2(config)
    model.init_weights(3)
    save_model(Store(), str(tmp_path), dict(model.state_dict()), asdict(config), {})
    monkeypatch.setattr(features, "group_residues", lambda device: residues)
    embedder = Embedder.shared(str(tmp_path), Store(), "float32")
    generator = torch.Generator().manual_seed(0)
    keep = [torch.rand(len(s), generator=generator) < 0.6 for s in SEQUENCES]
    pooled, rows = (
        layer_features(embedder, SEQUENCES, [0, 2], kept, 64, lambda: None, lambda *_: None) for kept in (None, keep)
    )
    for layer in (0, 2):
        alone = []
        for sequence in SEQUENCES:
            packed = pack([encode(sequence)])
            with torch.no_grad():
                alone.append(model(packed.tokens_T, packed.documents, layers=(layer,)).hidden[layer][1:-1])
        torch.testing.assert_close(pooled[layer], torch.stack([own.mean(0) for own in alone]), rtol=1e-4, atol=1e-5)
        chosen = torch.cat([own[marked] for own, marked in zip(alone, keep, strict=True)])
        torch.testing.assert_close(rows[layer], chosen, rtol=1e-4, atol=1e-5)
