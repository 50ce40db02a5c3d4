"""What a run leaves, on its W&B page: figures, tables, and where data and model are. Never the data themselves."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plmsae_cli.config.errors import first_line
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.runtime.metrics import flat, start_wandb
from plmsae_cli.runtime.run_folder import read_json, read_pointers
from plmsae_cli.store.fs import is_remote

ROWS = 1000
"""Latents in the table, the densest first; latents.parquet has all."""


def publish(experiment: Experiment, run: Path) -> None:
    """Add the results of a run to its W&B page. A failure is told in one line, and costs nothing else."""
    if experiment.wandb.mode == "off":
        return
    scores, sweep = read_json(run / "eval" / "metrics.json"), read_json(run / "sweep.json")
    saved = run / "sae" if (run / "sae").is_dir() else run / "plm"
    if scores is None and sweep is None and not saved.is_dir():
        return
    try:
        import wandb

        page = start_wandb(experiment, run, **({"job_type": "sweep"} if sweep is not None else {}))
        if scores is not None:
            page.summary.update(figures(scores))
            if (run / "eval" / "latents.parquet").is_file():
                columns, rows = _latents(run / "eval" / "latents.parquet")
                page.log({"eval/latents": wandb.Table(columns=[*columns], data=rows)})
        if sweep is not None:
            columns, rows = trials(sweep)
            page.log({"sweep/trials": wandb.Table(columns=[*columns], data=rows)})
        for name, pointer in read_pointers(run).items():
            facts = {"stage": name, "key": pointer["key"], "rows": pointer["rows"]}
            data = wandb.Artifact(f"{name}-{pointer['key']}", type="dataset", metadata=facts)
            data.add_reference(address(pointer["folder"]), checksum=False)
            page.log_artifact(data)
        if saved.is_dir():
            model = wandb.Artifact(f"{saved.name}-{experiment.name}", type="model")
            model.add_reference(address(str(saved)), checksum=False)
            page.log_artifact(model)
        files, offline = Path(page.dir).parent, page.settings._offline
        page.finish()
        if offline:
            print(f"W&B has the results too; upload them with: wandb sync {files}", file=sys.stderr)
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        print(f"W&B has not taken the results ({why}); they are in {run}", file=sys.stderr, flush=True)


def address(folder: str) -> str:
    """A folder as a reference."""
    return folder if is_remote(folder) else Path(folder).absolute().as_uri()


def figures(scores: Mapping[str, Any]) -> dict[str, float]:
    """Every single number of eval/metrics.json by its path: `eval/fidelity/fvu`."""
    return {
        f"eval/{name}": value
        for name, value in flat(scores).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def trials(sweep: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """The trials of sweep.json as a table: values of the fields, figures, state."""
    names = list(sweep["grid"])
    metrics = list(dict.fromkeys(name for trial in sweep["trials"] for name in trial.get("metrics") or {}))
    rows = [
        [
            trial["hash"],
            trial["state"],
            *(_cell(trial["values"].get(name)) for name in names),
            *((trial.get("metrics") or {}).get(name) for name in metrics),
        ]
        for trial in sweep["trials"]
    ]
    return ["trial", "state", *names, *metrics], rows


def _cell(value: Any) -> Any:
    """A table's column has one type: what is no number is text."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else json.dumps(value)


def _latents(path: Path) -> tuple[list[str], list[list[Any]]]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    order = table.sort_by([("density", "descending")]).slice(0, ROWS) if "density" in table.column_names else table
    plain = [name for name, kind in zip(order.column_names, order.schema.types, strict=True) if not _nested(kind)]
    columns = [order[name].to_pylist() for name in plain]
    return plain, [list(row) for row in zip(*columns, strict=True)]


def _nested(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_nested(kind))
