"""A language model on this process's device, and the loop that keeps the device busy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate

import torch

from plmsae_cli.config.errors import UserError, first_line
from plmsae_cli.plm.attention import attention_backend, forgo_kernels
from plmsae_cli.plm.reader import Reader
from plmsae_cli.plm.unet import UNet
from plmsae_cli.plm.unet_reader import UNetReader
from plmsae_cli.runtime.device import compute_dtype, pick_device
from plmsae_cli.runtime.embedding.batches import Batch, ahead, make_batch
from plmsae_cli.runtime.embedding.budget import auto_tokens, compiling_pays
from plmsae_cli.runtime.embedding.delivery import Put, delivery
from plmsae_cli.runtime.embedding.fallback import compile_failed, kernels_failed
from plmsae_cli.runtime.embedding.packing import SPECIAL_TOKENS, Shape, Typical, choose_shape, deal
from plmsae_cli.runtime.embedding.stream import Job, Stream
from plmsae_cli.runtime.embedding.transfer import Stopwatch, Transfer, transfer_for
from plmsae_cli.runtime.embedding.windows import Piece, pieces
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.store.encoders import is_encoder
from plmsae_cli.store.fs import Store

COMPILE_MODE: str | None = None
"""Mode of torch.compile. CUDA graphs are none of them: one region runs for longer than it takes to launch."""
ANY_LENGTH = True
"""Compile for any number of tokens, so that each shard's packs share its tokens without a remainder; otherwise all packs
of an artifact have the tokens that its largest shard needs, and padding grows with the spread of the shards."""
_MOST_CONSTANT = 2048
"""Tokens of a document in constant packs: the attention kernel looks at every place for the longest, filled or not."""


class Embedder:
    """A language model on this process's device, kept warm between shards."""

    _shared: dict[tuple[str, str], Embedder] = {}

    def __init__(self, weights: str, store: Store, compute: str) -> None:
        self.device = pick_device()
        self.dtype = compute_dtype(compute, self.device)
        self.compute = str(self.dtype).removeprefix("torch.")
        self.last_done = 0.0
        self._backed_off = sys.maxsize
        self.d: int
        self.attention: str
        self._open(weights, store)

    def _open(self, weights: str, store: Store) -> None:
        """Bring the model to the device."""
        self.model = load_plm(weights, store, self.device, self.dtype)
        self.d = self.model.config.d
        self.attention = attention_backend(self.device, self.dtype, self.model.config.head_dim)
        self.compile_mode, self.any_length = COMPILE_MODE, ANY_LENGTH
        self._compiles = True
        self._auto: dict[int, int] = {}

    @classmethod
    def shared(cls, weights: str, store: Store, compute: str) -> Embedder:
        """The process's instance for these weights; it keeps one, since two may not fit the device."""
        key = (weights, compute)
        if key not in cls._shared:
            cls.forget()
            if is_encoder(weights):
                from plmsae_cli.runtime.embedding.encoder import EncoderEmbedder

                cls._shared[key] = EncoderEmbedder(weights, store, compute)
            else:
                cls._shared[key] = cls(weights, store, compute)
        return cls._shared[key]

    @classmethod
    def forget(cls) -> None:
        """Let go of the shared instance, and of its memory once nobody uses it any more."""
        cls._shared.clear()
        torch.cuda.empty_cache()

    @cached_property
    def reader(self) -> Reader | UNetReader:
        return UNetReader(self.model) if isinstance(self.model, UNet) else Reader(self.model)

    @property
    def fused(self) -> bool:
        """Whether our own kernels run between the attentions."""
        return isinstance(self.reader, Reader) and self.reader.fused

    @cached_property
    def transfer(self) -> Transfer:
        return transfer_for(self.device)

    def budget(self, wanted: str | int, num_layers: int = 1) -> int:
        """Tokens of one pass: as asked, or what fits the free memory of the device."""
        if isinstance(wanted, int):
            return wanted
        # Asked for once: later answers would depend on what earlier passes still hold, and the shapes with them.
        if num_layers not in self._auto:
            self._auto[num_layers] = auto_tokens(self.model.config, self.device, self.dtype, num_layers)
        return self._auto[num_layers]

    def stream(
        self,
        sequences: Sequence[str],
        layers: Sequence[int],
        stored: torch.dtype,
        batch_tokens: str | int,
        put: Put,
        progress: Callable[..., None],
        check_stop: Callable[[], None],
        *,
        window: int | None = None,
        compile: str | bool = "auto",
        typical: Typical | None = None,
    ) -> Stream:
        """Have every residue's row of each layer put; returns when the last pass is queued.

        Args:
            sequences: proteins; every residue gets a row, <cls> and <eos> none.
            layers: which representations, by the convention of `ESM2.forward`.
            stored: type of the rows handed out.
            batch_tokens: budget of one pass, or `auto`; halved where the GPU's memory runs out.
            window: longer proteins are read in windows of so many residues (see `windows.pieces`).
            compile: true, false, or `auto`.
            typical: of the artifact that these proteins are a part of: whether compiling pays, and the shape that all
                parts share (see `ANY_LENGTH`); by default they are all.

        Raises:
            UserError: memory runs out on a single protein.
        """
        left = [p for p in pieces([len(s) for s in sequences], window) if p.stop > p.start]
        num_residues = sum(p.last - p.first for p in left)
        wanted = sorted(set(layers))
        job = Job(sequences, wanted, stored, batch_tokens, put, progress, check_stop, num_residues)
        stream = Stream(self, Stopwatch(self.device), job)
        self._launch(stream, left, compile, typical)
        stream.launched()
        return stream

    def _launch(self, stream: Stream, left: list[Piece], compile: str | bool, typical: Typical | None) -> None:
        """Queue every pass; arguments and errors as of `stream`."""
        job = stream.job
        sizes = [p.stop - p.start + SPECIAL_TOKENS for p in left]
        own = Typical(sum(sizes), len(sizes), max(sizes, default=0), sum(sizes))
        typical = typical or own
        stream.compiled = self._compiles and compiling_pays(
            compile, self.model.config, self.device, job.layers[-1], typical.all_tokens
        )
        while left:
            stream.budget = min(self.budget(job.batch_tokens, len(job.layers)), self._backed_off)
            largest = own if self.any_length else typical
            shape = (
                choose_shape(largest, stream.budget, min(largest.longest, _MOST_CONSTANT)) if stream.compiled else None
            )
            left = self._passes(stream, left, shape)

    def _passes(self, stream: Stream, left: list[Piece], shape: Shape | None) -> list[Piece]:
        """Run packs until all pieces are done or memory runs out; returns the pieces left."""
        job = stream.job
        packs = deal([p.stop - p.start + SPECIAL_TOKENS for p in left], stream.budget, shape)
        order = [(chosen, None) for chosen in packs.loose] + [(chosen, shape) for chosen in packs.constant]

        def make(item: tuple[list[int], Shape | None]) -> Batch:
            return make_batch(job.sequences, [left[i] for i in item[0]], item[1], self.device.type == "cuda")

        for done, batch in enumerate(ahead(make, order)):
            job.check_stop()
            stream.watch.begin()
            try:
                for layer, rows_RD in self._pass(batch, job.layers, job.stored):
                    deliver = delivery(job.put, layer, batch.pieces)
                    stream.deliveries.append(self.transfer.send(rows_RD[: batch.num_rows], deliver))
                failed = None
            except torch.cuda.OutOfMemoryError as error:
                failed = error.with_traceback(None)  # the traceback holds the pass's tensors
            except Exception as error:
                if not self._goes_on_without(error, stream):
                    raise
                stream.settle()  # shallower layers of this pass may be on their way
                return [left[i] for chosen, _ in order[done:] for i in chosen]
            stream.watch.end()
            if failed is not None:
                self.back_off(stream, len(batch.pieces), batch.pieces[0].stop - batch.pieces[0].start, failed)
                return [left[i] for chosen, _ in order[done:] for i in chosen]
            stream.advanced(batch.num_rows, len(batch.tokens_T), batch.num_padding)
        return []

    def _goes_on_without(self, error: Exception, stream: Stream) -> bool:
        """Where something does not compile on this machine, say so and do without it; false for any other error."""
        if compile_failed(error):
            what = "torch.compile fails here"
            self._compiles = stream.compiled = False
        elif kernels_failed(error) and forgo_kernels():
            what = "our own kernels do not compile here"
            self.__dict__.pop("reader", None)
            self.attention = attention_backend(self.device, self.dtype, self.model.config.head_dim)
        else:
            return False
        print(f"{what}, going on without: {first_line(error)}", file=sys.stderr, flush=True)
        return True

    def back_off(self, stream: Stream, documents: int, longest: int, failed: Exception) -> None:
        """Halve the budget after memory ran out on so many documents. Raises UserError where it was one alone."""
        if documents == 1:
            raise UserError(
                f"the GPU's memory does not hold one protein of {longest:,} residues",
                "lower embed.max_length, or use a GPU with more memory",
            ) from failed
        stream.settle()  # rows of this pass on their way must not arrive after the second attempt's
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._backed_off = stream.budget // 2
        print(f"out of GPU memory: embed.batch_tokens halved to {self._backed_off:,}", file=sys.stderr, flush=True)

    @torch.no_grad()
    def _pass(self, batch: Batch, layers: Sequence[int], stored: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """Each layer's rows [R, D] on the device, R as in `kept_R`."""
        tokens_T, documents, kept_R = batch.to(self.device)
        found = self.reader.layers(
            tokens_T, documents, layers, compiled=batch.constant, mode=self.compile_mode, any_length=self.any_length
        )
        for layer, x_TD in found:
            yield layer, x_TD.index_select(0, kept_R).to(stored)

    def run(
        self,
        sequences: Sequence[str],
        layers: Sequence[int],
        heldout: Sequence[bool],
        dtype: str,
        batch_tokens: str | int,
        progress: Callable[..., None],
        check_stop: Callable[[], None],
        *,
        window: int | None = None,
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """`stream` into memory: layer -> (training rows [R, d], held-out rows [H, d]), in the order of the sequences."""
        stored, d = getattr(torch, dtype), self.d
        places: dict[int, int] = {}
        totals = []
        for side in (False, True):
            own = [i for i, held in enumerate(heldout) if held == side]
            ends = list(accumulate((len(sequences[i]) for i in own), initial=0))
            places |= dict(zip(own, ends, strict=False))
            totals.append(ends[-1])
        rows = {layer: tuple(torch.empty(total, d, dtype=stored) for total in totals) for layer in layers}

        def put(layer: int, protein: int, first: int, rows_RD: torch.Tensor) -> None:
            start = places[protein] + first
            rows[layer][int(heldout[protein])][start : start + len(rows_RD)] = rows_RD

        self.stream(sequences, layers, stored, batch_tokens, put, progress, check_stop, window=window).wait()
        return {layer: (training, held) for layer, (training, held) in rows.items()}
