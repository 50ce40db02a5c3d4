"""The loop on CUDA: compiled packs, the pinned ring, several layers, and no wait for the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from plmsae_cli.plm.alphabet import AMINO_ACIDS, encode, pack
from plmsae_cli.runtime.embedding import Embedder
from plmsae_cli.runtime.embedding.transfer import PinnedRing
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.store.fs import Store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYERS = [0, 3, 8]


def quiet(*arguments: Any, **named: Any) -> None:
    return


@pytest.fixture(scope="module")
def sequences() -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list(AMINO_ACIDS), n)) for n in rng.integers(1, 600, 120)]


@pytest.fixture(scope="module")
def expected(sequences: list[str]) -> dict[int, torch.Tensor]:
    """float32 on the CPU, protein by protein."""
    model = load_plm("bundled")
    rows: dict[int, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
    for sequence in sequences:
        packed = pack([encode(sequence)])
        with torch.inference_mode():
            hidden = model(packed.tokens_T, packed.documents, layers=LAYERS).hidden
        for layer in LAYERS:
            rows[layer].append(hidden[layer][1:-1])
    return {layer: torch.cat(parts) for layer, parts in rows.items()}


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
@pytest.mark.parametrize(("compile", "any_length"), [(False, True), (True, True), (True, False)])
def test_every_layer_is_within_the_gate_and_nothing_waits(
    sequences: list[str], expected: dict[int, torch.Tensor], compute: str, compile: bool, any_length: bool
) -> None:
    torch._dynamo.reset()
    embedder = Embedder("bundled", Store(), compute)
    embedder.any_length = any_length
    starts = np.cumsum([0, *map(len, sequences)])
    got = {layer: torch.full_like(rows, torch.nan) for layer, rows in expected.items()}

    def put(layer: int, protein: int, first: int, rows_RD: torch.Tensor) -> None:
        got[layer][starts[protein] + first : starts[protein] + first + len(rows_RD)] = rows_RD.float()

    for turn in range(2):
        if turn:  # compiled, buffers pinned: from here on the host never waits for the device
            torch.cuda.set_sync_debug_mode("error")
        try:
            stream = embedder.stream(sequences, LAYERS, torch.bfloat16, 8192, put, quiet, quiet, compile=compile)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        figures = stream.wait()
    assert stream.compiled == compile
    assert figures.residues == starts[-1]
    assert 0 < figures.busy_seconds <= figures.seconds * 1.05
    for layer, rows in expected.items():
        assert float((got[layer] - rows).norm() / rows.norm()) <= 2e-2


def test_the_ring_delivers_every_row_and_raises_what_a_delivery_raised() -> None:
    ring = PinnedRing(torch.device("cuda", 0))
    sent = [torch.randn(1000 + i, 64, device="cuda") for i in range(20)]
    got: dict[int, torch.Tensor] = {}
    waiting = [ring.send(rows, lambda r, i=i: got.__setitem__(i, r.clone())) for i, rows in enumerate(sent)]
    for delivery in waiting:
        delivery.result()
    assert all(torch.equal(got[i], rows.cpu()) for i, rows in enumerate(sent))

    def broken(rows_RD: torch.Tensor) -> None:
        raise OSError("the disk is gone")

    failed = [ring.send(sent[0], broken) for _ in range(6)]  # more than there are buffers: each is given back
    for delivery in failed:
        with pytest.raises(OSError, match="the disk is gone"):
            delivery.result()


def test_statistics_come_again_and_again_from_the_same_streams() -> None:
    """The allocator keeps what a stream freed for that stream: one of torch's 32 at every call would keep 32 times as much."""
    from concurrent.futures import ThreadPoolExecutor

    from plmsae_cli.store.shard_writer import _own_stream

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda _: _own_stream(torch.device("cuda", 0)), range(64)))
    assert len({stream.stream_id for stream in found if stream is not None}) <= 2
    assert torch.cuda.default_stream() not in found
