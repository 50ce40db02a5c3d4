"""`plmsae report`: a page of all runs under a root, or anew the page of one."""

from __future__ import annotations

import json
from pathlib import Path

from plmsae_cli.cli.exits import DONE, checked
from plmsae_cli.cli.stage import SCHEMA_VERSION


def report_root(root: Path, as_json: bool) -> int:
    """Write the page and say where it is."""

    def work() -> int:
        from plmsae_cli.config.errors import UserError
        from plmsae_cli.report import build_report, build_sweep_report
        from plmsae_cli.report.index import Found, write_index
        from plmsae_cli.runtime.processes import live_state
        from plmsae_cli.runtime.results import headline
        from plmsae_cli.runtime.run_folder import read_json

        one = next((each for each in (root, Path("runs") / root) if (each / "resolved.yaml").is_file()), None)
        if one is not None:
            page = build_sweep_report(one) if (one / "sweep.json").is_file() else build_report(one)
            found = [str(one)]
        elif not root.is_dir():
            raise UserError(f"{root} is not a folder", "name the root of your runs: `plmsae report my-root`")
        else:
            folders = [path.parent for path in sorted(root.rglob("status.json")) if "logs" not in path.parts]
            if not folders:
                raise UserError(f"no runs in {root} yet", "`plmsae run experiments/` makes some")
            runs = [
                Found(
                    each, str(each.relative_to(root)), live_state(read_json(each / "status.json") or {}), headline(each)
                )
                for each in folders
            ]
            page, found = write_index(root, runs), [str(each) for each in folders]
        if as_json:
            print(json.dumps({"schema": SCHEMA_VERSION, "report": str(page), "runs": found}))
        else:
            print(f"report: {page}")
        return DONE

    return checked(work)
