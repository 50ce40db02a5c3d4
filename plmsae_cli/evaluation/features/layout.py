"""What lies in `<run>/eval/features/`: names and columns. docs/features.md says what they mean."""

from __future__ import annotations

import pyarrow as pa

from plmsae_cli.store.fs import join

FORMAT = "plmsae.features/1"
INDEX = "index.json"
LATENTS = "latents.parquet"
CONCEPTS = "concepts.parquet"
EXAMPLES = "examples"
PROTEINS = join(EXAMPLES, "proteins.parquet")
ANNOTATIONS = join(EXAMPLES, "annotations.parquet")

BANDS = (0.0, 0.25, 0.5, 0.75)
"""Lower ends of the activation bands, as shares of the latent's maximum; the last has no upper end."""
HISTOGRAM_BINS = 32
"""Equal bins of activation / maximum; what is above the maximum is in the last."""
BINS_PER_BAND = HISTOGRAM_BINS // len(BANDS)
DECILES = 10
NEIGHBOURS = 10
LEVELS = 100
"""Thresholds 0, .01 ... .99 at which concepts are counted."""

_FLOATS, _INTS, _COUNTS = pa.list_(pa.float32()), pa.list_(pa.int32()), pa.list_(pa.int64())

LATENTS_SCHEMA = pa.schema(
    [
        ("latent", pa.int64()),
        ("firing", pa.int64()),
        ("density", pa.float64()),
        ("max", pa.float32()),
        ("largest", pa.float32()),
        ("mean_active", pa.float32()),
        ("band_counts", _COUNTS),
        ("histogram", _COUNTS),
        ("letters", _FLOATS),
        ("deciles", _FLOATS),
        ("mean_length", pa.float32()),
        ("logits", _FLOATS),
        ("row_logits", _FLOATS),
        ("neighbours", _INTS),
        ("neighbour_cosines", _FLOATS),
        ("together", _INTS),
        ("together_shares", _FLOATS),
        ("together_jaccard", _FLOATS),
        ("parent", pa.int32()),
        ("parent_share", pa.float32()),
        ("description", pa.string()),
        ("description_pearson", pa.float32()),
        ("description_spearman", pa.float32()),
    ]
)
EXAMPLES_SCHEMA = pa.schema(
    [
        ("latent", pa.int32()),
        ("kind", pa.string()),
        ("band", pa.int8()),
        ("rank", pa.int16()),
        ("row", pa.int64()),
        ("protein", pa.int32()),
        ("position", pa.int32()),
        ("activation", pa.float32()),
        ("first", pa.int32()),
        ("last", pa.int32()),
        ("positions", _INTS),
        ("activations", _FLOATS),
        ("annotated", pa.bool_()),
    ]
)
PROTEINS_SCHEMA = pa.schema(
    [
        ("protein", pa.int32()),
        ("id", pa.string()),
        ("header", pa.string()),
        ("length", pa.int32()),
        ("sequence", pa.string()),
        ("cluster", pa.int32()),
        ("annotated", pa.bool_()),
    ]
)
CONCEPTS_SCHEMA = pa.schema(
    [
        ("latent", pa.int32()),
        ("rank", pa.int8()),
        ("concept", pa.string()),
        ("kind", pa.string()),
        ("by_residue", pa.bool_()),
        ("threshold", pa.float32()),
        ("inside", _INTS),
        ("outside", _INTS),
        ("found", _INTS),
    ]
)
ANNOTATIONS_SCHEMA = pa.schema(
    [
        ("protein", pa.int32()),
        ("concept", pa.string()),
        ("start", pa.int32()),
        ("stop", pa.int32()),
        ("instance", pa.int32()),
    ]
)


def group_file(group: int) -> str:
    """The examples of a group of latents, relative to the folder."""
    return join(EXAMPLES, f"group-{group:05}.parquet")
