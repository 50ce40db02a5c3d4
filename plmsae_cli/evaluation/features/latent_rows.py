"""The rows of `latents.parquet`, from merged tallies and the dictionary itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plmsae_cli.evaluation.features import layout
from plmsae_cli.evaluation.features.about_latents import Together, letter_effects, nearest_rows
from plmsae_cli.evaluation.features.files import Grouped
from plmsae_cli.evaluation.features.job import LISTS, Job
from plmsae_cli.evaluation.features.ranking import strength_of_key
from plmsae_cli.evaluation.features.reading import OTHER
from plmsae_cli.evaluation.features.tallies import WIDTHS, mean_activation
from plmsae_cli.plm.esm2 import ESM2
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.topk import TopK
from plmsae_cli.store.activations import Statistics
from plmsae_cli.store.fs import join
from plmsae_cli.store.tensorfile import TensorFile


def prefixes(model: Dictionary) -> list[int]:
    """Ends of the nested dictionaries, the last the whole."""
    return list(model.prefixes) if isinstance(model, TopK) else [model.num_latents]


def known_model(job: Job) -> bool:
    """Whether the rows are of `model.weights`, and of a model whose head can be asked."""
    lineage, embedded = job.scope.lineage, job.scope.made()["weights"]
    if embedded is None or job.scope.experiment.model.weights.startswith("hf:"):
        return False
    return bool(lineage.weights.sha256 == embedded["sha256"])


class LatentRows:
    """Holds the tallies of all latents: 500 bytes each."""

    def __init__(self, job: Job, merged: list[str]) -> None:
        self._job = job
        files = [TensorFile(job.scope.store, path) for path in merged]
        self._lists = Grouped(job.scope.store, merged)
        self._tally = {name: torch.cat([file.read(name) for file in files]).numpy() for name in WIDTHS}
        self.firing_N: npt.NDArray[np.int64] = self._tally["histogram"].sum(1)
        sampled = torch.cat([file.read("sample_latent") for file in files])
        self.sampled_N: npt.NDArray[np.int64] = torch.bincount(sampled, minlength=job.num_latents).numpy()
        model = job.saved.model
        self._maximum_N = model.maximum_N.cpu()
        self._mean_N = mean_activation(
            torch.from_numpy(self._tally["activation"][:, 0]), torch.from_numpy(self.firing_N), self._maximum_N
        )
        self._w_dec_ND = model.w_dec_ND.detach().to(job.device)
        self._prefixes = prefixes(model)
        self._layer: int = job.scope.made()["layer"]
        stats = Statistics.read(job.scope.store, join(job.scope.dataset, "stats.safetensors"))
        self._mean_D = stats.mean_D.float().to(job.device)
        self._plm: ESM2 | None = None
        if known_model(job):
            self._plm = load_plm(job.scope.lineage.weights, job.scope.store, job.device)

    def rows(self, group: int, together: Together) -> list[dict[str, Any]]:
        """Those of a group; `together` has the pairs of its latents."""
        first, last = self._job.latents_of(group, group + 1)
        largest_C = self._strongest(group, first, last)
        maximum_C = torch.where(self._maximum_N[first:last] > 0, self._maximum_N[first:last], largest_C)
        parts = [
            [self._counts(latent) for latent in range(first, last)],
            [{"max": a, "largest": b} for a, b in zip(maximum_C.tolist(), largest_C.tolist(), strict=True)],
            self._decoder(first, last, maximum_C),
            together.most(first, last),
        ]
        if len(self._prefixes) > 1:
            parts.append(together.parents(first, last, self._prefixes))
        return [{key: value for part in row for key, value in part.items()} for row in zip(*parts, strict=True)]

    def _counts(self, latent: int) -> dict[str, Any]:
        firing = int(self.firing_N[latent])
        histogram = self._tally["histogram"][latent]
        found = {
            "latent": latent,
            "firing": firing,
            "density": firing / self._job.side.rows,
            "band_counts": histogram.reshape(len(layout.BANDS), -1).sum(1).tolist(),
            "histogram": histogram.tolist(),
        }
        if not firing:
            return found
        letters, other = self._tally["letters"][latent, :OTHER], self._tally["letters"][latent, OTHER]
        return {
            **found,
            "mean_active": float(self._mean_N[latent]),
            "letters": (letters / firing).tolist() if other < firing else None,
            "deciles": (self._tally["deciles"][latent] / firing).tolist(),
            "mean_length": float(self._tally["length"][latent, 0] / firing),
        }

    def _strongest(self, group: int, first: int, last: int) -> Tensor:
        """The largest activation of each latent of the group; 0 where it never fired."""
        place_E = self._lists.read("place", group, group + 1)
        top_E = place_E[(place_E >> 32) % LISTS == 0]
        largest_C = torch.zeros(last - first)
        return largest_C.scatter_reduce(0, (top_E >> 32) // LISTS - first, strength_of_key(top_E), "amax")

    def _decoder(self, first: int, last: int, maximum_C: Tensor) -> list[dict[str, Any]]:
        near_CK, cosine_CK = nearest_rows(self._w_dec_ND, first, last)
        found: list[dict[str, Any]] = []
        for names, cosines in zip(near_CK.tolist(), cosine_CK.tolist(), strict=True):
            kept = [(name, cosine) for name, cosine in zip(names, cosines, strict=True) if cosine > 0]
            found.append({"neighbours": [n for n, _ in kept], "neighbour_cosines": [c for _, c in kept]})
        if self._plm is None:
            return found
        added_CD = self._w_dec_ND[first:last] * maximum_C.to(self._job.device)[:, None]
        effects = letter_effects(self._plm, self._layer, self._mean_D, added_CD)
        for row, logits, alone in zip(found, *(effect.tolist() for effect in effects), strict=True):
            row |= {"logits": logits, "row_logits": alone}
        return found
