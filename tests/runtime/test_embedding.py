"""Embedding many proteins: what runs out of memory, is cut into windows, or does not compile changes no row."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.executors.worker import Behind
from plmsae_cli.plm import attention
from plmsae_cli.plm.alphabet import AMINO_ACIDS
from plmsae_cli.plm.esm2 import PUBLISHED
from plmsae_cli.plm.reader import Reader
from plmsae_cli.runtime.embedding import MOST_TOKENS, Embedder, Figures, summary
from plmsae_cli.runtime.embedding.batches import Batch
from plmsae_cli.runtime.embedding.budget import compiling_pays, tokens_in
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


def random_proteins(seed: int, count: int, most: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(AMINO_ACIDS), n)) for n in rng.integers(1, most, count)]


def test_long_proteins_are_read_in_windows(embedder: Embedder) -> None:
    """Against each window embedded as a protein of its own, and the nearest centre sought residue by residue."""
    window = 12
    sequences = random_proteins(1, 8, 60)
    got: dict[tuple[int, int], torch.Tensor] = {}

    def put(layer: int, protein: int, first: int, rows_RD: torch.Tensor) -> None:
        for i, row_D in enumerate(rows_RD):
            assert (protein, first + i) not in got, "every residue once"
            got[protein, first + i] = row_D.clone()

    embedder.stream(sequences, [2], torch.float32, 256, put, quiet, quiet, window=window).wait()
    assert len(got) == sum(map(len, sequences))
    for protein, sequence in enumerate(sequences):
        count = 1 if len(sequence) <= window else 1 + -(-(len(sequence) - window) // (window // 2))
        starts = [0] if count == 1 else [i * (len(sequence) - window) // (count - 1) for i in range(count)]
        alone = {
            s: embedder.run([sequence[s : s + window]], [2], [False], "float32", 256, quiet, quiet) for s in starts
        }
        for residue in range(len(sequence)):
            inside = [s for s in starts if s <= residue < s + window]
            best = min(inside, key=lambda s: (abs(residue - s - (window - 1) / 2), s))
            expected = alone[best][2][0][residue - best]
            torch.testing.assert_close(got[protein, residue], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("any_length", [False, True])
def test_packs_of_constant_shape_give_the_same_rows(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch, any_length: bool
) -> None:
    """As compiled packs are made and cut up again; the compiler itself left out."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(embedder, "any_length", any_length)
    monkeypatch.setattr(embedder, "_backed_off", sys.maxsize)
    sequences = random_proteins(2, 60, 90)
    expected = embedder.run(sequences, [1, 8], [False] * 60, "float16", 4096, quiet, quiet)
    got = {layer: torch.zeros_like(rows[0]) for layer, rows in expected.items()}
    starts = np.cumsum([0, *map(len, sequences)])

    def put(layer: int, protein: int, first: int, rows_RD: torch.Tensor) -> None:
        got[layer][starts[protein] + first : starts[protein] + first + len(rows_RD)] = rows_RD

    stream = embedder.stream(sequences, [1, 8], torch.float16, 1024, put, quiet, quiet, compile=True)
    figures = stream.wait()
    assert stream.compiled
    assert figures.residues == len(got[1])
    assert figures.tokens - figures.pad_tokens == len(got[1]) + 2 * len(sequences)
    assert figures.pad_tokens > 0
    for layer in (1, 8):
        torch.testing.assert_close(got[layer], expected[layer][0], rtol=2e-3, atol=2e-3)
    torch._dynamo.reset()


def test_where_nothing_compiles_it_says_so_and_goes_on(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    torch._dynamo.reset()
    fresh = Embedder("bundled", Store(), "float32")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    sequences = random_proteins(3, 20, 60)
    rows = torch.full((sum(map(len, sequences)), 192), torch.nan)
    starts = np.cumsum([0, *map(len, sequences)])

    def put(layer: int, protein: int, first: int, rows_RD: torch.Tensor) -> None:
        rows[starts[protein] + first : starts[protein] + first + len(rows_RD)] = rows_RD

    stream = fresh.stream(sequences, [1], torch.float32, 512, put, quiet, quiet, compile=True)
    stream.wait()
    assert not stream.compiled
    expected = embedder.run(sequences, [1], [False] * 20, "float32", 512, quiet, quiet)[1][0]
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
    assert capsys.readouterr().err.count("torch.compile fails here, going on without") == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "failing",
    [
        lambda: pytest.importorskip("triton.runtime.errors").OutOfResources(200_000, 101_376, "shared memory"),
        lambda: RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
        lambda: subprocess.CalledProcessError(1, ["gcc", "main.c"]),
    ],
)
def test_where_our_kernels_do_not_compile_it_says_so_and_goes_on(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: Any
) -> None:
    """A reader that fails as on such a GPU, after layer 0; the next one is the plain one."""
    error = failing()
    monkeypatch.setattr(attention, "_forgone", False)

    class Failing(Reader):
        def layers(self, *arguments: Any, **options: Any) -> Any:
            yield from super().layers(*arguments[:2], [0], **options)
            raise error

    fresh = Embedder("bundled", Store(), "float32")
    fresh.reader = Failing(fresh.model)
    sequences = random_proteins(3, 20, 60)
    rows = fresh.run(sequences, [0, 1], [False] * 20, "float32", 512, quiet, quiet)
    assert attention._forgone
    expected = embedder.run(sequences, [0, 1], [False] * 20, "float32", 512, quiet, quiet)
    for layer in (0, 1):
        assert torch.equal(rows[layer][0], expected[layer][0])
    assert capsys.readouterr().err.count("our own kernels do not compile here, going on without: ") == 1
    fresh.reader = Failing(fresh.model)
    with pytest.raises(type(error)):  # there is nothing left to do without
        fresh.run(sequences, [0, 1], [False] * 20, "float32", 512, quiet, quiet)


