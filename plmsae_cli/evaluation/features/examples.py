"""The rows of `examples/group-*.parquet`: chosen residues with their latent's activations along the protein.

Letters: E examples, A gathered activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from plmsae_cli.evaluation.features import layout
from plmsae_cli.evaluation.features.job import LISTS
from plmsae_cli.evaluation.features.ranking import rank_in_run
from plmsae_cli.evaluation.features.reading import Side, bins_of

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Along:
    """Gathered activations, in the order of latent, protein and position."""

    key_A: Ints
    """(latent x proteins + protein) x longest + position."""
    position_A: npt.NDArray[np.int32]
    act_A: npt.NDArray[np.float32]
    proteins: int
    longest: int
    """Above every position."""

    def key(self, latent_E: Ints, protein_E: Ints, position_E: Ints) -> Ints:
        """Where a residue would stand."""
        return (latent_E * self.proteins + protein_E) * self.longest + position_E


def along(columns: dict[str, Any], side: Side) -> Along:
    """From `latent`, `protein`, `position`, `act`, whose positions ascend in each protein."""
    longest, proteins = int(side.length_P.max()) + 1, len(side.length_P)
    pair_A = columns["latent"].astype(np.int64) * proteins + columns["protein"]
    order = np.argsort(pair_A, kind="stable")
    position_A = columns["position"][order]
    return Along(pair_A[order] * longest + position_A, position_A, columns["act"][order], proteins, longest)


def examples_table(
    place_E: torch.Tensor, row_E: Ints, found: Along, side: Side, context: int, maximum_N: torch.Tensor
) -> pa.Table:
    """The table of layout.EXAMPLES_SCHEMA, `annotated` null, for list entries in their order.

    Args:
        place_E, row_E: as the lists hold them.
        maximum_N: of the dictionary.
    """
    list_E = (place_E >> 32).numpy()
    latent_E, kind_E = list_E // LISTS, list_E % LISTS
    protein_E = side.protein_of(row_E)
    position_E = row_E - side.offset_P[protein_E] + 1
    length_E = side.length_P[protein_E]
    first_E, last_E = np.maximum(1, position_E - context), np.minimum(length_E, position_E + context)
    at_E = np.searchsorted(found.key_A, found.key(latent_E, protein_E, position_E))
    act_E = found.act_A[at_E]
    bin_E = bins_of(torch.from_numpy(act_E), maximum_N[torch.from_numpy(latent_E)])
    band_E = (bin_E // layout.BINS_PER_BAND).numpy().astype(np.int8)
    start_E = np.searchsorted(found.key_A, found.key(latent_E, protein_E, first_E))
    stop_E = np.searchsorted(found.key_A, found.key(latent_E, protein_E, last_E), side="right")
    size_E = stop_E - start_E
    ends = np.concatenate([[0], np.cumsum(size_E)])
    place_A = np.arange(ends[-1]) + np.repeat(start_E - ends[:-1], size_E)

    def lists(values: Any) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(values[place_A]))

    columns = {
        "latent": latent_E.astype(np.int32),
        "kind": np.where(kind_E == 0, "top", "random").tolist(),
        "band": band_E,
        "rank": (rank_in_run(place_E >> 32) + 1).numpy().astype(np.int16),
        "row": row_E,
        "protein": protein_E.astype(np.int32),
        "position": position_E.astype(np.int32),
        "activation": act_E,
        "first": first_E.astype(np.int32),
        "last": last_E.astype(np.int32),
        "positions": lists(found.position_A),
        "activations": lists(found.act_A),
        "annotated": pa.nulls(len(row_E), pa.bool_()),
    }
    return pa.table(columns, schema=layout.EXAMPLES_SCHEMA)
