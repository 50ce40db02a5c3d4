"""`plmsae eval a.yaml b.yaml --compare`: finished evaluations side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from plmsae_cli.cli.exits import DONE, checked
from plmsae_cli.cli.stage import SCHEMA_VERSION, load_for

if TYPE_CHECKING:
    from plmsae_cli.report.compare import Side


def compare_files(paths: Sequence[Path], sets: Sequence[str] | None, as_json: bool) -> int:
    """One table of all SAEs of the experiments; nothing is computed anew."""

    def work() -> int:
        from plmsae_cli.cli.show import table
        from plmsae_cli.config.base import digest
        from plmsae_cli.report.compare import compare, shown, write_comparison
        from plmsae_cli.report.reading import read_run

        sides = [side for path in paths for side in _sides(path, sets)]
        columns, rows = compare(sides)
        marks = sorted(str(side.run) for side in sides)
        folder = sides[0].run.parent / f"compare-{digest(marks)[:8]}"
        found, page = write_comparison(folder, columns, rows, any(read_run(side.run).demo for side in sides))
        if as_json:
            body = {"columns": columns, "rows": rows, "csv": str(found), "report": str(page)}
            print(json.dumps({"schema": SCHEMA_VERSION, **body}))
        else:
            print(table(shown(rows), columns))
            print(f"\ncsv: {found}\nreport: {page}")
        return DONE

    return checked(work)


def _sides(path: Path, sets: Sequence[str] | None) -> list[Side]:
    from plmsae_cli.report.compare import Side
    from plmsae_cli.stages.sweep import trials

    experiment = load_for(path, sets, bugfix=False).experiment
    run = Path(experiment.root) / str(experiment.name)
    if not experiment.swept:
        return [Side(str(experiment.name), str(path), run)]
    each = [trial.experiment for trial in trials(experiment)]
    return [Side(str(one.name), str(path), Path(one.root) / str(one.name)) for one in each]