@pytest.mark.parametrize("memory", [False, True])
def test_rows_under_way_arrive_before_their_pass_is_done_again(monkeypatch: pytest.MonkeyPatch, memory: bool) -> None:
    """Layer 0 leaves before anything compiles, or memory runs out: its rows must not come after those of the second attempt."""

    failed = threading.Event()

    class Slow:
        """Delivers what was sent before the failure long after it."""

        wait_seconds = 0.0

        def __init__(self) -> None:
            self.threads = ThreadPoolExecutor(4)
            self.under_way: list[Future[None]] = []
            self.unfinished: list[int] = []

        def send(self, rows_RD: torch.Tensor, deliver: Any) -> Future[None]:
            self.unfinished.append(sum(not delivery.done() for delivery in self.under_way))
            before = not failed.is_set()

            def finish() -> None:
                if before and failed.wait(20):
                    time.sleep(1.5)
                deliver(rows_RD)

            self.under_way.append(self.threads.submit(finish))
            return self.under_way[-1]

    def broken(graph: Any, inputs: Any) -> Any:
        sent.append(len(transfer.under_way))
        failed.set()
        raise torch.cuda.OutOfMemoryError("CUDA out of memory") if memory else RuntimeError("no compiler here")

    torch._dynamo.reset()
    fresh, sent = Embedder("bundled", Store(), "float32"), list[int]()
    fresh.transfer = transfer = Slow()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    real = fresh._pass

    def first_without_memory(batch: Batch, *rest: Any) -> Iterator[tuple[int, torch.Tensor]]:
        for layer, rows_RD in real(batch, *rest):
            if layer == 1 and not sent:
                broken(None, None)
            yield layer, rows_RD

    if memory:
        monkeypatch.setattr(fresh, "_pass", first_without_memory)
    wanted = not memory
    fresh.stream(random_proteins(3, 20, 60), [0, 1], torch.float32, 512, quiet, quiet, quiet, compile=wanted).wait()
    assert sent[0] > 0, "layer 0 had left"
    assert transfer.unfinished[sent[0]] == 0
    torch._dynamo.reset()


def test_tokens_follow_the_memory_within_bounds() -> None:
    """650M on 80 GB, 3B on 16 GB, 15B with twelve layers, and a full card."""
    assert tokens_in(int(70e9), 1280, 2, 1) == MOST_TOKENS
    assert 40_000 < tokens_in(int(0.6 * 14e9), 2560, 2, 5) < MOST_TOKENS
    assert tokens_in(int(0.6 * 40e9), 5120, 2, 12) < MOST_TOKENS
    assert tokens_in(0, 1280, 2, 1) == 2048
    assert tokens_in(10**9, 1280, 2, 1) == tokens_in(10**9 + 10**7, 1280, 2, 1)
    assert tokens_in(10**9, 1280, 2, 1) % 2048 == 0


def test_compiling_is_for_long_work_on_gpus() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    published = PUBLISHED["esm2_t33_650M_UR50D"]
    assert compiling_pays("auto", published, cuda, 33, 100e6)
    assert not compiling_pays("auto", published, cuda, 33, 1e6)
    assert not compiling_pays("auto", published, cpu, 33, 1e9)
    assert compiling_pays(True, published, cpu, 1, 1)
    assert not compiling_pays(False, published, cuda, 33, 1e12)


def test_figures_add_up_to_shares() -> None:
    parts = [
        Figures(residues=90, tokens=110, pad_tokens=10, passes=1, seconds=1.0, busy_seconds=0.9),
        Figures(
            residues=210,
            tokens=220,
            pad_tokens=1,
            passes=2,
            seconds=2.0,
            busy_seconds=1.8,
            wait_seconds=0.3,
            write_seconds=1.5,
        ),
    ]
    found = summary(part.to_json() for part in parts)
    shares = {"busy": 0.9, "waited": 0.1, "writing": 0.5, "padding": 0.0333}
    assert found == {"residues_per_second": 100.0, **shares, "passes": 3}
    assert summary([]) == {}


def test_one_model_is_kept_and_none_after_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in float32 beside the same in half precision, or beside a training, may not fit a GPU."""
    monkeypatch.setattr(Embedder, "_shared", {})
    first = weakref.ref(Embedder.shared("bundled", Store(), "float32"))
    assert Embedder.shared("bundled", Store(), "float32") is first()
    second = weakref.ref(Embedder.shared("bundled", Store(), "bfloat16"))
    gc.collect()
    assert first() is None
    with Behind():
        assert Embedder.shared("bundled", Store(), "bfloat16") is second()
    gc.collect()
    assert second() is None


def test_the_path_of_older_cards_is_float16_with_sdpa(embedder: Embedder) -> None:
    """Below sm80: float16 throughout, attention by SDPA; within float16's gate of float32, at every layer."""
    half = Embedder("bundled", Store(), "float16")
    assert (half.compute, half.attention) == ("float16", "sdpa")
    sequences = random_proteins(4, 12, 200)
    layers, sides = list(range(9)), [False] * 12
    exact = embedder.run(sequences, layers, sides, "float32", 4096, quiet, quiet)
    ours = half.run(sequences, layers, sides, "float32", 4096, quiet, quiet)
    for layer in layers:
        difference = (ours[layer][0] - exact[layer][0]).norm() / exact[layer][0].norm()
        assert float(difference) <= 3e-3
