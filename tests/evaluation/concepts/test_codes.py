"""The codes that learnt nothing, and how latents are cut into passes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from plmsae_cli.evaluation.concepts.codes import principal, residual
from plmsae_cli.evaluation.concepts.counting import passes
from plmsae_cli.evaluation.concepts.counts import Counts


def test_dimensions_are_two_latents_each() -> None:
    sample = torch.tensor([[1.0, -2.0], [3.0, -1.0]])
    code = residual(sample)
    assert code.maximum_N.tolist() == [3.0, 0.0, 0.0, 2.0]
    acts, index = code.encode(torch.tensor([[0.5, -0.25], [-4.0, 2.0]]))
    assert acts.tolist() == [[0.5, 0.0, 0.0, 0.25], [0.0, 2.0, 4.0, 0.0]]
    assert index.tolist() == [[0, 1, 2, 3]] * 2


def test_components_are_those_of_scikit_learn_up_to_sign() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(500, 6, generator=generator) * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5]) + 7
    sample = sample @ torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    wanted = torch.from_numpy(decomposition.PCA(6).fit(sample.numpy()).transform(sample.numpy())).float()
    acts, _ = principal(sample).encode(sample)
    z = acts[:, :6] - acts[:, 6:]
    assert ((acts[:, :6] > 0) & (acts[:, 6:] > 0)).sum() == 0
    torch.testing.assert_close(z.abs(), wanted.abs(), atol=1e-3, rtol=1e-3)
    assert torch.equal(principal(sample).maximum_N, acts.amax(0))


def test_passes_cover_every_latent_once_within_memory() -> None:
    codes = [cast(Any, SimpleNamespace(code=SimpleNamespace(num_latents=n))) for n in (10, 4, 7)]
    memory = 2 * Counts.bytes(6, 3, 2)
    found = passes(codes, 3, 2, memory)
    assert [sum(tile.size for tile in tiles) for tiles in found] == [6, 6, 6, 3]
    for code in codes:
        mine = [
            latent for tiles in found for t in tiles if t.source is code for latent in range(t.first, t.first + t.size)
        ]
        assert mine == list(range(code.code.num_latents))
    assert all(tile.size == 1 for tiles in passes(codes, 3, 2, 1) for tile in tiles)
