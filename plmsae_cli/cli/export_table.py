"""`export --csv` and `--parquet`: what a run's latents are about, as one table."""

from __future__ import annotations

import json
from pathlib import Path

from plmsae_cli.cli.exits import DONE, checked


def export_table(run: Path, csv: Path | None, parquet: Path | None, as_json: bool) -> int:
    """Write the table in each form that is named."""

    def work() -> int:
        from plmsae_cli.config.errors import UserError
        from plmsae_cli.report.export import concepts_per_latent, write_csv, write_parquet
        from plmsae_cli.store.fs import Store

        if csv is None and parquet is None:
            raise UserError("export: nothing to write", "name a file: --csv table.csv or --parquet table.parquet")
        folder = run if run.exists() else Path("runs") / run
        table = concepts_per_latent(str(folder), Store())
        for path, write in ((csv, write_csv), (parquet, write_parquet)):
            if path is None:
                continue
            try:
                write(table, path)
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror or error}", "name another file") from None
            if not as_json:
                print(f"wrote {path}: {len(table):,} rows, {len(table.column_names)} columns")
        if as_json:
            files = [str(path) for path in (csv, parquet) if path is not None]
            print(json.dumps({"schema": 1, "rows": len(table), "columns": table.column_names, "files": files}))
        return DONE

    return checked(work)
