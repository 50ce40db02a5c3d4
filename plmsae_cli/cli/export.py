"""`export`: a trained language model in another form."""

from __future__ import annotations

import json
from pathlib import Path

from plmsae_cli.cli.exits import DONE, checked


def export_model(run: str, folder: Path, name: str | None, as_json: bool) -> int:
    """Write the Hugging Face folder, and upload it where a name is given."""

    def work() -> int:
        from plmsae_cli.runtime.hub import export_run, push

        files = export_run(run, folder)
        if not as_json:
            print(f"wrote {folder}: {', '.join(files)}")
        address = None if name is None else push(folder, name)
        if as_json:
            print(json.dumps({"schema": 1, "folder": str(folder), "files": files, "pushed": address}))
        elif address is not None:
            print(f"pushed to {address}")
        return DONE

    return checked(work)
