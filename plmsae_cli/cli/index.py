"""`plmsae report`: a page of all runs under a root, or anew the page of one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from plmsae_cli.cli.exits import DONE, checked, complain
from plmsae_cli.cli.listing import DAMAGED, require_root, run_folders
from plmsae_cli.cli.show import print_json

if TYPE_CHECKING:
    from plmsae_cli.report.index import Found


def report_root(root: Path, as_json: bool) -> int:
    """Write the page and say where it is."""

    def work() -> int:
        from plmsae_cli.config.errors import UserError
        from plmsae_cli.report import build_report, build_sweep_report
        from plmsae_cli.report.index import write_index

        one = next((each for each in (root, Path("runs") / root) if (each / "resolved.yaml").is_file()), None)
        if one is not None:
            page = build_sweep_report(one) if (one / "sweep.json").is_file() else build_report(one)
            found = [str(one)]
        else:
            require_root(root, "report")
            folders = run_folders(root)
            if not folders:
                raise UserError(f"no runs in {root} yet", "`plmsae run experiments/` makes some")
            runs = [_found(each, root) for each in folders]
            page, found = write_index(root, runs), [str(each) for each in folders]
        if as_json:
            print_json(report=str(page), runs=found)
        else:
            print(f"report: {page}")
        return DONE

    return checked(work)


def _found(folder: Path, root: Path) -> Found:
    """A run for the index. One with a damaged file is told of, and hides no other."""
    from plmsae_cli.config.errors import UserError
    from plmsae_cli.report.index import Found
    from plmsae_cli.runtime.processes import live_state
    from plmsae_cli.runtime.results import headline
    from plmsae_cli.runtime.run_folder import read_json

    name = str(folder.relative_to(root))
    try:
        return Found(folder, name, live_state(read_json(folder / "status.json") or {}), headline(folder))
    except UserError as error:
        complain(error.message, error.hint)
        return Found(folder, name, DAMAGED, {})
