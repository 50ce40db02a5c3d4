"""`init` and `validate`."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plmsae_cli.cli.deep import deep_checks
from plmsae_cli.cli.exits import DONE, USAGE, checked, complain
from plmsae_cli.cli.show import bytes_to_make, print_json, size
from plmsae_cli.cli.stage import preflight

if TYPE_CHECKING:
    from plmsae_cli.config.experiment import Experiment
    from plmsae_cli.config.yaml import Loaded
    from plmsae_cli.runtime.task import Plan


def write_template(path: Path, kind: str, full: bool) -> int:
    """Write a commented template; never over an existing file."""

    def work() -> int:
        from plmsae_cli.config.templates import full_template, template

        _write_new(path, full_template() if full else template(kind))
        return DONE

    return checked(work)


def write_converted(path: Path, source: Path) -> int:
    """Write the experiment that another tool's settings describe, and say what of them has no counterpart."""

    def work() -> int:
        from plmsae_cli.config.conversion import convert_file

        text, notes = convert_file(source)
        _write_new(path, text)
        for note in notes:
            print(f"  {note}", file=sys.stderr)
        return DONE

    return checked(work)


def _write_new(path: Path, text: str) -> None:
    from plmsae_cli.config.errors import UserError

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} exists already", "name another file; init never overwrites") from None
    except OSError as error:
        hint = "name a file in a folder that exists"
        raise UserError(f"{path} cannot be written: {error.strerror}", hint) from None
    name = shlex.quote(str(path))
    print(f"wrote {path}; next: edit it, then `plmsae validate {name}` and `plmsae run {name}`", file=sys.stderr)


def validate_files(
    targets: list[Path], sets: Sequence[str] | None, bugfix: bool, as_json: bool, deep: bool = False
) -> int:
    """Check files, their inputs and what they will need, without running anything; `deep` asks the outside too."""
    from plmsae_cli.cli.run import read_all

    loaded: dict[Path, Loaded] = {}
    found: dict[Path, dict[str, Any]] = {}

    def work() -> int:
        from plmsae_cli.executors.queue import find

        paths = find(targets)
        code = read_all(paths, sets, bugfix, loaded)
        for path in paths:
            if path in loaded:
                code = max(code, checked(lambda path=path: check(path), str(path)))  # type: ignore[misc]
        if as_json:
            bodies = [{"path": str(path), "valid": path in found, **found.get(path, {})} for path in paths]
            print_json(experiments=bodies)
        return code

    def check(path: Path) -> int:
        needs, plans = _needs(loaded[path].experiment)
        checks = deep_checks(loaded[path].experiment, plans) if deep else []
        if not as_json:
            print(f"{path}: valid; {needs['tasks']} task(s) to do, {size(needs['bytes'])} of data to write")
            for each in checks:
                print(f"  {each.state:4}  {each.name}: {each.text}")
        failed = [each for each in checks if each.state == "fail"]
        for each in failed:
            complain(f"{path}: {each.name}: {each.text}", each.remedy)
        found[path] = {**needs, **({"checks": [asdict(each) for each in checks]} if deep else {})}
        return USAGE if failed else DONE

    return checked(work)


def _needs(experiment: Experiment) -> tuple[dict[str, Any], list[Plan]]:
    """Plan every stage: reads FASTA, weights and manifests, so it finds what only they can tell."""
    from plmsae_cli.config.errors import UserError
    from plmsae_cli.runtime.checks import nearest
    from plmsae_cli.store.fs import is_remote

    plans = preflight(experiment, experiment.stages(), fetch=False)
    wanted = bytes_to_make(plans)
    place = experiment.data_folder()
    if not is_remote(place):
        existing = nearest(Path(place))
        free = shutil.disk_usage(existing).free
        if wanted > free:
            raise UserError(
                f"the data will take {size(wanted)}, {existing} has {size(free)} free",
                "point data_root at a larger disk or a bucket",
            )
    return {"tasks": sum(len(p.tasks) for p in plans), "bytes": wanted}, plans
