"""The axes' files as one set of tables, and what people read of them: metrics, a CSV, a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plmsae_cli.evaluation.card import model_card
from plmsae_cli.evaluation.frame import EVAL, Scope, csv_of, write_table
from plmsae_cli.store.fs import FileRecord, join
from plmsae_cli.store.manifest import canonical_json
from plmsae_cli.store.tables import read_table


def merge(scope: Scope, axes: Sequence[str], facts: Mapping[str, Any] | None) -> list[FileRecord]:
    """Write eval/metrics.json, latents.parquet, latent_concepts.parquet, proteins.parquet, concepts.csv and model_card.md.

    Args:
        axes: those that were measured, in order.
        facts: contents of sae.json; None where no dictionary was trained: then no model card either.
    """
    metrics: dict[str, Any] = {"schema": 1, **_dictionary(scope, facts), "axes": list(axes)}
    for axis in axes:
        metrics[axis] = scope.read_json(axis, "result.json")
    here = join(scope.folder, EVAL)
    files = [scope.store.write(join(here, "metrics.json"), [canonical_json(metrics)])]
    if facts is not None:
        card = model_card(metrics, scope.made(), facts)
        files.append(scope.store.write(join(here, "model_card.md"), [card.encode()]))
    tables: dict[str, Any] = {}
    for name, combine in (
        ("latents.parquet", _beside),
        ("latent_concepts.parquet", _below),
        ("proteins.parquet", _by_id),
    ):
        found = [scope.path(axis, name) for axis in axes if scope.store.exists(scope.path(axis, name))]
        if found:
            tables[name] = combine([read_table(scope.store, path) for path in found])
    if "encode" in axes:
        tables["top_latents.parquet"] = _top_latents(scope, tables["latents.parquet"])
    for name in ("latents.parquet", "latent_concepts.parquet", "proteins.parquet", "top_latents.parquet"):
        if name in tables:
            files.append(write_table(scope.store, join(here, name), tables[name]))
        else:
            scope.store.delete(join(here, name))
    if (pairs := tables.get("latent_concepts.parquet")) is not None:
        text = csv_of(pairs.column_names, pairs.to_pylist())
        files.append(scope.store.write(join(here, "concepts.csv"), [text]))
    else:
        scope.store.delete(join(here, "concepts.csv"))
    return files


def _dictionary(scope: Scope, facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """What metrics.json says of the dictionary."""
    if facts is None:
        return {"demo": False}
    manifest = scope.made()
    return {
        "demo": (manifest["weights"] or {}).get("name") == "bundled",
        "layer": manifest["layer"],
        "architecture": facts["config"]["architecture"],
        "num_latents": facts["config"]["num_latents"],
        "k": facts["config"].get("k"),
    }


def _top_latents(scope: Scope, about: Any) -> Any:
    """Each encoded protein's strongest latents, with what other axes found of them: columns of latents.parquet."""
    table = scope.read_table("encode", "top_latents.parquet")
    latent = table["latent"].to_pylist()
    for name in ("concept", "concept_f1", "family", "family_f1", "pattern"):
        if name in about.column_names:
            table = table.append_column(name, about[name].take(latent))
    return table


def _beside(tables: Sequence[Any]) -> Any:
    """Columns of all tables, which have the same latents in the same order; lists stay where they are."""
    import pyarrow as pa

    combined = tables[0]
    for table in tables[1:]:
        assert table["latent"].equals(combined["latent"])
        for name in table.column_names:
            if name not in combined.column_names and not pa.types.is_list(table.schema.field(name).type):
                combined = combined.append_column(name, table[name])
    return combined


def _below(tables: Sequence[Any]) -> Any:
    import pyarrow as pa

    return pa.concat_tables(tables, promote_options="default")


def _by_id(tables: Sequence[Any]) -> Any:
    """One row a protein of any table, in the order of first sight; what an axis does not say is null."""
    import pyarrow as pa

    ids = dict.fromkeys(name for table in tables for name in table["id"].to_pylist())
    place = {name: number for number, name in enumerate(ids)}
    columns: dict[str, list[Any]] = {}
    for table in tables:  # a column at a time: rows of half a million proteins would be gigabytes
        where = [place[name] for name in table["id"].to_pylist()]
        for name in table.column_names:
            column = columns.setdefault(name, [None] * len(place))
            for number, value in zip(where, table[name].to_pylist(), strict=True):
                column[number] = value
    return pa.table(columns)
