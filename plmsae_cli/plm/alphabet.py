"""Residues to tokens and back: the 33-token alphabet of ESM-1b and ESM-2.

The token numbers are those the published weights were trained with (Rives et al., PNAS 2021; Lin et al.,
Science 2023). A sequence is `<cls>` residues `<eos>`. Shape letters: T tokens of a pack, S documents of a
pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from plmsae_cli.plm.attention import Documents

Tokens = npt.NDArray[np.uint8]

CLS, PAD, EOS, UNK, MASK = 0, 1, 2, 3, 32
VOCAB_SIZE = 33
AMINO_ACIDS = "LAGVSERTIDPKQNFYMHWC"
"""The 20 standard residues, in the order of their tokens 4 to 23."""
LETTERS = AMINO_ACIDS + "XBUZO.-"
"""Every letter that has a token of its own: the standard residues, then 24 to 30."""
FIRST_LETTER = 4
TOKEN_NAMES = ("<cls>", "<pad>", "<eos>", "<unk>", *LETTERS, "<null_1>", "<mask>")

_NO_TOKEN = 255


def _table(other: int) -> bytes:
    table = bytearray([other] * 256)
    for index, letter in enumerate(LETTERS):
        table[ord(letter)] = table[ord(letter.lower())] = FIRST_LETTER + index
    return bytes(table)


_TO_X = _table(FIRST_LETTER + LETTERS.index("X"))
_TO_NO_TOKEN = _table(_NO_TOKEN)


def _bytes(sequence: str | bytes) -> bytes:
    # One byte a character whatever the character is, so that no residue is ever shifted.
    return sequence if isinstance(sequence, bytes) else sequence.encode("ascii", "replace")


def encode(sequence: str | bytes, unknown: Literal["X", "error"] = "X") -> Tokens:
    """Residue tokens [len(sequence)], without `<cls>` and `<eos>`; exactly one token a character.

    Case is ignored. A letter without a token (J, *, digits, anything else) becomes X, or with
    `unknown="error"` raises a ValueError that names the first one and its position (from 1).
    """
    data = _bytes(sequence)
    if unknown == "error":
        place = data.translate(_TO_NO_TOKEN).find(_NO_TOKEN)
        if place >= 0:
            letter = sequence[place : place + 1]
            raise ValueError(f"position {place + 1} holds {letter!r}, which is no residue of the alphabet {LETTERS}")
    return np.frombuffer(bytearray(data).translate(_TO_X), dtype=np.uint8)


def decode(tokens: npt.NDArray[np.integer] | Sequence[int]) -> str:
    """The text of tokens: letters, and the special tokens by their names in angle brackets."""
    return "".join(TOKEN_NAMES[int(token)] for token in tokens)


_CHARACTER = np.full(256, ord("X"), dtype=np.uint8)
_CHARACTER[FIRST_LETTER : FIRST_LETTER + len(LETTERS)] = list(LETTERS.encode())


def letters(residues: npt.NDArray[np.integer]) -> bytes:
    """One letter a residue token, X for any other: as the protein stands in a file, and so is hashed."""
    text: bytes = _CHARACTER[residues].tobytes()
    return text


def wrap(residues: Tokens) -> Tokens:
    """`<cls>` residues `<eos>`: [L] to [L + 2]."""
    wrapped = np.empty(len(residues) + 2, dtype=np.uint8)
    wrapped[0], wrapped[1:-1], wrapped[-1] = CLS, residues, EOS
    return wrapped


class Packed(NamedTuple):
    """Documents one after the other in one stream, each `<cls>` residues `<eos>`."""

    tokens_T: torch.Tensor
    """uint8; `<pad>` after the last document if a fixed size was asked for."""
    cu_seqlens: torch.Tensor
    """int32 [S + 1]: where each document begins, and the end of the last."""
    max_len: int
    """No document has more tokens."""
    residue_mask_T: torch.Tensor
    """bool, true at residues; in order, these are the rows of the documents' residues."""
    lengths: tuple[int, ...]
    """Tokens of each document, on the host."""

    @property
    def documents(self) -> Documents:
        return Documents(self.cu_seqlens, self.max_len, self.lengths)

    def to(self, device: torch.device | str) -> Packed:
        """The same pack on another device."""
        moved = (t.to(device, non_blocking=True) for t in (self.tokens_T, self.cu_seqlens, self.residue_mask_T))
        tokens_T, cu_seqlens, residue_mask_T = moved
        return Packed(tokens_T, cu_seqlens, self.max_len, residue_mask_T, self.lengths)


def pack(
    sequences: Sequence[Tokens],
    *,
    num_tokens: int | None = None,
    num_documents: int | None = None,
    max_len: int | None = None,
) -> Packed:
    """Pack residue tokens (each [L], as `encode` gives them) into one stream.

    With `num_tokens` the stream is filled up with `<pad>`, in documents of at most `max_len` tokens, and with
    `num_documents` the list of documents with empty ones: constant shapes, for a compiled model. `max_len`
    (tokens, the two ends included) is the longest document's by default. Raises ValueError where the
    sequences do not fit.
    """
    lengths = [len(residues) + 2 for residues in sequences]
    longest = max(lengths, default=1)
    max_len = longest if max_len is None else max_len
    if longest > max_len:
        raise ValueError(f"a document of {longest} tokens in a pack whose max_len is {max_len}")
    used = sum(lengths)
    num_tokens = used if num_tokens is None else num_tokens
    if used > num_tokens:
        raise ValueError(f"{used} tokens do not fit into a pack of {num_tokens}")

    tokens_T = np.full(num_tokens, PAD, dtype=np.uint8)
    residue_mask_T = np.zeros(num_tokens, dtype=np.bool_)
    start = 0
    for residues, length in zip(sequences, lengths, strict=True):
        end = start + length
        tokens_T[start], tokens_T[end - 1] = CLS, EOS
        tokens_T[start + 1 : end - 1] = residues
        residue_mask_T[start + 1 : end - 1] = True
        start = end

    # Padding needs documents of its own: the variable-length kernel leaves rows outside all documents
    # unwritten.
    full, rest = divmod(num_tokens - used, max_len)
    lengths += [max_len] * full + [rest] * (rest > 0)
    if num_documents is not None:
        if len(lengths) > num_documents:
            raise ValueError(f"{len(lengths)} documents, padding included, in a pack of {num_documents}")
        lengths += [0] * (num_documents - len(lengths))

    cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    return Packed(
        torch.from_numpy(tokens_T),
        torch.from_numpy(cu_seqlens),
        max_len,
        torch.from_numpy(residue_mask_T),
        tuple(lengths),
    )
