"""`plmsae compare A B`, and `plmsae eval a.yaml b.yaml --compare`: finished runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plmsae_cli.cli.exits import DONE, checked
from plmsae_cli.cli.show import print_json, table
from plmsae_cli.cli.stage import load_for

if TYPE_CHECKING:
    from plmsae_cli.report.compare import Comparison, Side


def compare_files(paths: Sequence[Path], sets: Sequence[str] | None, as_json: bool) -> int:
    """One table of all SAEs of the experiments; nothing is computed anew."""

    def work() -> int:
        from plmsae_cli.report.compare import shown, want_evaluations

        sides = [side for path in paths for side in _sides(path, sets)]
        want_evaluations(sides)
        found = _write(sides)
        if as_json:
            _print_json(found)
        else:
            print(table(shown(found.rows), found.columns))
            print(f"\ncsv: {found.csv}\nreport: {found.page}")
        return DONE

    return checked(work)


def compare_runs(targets: Sequence[Path], as_json: bool) -> int:
    """Settings, curves and figures of runs, which need not be finished."""

    def work() -> int:
        from plmsae_cli.config.errors import UserError

        sides = [side for target in targets for side in _named(target)]
        if len(sides) < 2:
            raise UserError("one run cannot be compared", "name two or more: folders, names under runs/, or YAMLs")
        found = _write(sides)
        if as_json:
            _print_json(found)
        else:
            _print(found)
        return DONE

    return checked(work)


def _write(sides: Sequence[Side]) -> Comparison:
    from plmsae_cli.config.base import digest
    from plmsae_cli.report.compare import write_comparison

    marks = sorted(str(side.run) for side in sides)
    return write_comparison(sides[0].run.parent / f"compare-{digest(marks)[:8]}", sides)


def _print_json(found: Comparison) -> None:
    levels = {
        by: {key: {"at": at, "values": rows} for key, (at, rows) in each.items()} for by, each in found.levels.items()
    }
    print_json(
        columns=found.columns,
        rows=found.rows,
        differences=[each._asdict() for each in found.differences],
        curves=levels,
        csv=str(found.csv),
        report=str(found.page),
    )


def _print(found: Comparison) -> None:
    from plmsae_cli.config.tree import plain
    from plmsae_cli.report.compare import shown
    from plmsae_cli.report.words import magnitude, number, seconds

    names = found.columns[2:]
    for science, title in ((True, "settings that change results"), (False, "other settings")):
        rows = [[each.field, *map(plain, each.values)] for each in found.differences if each.science == science]
        print(table(rows, [title, *names]) if rows else f"{title}: the same")
        print()
    for by, words in (("tokens", magnitude), ("seconds", seconds)):
        for key in ("fvu", "loss"):
            at, levels = found.levels[by][key]  # type: ignore[index]
            if any(value is not None for row in levels for value in row) and (key == "fvu" or not _has_fvu(found)):
                cells = [
                    [words(stop), *("" if value is None else number(value) for value in row)]
                    for stop, row in zip(at, levels, strict=True)
                ]
                print(table(cells, [f"{key} at {'tokens' if by == 'tokens' else 'time'}", *names]))
                print()
    print(table(shown(found.rows), found.columns))
    print(f"\ncsv: {found.csv}\nreport: {found.page}")


def _has_fvu(found: Comparison) -> bool:
    return any(value is not None for row in found.levels["tokens"]["fvu"][1] for value in row)


def _named(target: Path) -> list[Side]:
    """The runs of a folder, of a name under runs/, or of a YAML; the trials of a sweep one by one."""
    from plmsae_cli.config.files import is_experiment
    from plmsae_cli.report.compare import Side
    from plmsae_cli.runtime.run_folder import find_run, read_json

    if is_experiment(target):
        return _sides(target, None)
    folder = find_run(target, "resolved.yaml")
    sweep: dict[str, Any] | None = read_json(folder / "sweep.json")
    if sweep is None:
        return [Side(folder.name, str(target), folder)]
    trials = [folder / "trials" / each["hash"] for each in sweep["trials"]]
    return [Side(each.name, str(target), each) for each in trials if (each / "metrics.jsonl").is_file()]


def _sides(path: Path, sets: Sequence[str] | None) -> list[Side]:
    from plmsae_cli.report.compare import Side
    from plmsae_cli.stages.sweep import trials

    experiment = load_for(path, sets, bugfix=False).experiment
    run = Path(experiment.root) / str(experiment.name)
    if not experiment.swept:
        return [Side(str(experiment.name), str(path), run)]
    each = [trial.experiment for trial in trials(experiment)]
    return [Side(str(one.name), str(path), Path(one.root) / str(one.name)) for one in each]
