"""`export`: a run in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plmsae_cli.cli.exits import DONE, checked
from plmsae_cli.cli.show import print_json
from plmsae_cli.cli.tokens import ask_hub


def export_run(
    run: str,
    csv: Path | None,
    parquet: Path | None,
    hf: Path | None,
    saelens: Path | None,
    push: str | None,
    as_json: bool,
) -> int:
    """Write each form that is named."""

    def work() -> int:
        from plmsae_cli.config.errors import UserError

        folders = [folder for folder in (hf, saelens) if folder is not None]
        if csv is None and parquet is None and not folders:
            ways = (
                "--csv table.csv or --parquet table.parquet (latents), --saelens folder (a dictionary), "
                "--hf folder (a language model)"
            )
            raise UserError("export: nothing to write", f"name a file or folder: {ways}")
        if push is not None and len(folders) != 1:
            raise UserError(
                "export: --push uploads what --hf or --saelens wrote",
                "add one of them: --hf FOLDER or --saelens FOLDER",
            )
        if push is not None:
            ask_hub()  # before the minutes that writing may take
        found: dict[str, Any] = {}
        said: list[str] = []
        if csv is not None or parquet is not None:
            found |= _table(run, {"csv": csv, "parquet": parquet}, said)
        if hf is not None:
            found |= _model(run, hf, said)
        if saelens is not None:
            found |= _dictionary(run, saelens, said)
        if folders:
            found["pushed"] = None if push is None else _push(folders[0], push, said)
        if as_json:
            print_json(**found)
        else:
            print("\n".join(said))
        return DONE

    return checked(work)


def _table(run: str, paths: dict[str, Path | None], said: list[str]) -> dict[str, Any]:
    from plmsae_cli.config.errors import UserError
    from plmsae_cli.report.export import concepts_per_latent, write_csv, write_parquet
    from plmsae_cli.runtime.run_folder import find_run, refuse_sweep
    from plmsae_cli.store.fs import Store

    folder = Path(run) if Path(run).exists() else find_run(Path(run))
    refuse_sweep(folder)
    table = concepts_per_latent(str(folder), Store())
    write = {"csv": write_csv, "parquet": write_parquet}
    for kind, path in paths.items():
        if path is None:
            continue
        try:
            write[kind](table, path)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}", "name another file") from None
        said.append(f"wrote {path}: {len(table):,} rows, {len(table.column_names)} columns")
    tables = [str(path) for path in paths.values() if path is not None]
    return {"rows": len(table), "columns": table.column_names, "tables": tables}


def _model(run: str, folder: Path, said: list[str]) -> dict[str, Any]:
    from plmsae_cli.runtime.hub import export_run as export_model

    files = export_model(_run_or_name(run), folder)
    said.append(f"wrote {folder}: {', '.join(files)}")
    return {"folder": str(folder), "files": files}


def _dictionary(run: str, folder: Path, said: list[str]) -> dict[str, Any]:
    from plmsae_cli.runtime.dictionaries import write_saelens
    from plmsae_cli.runtime.saved import load_sae_with_facts

    files = write_saelens(load_sae_with_facts(_run_or_name(run)), folder)
    said.append(f"wrote {folder}: {', '.join(files)}")
    return {"saelens_folder": str(folder), "saelens_files": files}


def _run_or_name(run: str) -> str:
    """A folder under runs/ by its name alone; anything else, such as published weights or `s3://`, as it was named."""
    from plmsae_cli.runtime.run_folder import refuse_sweep

    named = Path("runs") / run
    found = str(named) if named.exists() and not Path(run).exists() else run
    refuse_sweep(Path(found))
    return found


def _push(folder: Path, name: str, said: list[str]) -> str:
    from plmsae_cli.runtime.hub import push

    address = push(folder, name)
    said.append(f"pushed to {address}")
    return address
