"""A run's language model and dictionary, put together to read sequences."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.rows import encode_rows
from plmsae_cli.report.reading import read_settings
from plmsae_cli.runtime.embedding import Embedder
from plmsae_cli.runtime.saved import load_sae_with_facts
from plmsae_cli.sae.interface import Latents
from plmsae_cli.store.fs import Store
from plmsae_cli.store.weights import resolve_weights


class Encoder:
    """Sequences to the latents of their residues, one caller at a time.

    Activations are float32 as the model computes them, without the rounding of the stored type.
    """

    def __init__(self, run: Path) -> None:
        """Raises UserError where the run has no SAE, or its language model is not at hand."""
        self.run = run
        store = Store()
        saved = load_sae_with_facts(run, store)
        config, _ = read_settings(run)
        weights = (config.get("model") or {}).get("weights")
        trained_with = (saved.facts.get("weights") or {}).get("sha256")
        if weights is None or trained_with is None:
            raise UserError(f"{run} was trained on activations whose model is not known", "sequences cannot be read")
        found = resolve_weights(str(weights), store)
        if found.sha256 != trained_with:
            raise UserError(f"{weights} is another model than the one {run} was trained with", "name that model")
        self.layer: int = saved.facts["layer"]
        self._embedder = Embedder.shared(str(weights), store, (config.get("embed") or {}).get("compute") or "auto")
        self.sae = saved.model.to(self._embedder.device)
        self.maximum_N: Tensor = self.sae.maximum_N.cpu()
        self._alone = threading.Lock()

    def latents(self, sequences: Sequence[str]) -> Latents:
        """Active latents of all residues [R, K] of the proteins in their order, on the CPU."""
        nothing = lambda *_, **__: None  # noqa: E731
        with self._alone:
            rows = self._embedder.run(
                sequences, [self.layer], [False] * len(sequences), "float32", "auto", nothing, nothing
            )
            found = encode_rows(self.sae, rows[self.layer][0].to(self._embedder.device))
        return Latents(found.acts_BK.cpu(), found.indices_BK.cpu())
