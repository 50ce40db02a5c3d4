"""Running the language model over many proteins: packed, ahead of the disk, backed off where memory runs out."""

from __future__ import annotations

from plmsae_cli.runtime.embedding.budget import CPU_TOKENS, MOST_TOKENS
from plmsae_cli.runtime.embedding.delivery import Put
from plmsae_cli.runtime.embedding.embedder import Embedder
from plmsae_cli.runtime.embedding.figures import Figures, summary
from plmsae_cli.runtime.embedding.packing import SPECIAL_TOKENS, Typical

__all__ = ["CPU_TOKENS", "MOST_TOKENS", "SPECIAL_TOKENS", "Embedder", "Figures", "Put", "Typical", "summary"]
