"""`hf:` weights: any encoder that transformers reads, its layers taken by one forward hook each.

Layer k is `hidden_states[k]` as transformers counts: 0 the embedding, the last what the encoder returns. B: sequences of a
batch. T: tokens of the longest, specials included. R: rows. D: width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from plmsae_cli.config.errors import UserError
from plmsae_cli.runtime.embedding.budget import CPU_TOKENS
from plmsae_cli.runtime.embedding.delivery import delivery
from plmsae_cli.runtime.embedding.embedder import Embedder
from plmsae_cli.runtime.embedding.packing import SPECIAL_TOKENS, Typical
from plmsae_cli.runtime.embedding.stream import Stream
from plmsae_cli.runtime.embedding.windows import Piece
from plmsae_cli.store.encoders import quietly, transformers_module
from plmsae_cli.store.fasta_index import KNOWN_LETTERS
from plmsae_cli.store.fs import Store
from plmsae_cli.store.weights import WeightsInfo, resolve_weights

_GPU_TOKENS = 16_384
_AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
PROBE = KNOWN_LETTERS + "".join(2 * letter for letter in KNOWN_LETTERS)
"""Every letter that a sequence may have, alone and repeated: tokenisers are known to join letters they do not know."""


_UNUSED = ("pooler.", "contact_head.", "decoder.", "lm_head.", "inv_freq", "position_ids")
"""Of tensors that no hidden state of the encoder depends on, or that follow from the configuration."""


class _Enough(Exception):
    """The deepest wanted layer is there."""


class Tokeniser:
    """A tokeniser that makes exactly one token a residue, between constant special tokens."""

    def __init__(self, tokeniser: Any, name: str) -> None:
        self._tokeniser, self._name = tokeniser, name
        self.pad: int = tokeniser.pad_token_id if tokeniser.pad_token_id is not None else 0
        for separator in ("", " "):
            self._separator = separator
            bare = self._ids([PROBE], False)[0]
            whole = self._ids([PROBE], True)[0]
            before = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
            letters = {letter: bare[i] for i, letter in enumerate(KNOWN_LETTERS)} if len(bare) == len(PROBE) else {}
            if before is not None and len({letters.get(letter) for letter in _AMINO_ACIDS}) == len(_AMINO_ACIDS):
                self.before, self.special = before, len(whole) - len(bare)
                return
        raise UserError(
            f"model.weights: the tokeniser of hf:{name} does not make exactly one token of each residue, so its rows are not "
            "those of residues",
            "use a model whose tokens are amino acids; of others only imported activations can be trained on (embed.imported)",
        )

    def _ids(self, sequences: Sequence[str], special: bool) -> list[list[int]]:
        texts = [self._separator.join(sequence) for sequence in sequences]
        found = quietly(
            lambda: self._tokeniser(texts, add_special_tokens=special, truncation=False), f"hf:{self._name}"
        )
        return [list(ids) for ids in found["input_ids"]]

    def batch(self, sequences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens [B, T] padded on the right, and the attention mask."""
        ids = self._ids(sequences, True)
        tokens_BT = torch.full((len(ids), max(map(len, ids))), self.pad)
        mask_BT = torch.zeros_like(tokens_BT)
        for row, (own, sequence) in enumerate(zip(ids, sequences, strict=True)):
            if len(own) != len(sequence) + self.special:
                raise UserError(
                    f"model.weights: the tokeniser of hf:{self._name} makes {len(own)} tokens of {len(sequence)} residues "
                    f"({sequence[:20]}...)",
                    "use a model whose tokens are amino acids",
                )
            tokens_BT[row, : len(own)] = torch.tensor(own)
            mask_BT[row, : len(own)] = 1
        return tokens_BT, mask_BT


