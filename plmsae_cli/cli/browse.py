"""`plmsae browse`: pages of a run's latents, built and served."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from plmsae_cli.cli.exits import DONE, checked


def browse_runs(
    runs: Sequence[Path], build: Path | None, structures: Sequence[str], host: str, port: int, quiet: bool
) -> int:
    """Build the site of one or two runs where it is absent or out of date; serve it unless a folder was named."""

    def work() -> int:
        from filelock import FileLock

        from plmsae_cli.browse.server import Server, sequence_reader
        from plmsae_cli.browse.site import build_site, is_current
        from plmsae_cli.config.errors import UserError
        from plmsae_cli.runtime.run_folder import find_run, refuse_sweep

        found = [find_run(run, "resolved.yaml") for run in runs]
        for each in found:
            refuse_sweep(each)
        if len(found) > 2 or len(set(found)) < len(found):
            raise UserError("one run is shown, or two different ones side by side", "name one or two run folders")
        if build is not None:
            print(build_site(found, build, structures))
            return DONE
        folder = found[0] / "browse" / "-".join(["pages", *(run.name for run in found[1:])])
        # The port comes first: whoever has it may be showing these very pages.
        with Server(folder, host, port, sequence_reader(found)) as server:
            if not is_current(folder, found, structures):
                folder.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(folder.with_name(f".{folder.name}.lock")):  # another may build them, for another port
                    if not is_current(folder, found, structures):
                        print(f"building {folder}", file=sys.stderr)
                        build_site(found, folder, structures)
            print(server.address, flush=True)
            print("Ctrl-C ends it", file=sys.stderr)
            if not quiet:
                webbrowser.open(server.address)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print(file=sys.stderr)
        return DONE

    return checked(work)
