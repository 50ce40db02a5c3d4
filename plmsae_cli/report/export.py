"""The table users ask for: a row a latent and concept, with all else that is known of the latent in one number or word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.tables import read_table

_FORMULA = r"^[=+\-@\t\r]"
_REPEATED = "concept"
"""Columns of latents.parquet that begin so say of the best concept what the rows of latent_concepts.parquet say of each."""


def concepts_per_latent(run: str, store: Store) -> Any:
    """`latent`, the columns of latent_concepts.parquet (null for a latent without concept), then those of latents.parquet.

    Raises:
        UserError: the run was not evaluated.
    """
    import pyarrow as pa

    latents = _read(store, join(run, "eval", "latents.parquet"))
    if latents is None:
        raise UserError(f"{run} has no eval/latents.parquet", "evaluate it first: `plmsae eval exp.yaml`")
    about = [name for name in latents.column_names if name == "latent" or not name.startswith(_REPEATED)]
    concepts = _read(store, join(run, "eval", "latent_concepts.parquet"))
    if concepts is None:
        return latents.select(about)
    key = concepts.schema.field("latent").type
    latents = latents.select(about).set_column(0, "latent", latents["latent"].cast(key))
    both = latents.join(concepts, "latent", join_type="left outer")
    both = both.sort_by([("latent", "ascending"), ("rank", "ascending")])
    names = ["latent", *(n for n in concepts.column_names if n != "latent"), *about[1:]]
    found: pa.Table = both.select(names).combine_chunks()
    return found


def _read(store: Store, path: str) -> Any:
    return read_table(store, path) if store.exists(path) else None


def write_csv(table: Any, path: Path) -> None:
    """Text as UTF-8, nothing for null; texts that a spreadsheet would take for a formula get an apostrophe in front."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv

    for place, field in enumerate(table.schema):
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            column = table[field.name]
            quoted = pc.binary_join_element_wise("'", column, "")
            column = pc.if_else(pc.match_substring_regex(column, _FORMULA), quoted, column)
            table = table.set_column(place, field, column)
    pyarrow.csv.write_csv(table, path, pyarrow.csv.WriteOptions(quoting_style="needed"))


def write_parquet(table: Any, path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, path, compression="zstd")