class Encoder:
    """The model and its tokeniser, on a device."""

    def __init__(self, info: WeightsInfo, device: torch.device, dtype: torch.dtype) -> None:
        self.name = info.name
        self.num_layers: int = info.config["num_layers"]
        options = {"local_files_only": True, "trust_remote_code": False}
        auto = transformers_module()
        self.tokens = Tokeniser(
            quietly(lambda: auto.AutoTokenizer.from_pretrained(info.path, **options), str(info.path)), info.name
        )
        model, report = quietly(
            lambda: auto.AutoModel.from_pretrained(
                info.path, use_safetensors=True, output_loading_info=True, **options
            ),
            str(info.path),
        )
        _require_weights(info.name, report["missing_keys"])
        if hasattr(model, "decoder"):  # also where only the encoder was saved, whose configuration denies it
            model = model.get_encoder()
        # Buffers stay: rotary frequencies in bfloat16 are far off past position 1,000.
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)
        self.model: nn.Module = model.to(device).eval()
        self.attention = str(getattr(model.config, "_attn_implementation", None) or "eager")
        self.most_tokens = _most_tokens(self.model)
        self._device = device
        self._blocks = self._find_blocks()
        self._require_layers()

    def _find_blocks(self) -> nn.ModuleList:
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == self.num_layers]
        if not lists:
            raise UserError(
                f"model.weights: hf:{self.name} has no list of its {self.num_layers} layers, so they cannot be read",
                "compute its activations with its own program and import them (embed.imported)",
            )
        return lists[0]

    def _require_layers(self) -> None:
        """Raises UserError where what the hooks see is not what transformers calls its hidden states."""
        tokens_BT, mask_BT = (
            tensor.to(self._device) for tensor in self.tokens.batch([KNOWN_LETTERS, KNOWN_LETTERS[:7]])
        )
        with torch.no_grad():
            theirs = self.model(input_ids=tokens_BT, attention_mask=mask_BT, output_hidden_states=True).hidden_states
        ours = dict(self.layers(tokens_BT, mask_BT, range(self.num_layers + 1)))
        real_BT = mask_BT.bool()
        same = len(theirs) == len(ours) and all(
            torch.allclose(ours[k][real_BT].float(), x_BTD[real_BT].float(), rtol=1e-2, atol=1e-2)
            for k, x_BTD in enumerate(theirs)
        )
        if not same:
            raise UserError(
                f"model.weights: the layers of hf:{self.name} are not where its hidden states are taken",
                "compute its activations with its own program and import them (embed.imported)",
            )

    @torch.no_grad()
    def layers(self, tokens_BT: Tensor, mask_BT: Tensor, wanted: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Layer k and its states [B, T, D] for each k wanted; blocks above the deepest are not run."""
        found: dict[int, Tensor] = {}
        deepest = max(wanted)

        def taker(layer: int) -> Callable[..., None]:
            def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                found[layer] = args[0] if args else kwargs["hidden_states"]
                if layer == deepest:
                    raise _Enough

            return take

        with ExitStack() as stack:
            for layer in wanted:
                if layer < self.num_layers:
                    # What enters block k is hidden state k.
                    hook = self._blocks[layer].register_forward_pre_hook(taker(layer), with_kwargs=True)
                    stack.callback(hook.remove)
            with suppress(_Enough):
                found[self.num_layers] = self.model(input_ids=tokens_BT, attention_mask=mask_BT).last_hidden_state
        for layer in sorted(set(wanted)):
            yield layer, found.pop(layer)


def _require_weights(name: str, missing: Iterable[str]) -> None:
    """Raises UserError where transformers filled in random numbers that hidden states depend on."""
    lacking = sorted(key for key in missing if not any(part in key for part in _UNUSED))
    if lacking:
        raise UserError(
            f"model.weights: the files of hf:{name} lack {len(lacking)} tensors of the model, {lacking[0]} first",
            "config.json and the weights are of different models, or a file is missing",
        )


def _most_tokens(model: nn.Module) -> int | None:
    """Of one sequence; None where positions are not looked up in a table."""
    if getattr(model.config, "position_embedding_type", None) not in (None, "absolute"):
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


class EncoderEmbedder(Embedder):
    """An `Embedder` of an `hf:` model: padded batches, longest first, not compiled."""

    @property
    def fused(self) -> bool:
        return False

    def _open(self, weights: str, store: Store) -> None:
        info = resolve_weights(weights, store, download=False)
        self.encoder = Encoder(info, self.device, self.dtype)
        self.d = info.config["d"]
        self.attention = f"transformers {self.encoder.attention}"
        print(
            f"model.weights: {weights} is read by transformers in padded batches, several times slower than ESM-2 of our own",
            file=sys.stderr,
            flush=True,
        )

    def budget(self, wanted: str | int, num_layers: int = 1) -> int:
        """Tokens of one batch, padding included."""
        if isinstance(wanted, int):
            return wanted
        return CPU_TOKENS if self.device.type == "cpu" else _GPU_TOKENS

    def _launch(self, stream: Stream, left: list[Piece], compile: str | bool, typical: Typical | None) -> None:
        """As of `Embedder`; `compile` is of no use here.

        Raises:
            UserError: as there, and where a protein of these, or with `typical` of any part, is longer than the model reads.
        """
        left = sorted(left, key=lambda p: p.start - p.stop)
        special, most = self.encoder.tokens.special, self.encoder.most_tokens
        longest = left[0].stop - left[0].start if left else 0
        if typical is not None:  # the first part to run tells, not hours later the one that has the protein
            longest = max(longest, typical.longest - SPECIAL_TOKENS)
        if most is not None and longest + special > most:
            raise UserError(
                f"model.weights: hf:{self.encoder.name} reads at most {most - special:,} residues, a protein has "
                f"{longest:,}",
                f"set embed.max_length to {most - special} or less",
            )
        while left:
            stream.job.check_stop()
            stream.budget = min(self.budget(stream.job.batch_tokens), self._backed_off)
            width = left[0].stop - left[0].start + special
            chosen = left[: max(1, stream.budget // width)]
            stream.watch.begin()
            try:
                self._batch(stream, chosen)
            except torch.cuda.OutOfMemoryError as error:
                self.back_off(stream, len(chosen), width - special, error.with_traceback(None))
                continue
            stream.watch.end()
            left = left[len(chosen) :]
            padding = sum(width - (p.stop - p.start + special) for p in chosen)
            stream.advanced(sum(p.last - p.first for p in chosen), width * len(chosen), padding)

    def _batch(self, stream: Stream, chosen: Sequence[Piece]) -> None:
        job = stream.job
        tokens_BT, mask_BT = self.encoder.tokens.batch([job.sequences[p.protein][p.start : p.stop] for p in chosen])
        width, before = tokens_BT.shape[1], self.encoder.tokens.before
        kept_R = torch.cat(
            [torch.arange(p.first - p.start, p.last - p.start) + row * width + before for row, p in enumerate(chosen)]
        ).to(self.device)
        for layer, x_BTD in self.encoder.layers(tokens_BT.to(self.device), mask_BT.to(self.device), job.layers):
            rows_RD = x_BTD.flatten(0, 1).index_select(0, kept_R).to(job.stored)
            stream.deliveries.append(self.transfer.send(rows_RD, delivery(job.put, layer, chosen)))
