"""Running out of GPU memory halves the pass and changes no row."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.plm.alphabet import AMINO_ACIDS
from plmsae_cli.runtime.embedding import Embedder
from plmsae_cli.runtime.embedding.batches import Batch
from plmsae_cli.store.fs import Store


def quiet(*arguments: Any, **named: Any) -> None:
    return


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder("bundled", Store(), "float32")


def embed(embedder: Embedder, sequences: Sequence[str], budget: int) -> torch.Tensor:
    heldout = [i % 3 == 0 for i in range(len(sequences))]
    training, held = embedder.run(sequences, [1], heldout, "float32", budget, quiet, quiet)[1]
    return torch.cat([training, held])


def limit(embedder: Embedder, most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device whose memory holds passes of at most this many tokens; returns the list of passes tried."""
    real = embedder._pass
    tried: list[int] = []

    def limited(batch: Batch, *rest: Any) -> Iterator[tuple[int, torch.Tensor]]:
        tried.append(len(batch.tokens_T))
        if tried[-1] > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        yield from real(batch, *rest)

    monkeypatch.setattr(embedder, "_pass", limited)
    monkeypatch.setattr(embedder, "_backed_off", sys.maxsize)
    return tried


def test_out_of_memory_halves_the_pass_and_loses_no_row(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list(AMINO_ACIDS), n)) for n in rng.integers(1, 60, 20)]
    expected = embed(embedder, sequences, 4096)
    tried = limit(embedder, 150, monkeypatch)
    torch.testing.assert_close(embed(embedder, sequences, 512), expected, rtol=1e-5, atol=1e-5)
    said = capsys.readouterr().err
    assert "halved to 256" in said
    assert "halved to 128" in said
    # What did not fit is not tried again at that size.
    assert sum(size > 150 for size in tried) == 2


def test_a_protein_that_never_fits_is_named(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(embedder, 40, monkeypatch)
    with pytest.raises(UserError, match="one protein of 99 residues") as caught:
        embed(embedder, ["M" * 99, "MKV"], 512)
    assert "embed.max_length" in str(caught.value.hint)
