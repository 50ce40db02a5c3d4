"""`init` and `validate`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from plmsae_cli.cli.exits import DONE, exit_code

if TYPE_CHECKING:
    from plmsae_cli.config.yaml import Loaded


def write_template(path: Path, kind: str, full: bool) -> int:
    """Write a commented template; never over an existing file."""

    def work() -> int:
        from plmsae_cli.config.errors import UserError
        from plmsae_cli.config.templates import full_template, template

        text = full_template() if full else template(kind)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise UserError(f"{path} exists already", "name another file; init never overwrites") from None
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}", "name a file in a folder that exists") from None
        print(f"wrote {path}; next: edit it, then `plmsae validate {path}` and `plmsae run {path}`", file=sys.stderr)
        return DONE

    return exit_code(work)


def validate_files(targets: list[Path], sets: Sequence[str] | None, bugfix: bool, as_json: bool) -> int:
    """Check files, their inputs and what they will need, without running anything."""
    from plmsae_cli.cli.run import validate

    loaded: dict[Path, Loaded] = {}

    def work() -> int:
        from plmsae_cli.executors.queue import find

        paths = find(targets)
        code = validate(paths, sets, bugfix, loaded)
        for path in paths:
            if path in loaded:
                code = max(code, exit_code(lambda path=path: _deep(path, loaded[path], as_json)))  # type: ignore[misc]
        return code

    return exit_code(work)


def _deep(path: Path, loaded: Loaded, as_json: bool) -> int:
    """Plan every stage: reads FASTA, weights and manifests, so it finds what only they can tell."""
    from plmsae_cli.cli.show import size
    from plmsae_cli.config.errors import UserError
    from plmsae_cli.executors.pipeline import plan_stage
    from plmsae_cli.stages.sweep import trials
    from plmsae_cli.store.fs import Store, is_remote

    experiment = loaded.experiment
    store = Store(experiment.storage)
    chosen = trials(experiment) if experiment.sweep is not None else []
    plans = [plan_stage(s, experiment, store) for s in experiment.stages() if s in ("embed", "shuffle", "optimize", "train")]
    plans += [plan_stage("train", trial.experiment, store) for trial in chosen]
    wanted = sum(a.bytes for p in plans for a in p.artifacts.values() if not a.done)
    place = Path(experiment.data_folder())
    if is_remote(experiment.data_folder()):
        store.probe(experiment.data_folder())
    else:
        existing = next(p for p in (place, *place.resolve().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if wanted > free:
            raise UserError(
                f"{path}: the data will take {size(wanted)}, {existing} has {size(free)} free",
                "point data_root at a larger disk or a bucket",
            )
    tasks = sum(len(p.tasks) for p in plans)
    if as_json:
        print(json.dumps({"schema": 1, "path": str(path), "valid": True, "tasks": tasks, "bytes": wanted}))
    else:
        print(f"{path}: valid; {tasks} task(s) to do, {size(wanted)} of data to write")
    return DONE
