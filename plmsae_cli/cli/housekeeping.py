"""`verify` and `clean`: is it still what was written, and what may go."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from plmsae_cli.cli.exits import DONE, FAILED, checked
from plmsae_cli.cli.show import print_json, size, table
from plmsae_cli.config.files import is_experiment

if TYPE_CHECKING:
    from plmsae_cli.store.fs import Store
    from plmsae_cli.store.housekeeping import Leaving


def verify_targets(targets: list[str], as_json: bool) -> int:
    """Read every file of the named artifacts again; 1 if any is not what was recorded."""

    def work() -> int:
        from plmsae_cli.store.housekeeping import damages

        bodies, damaged = [], 0
        for store, folder in (found for target in targets for found in _folders(target)):
            found = damages(store, folder)
            damaged += len(found)
            bodies.append(
                {
                    "folder": folder,
                    "damaged": [
                        {"path": d.path, "problem": d.problem, "task": d.task, "remedy": d.remedy} for d in found
                    ],
                }
            )
            if not as_json:
                print(f"{folder}: {'sound' if not found else f'{len(found)} file(s) damaged'}")
                for one in found:
                    print(f"  {one.path}: {one.problem}\n    {one.remedy}")
        if as_json:
            print_json(verified=bodies)
        return FAILED if damaged else DONE

    return checked(work)


def _folders(target: str) -> Iterator[tuple[Store, str]]:
    """The artifacts and runs that a target names: an experiment's, a folder itself, or all below it."""
    from plmsae_cli.config.errors import UserError
    from plmsae_cli.store.fs import Store, is_remote, join
    from plmsae_cli.store.manifest import MANIFEST

    if is_experiment(target):
        yield from _of_experiment(Path(target))
        return
    store = Store()
    named = Path("runs") / target
    target = str(named) if named.is_dir() and not Path(target).exists() else target
    if store.exists(join(target, MANIFEST)):
        yield store, target.rstrip("/")
        return
    if is_remote(target):
        raise UserError(f"{target} is not a finished artifact: it has no {MANIFEST}", "name its folder, or a YAML")
    if not Path(target).is_dir():
        raise UserError(
            f"{target} is not a folder", "name an artifact's folder, a root of runs, or an experiment's YAML"
        )
    walked = [(folder, {*folders, *files}) for folder, folders, files in os.walk(Path(target))]
    found = [folder for folder, names in walked if names & {MANIFEST, "parts", "status.json"}]
    if not found:
        raise UserError(f"{target} holds nothing that plmsae wrote", "`plmsae ls` lists what there is")
    yield from ((store, folder) for folder in sorted(found))


def _of_experiment(path: Path) -> Iterator[tuple[Store, str]]:
    """Its data and its run, of a sweep each trial's as well."""
    from plmsae_cli.cli.stage import load_for
    from plmsae_cli.config.errors import UserError
    from plmsae_cli.runtime.run_folder import read_pointers
    from plmsae_cli.store.fs import Store
    from plmsae_cli.store.lineage import Lineage
    from plmsae_cli.store.manifest import read_manifest

    experiment = load_for(path, None, False).experiment
    store = Store(experiment.storage)
    lineage = Lineage(experiment, store)
    stages = [s for s in ("embed", "shuffle", "optimize") if getattr(experiment, s) is not None]
    layers = experiment.embed.layers if experiment.embed is not None else []
    folders = [getattr(lineage, stage)(layer).folder for layer in layers for stage in stages]
    if experiment.train is not None and experiment.train.kind == "plm":
        folders.append(lineage.tokens().folder)
    if experiment.train is not None and experiment.train.data is not None:
        folders.append(experiment.train.data.rstrip("/"))
    run = Path(lineage.run_folder())
    runs = [each for each in (run, *sorted(run.glob("trials/*"))) if (each / "status.json").is_file()]
    folders += [pointer["folder"] for each in runs for pointer in read_pointers(each).values()]
    there = [folder for folder in dict.fromkeys(folders) if read_manifest(store, folder) is not None]
    there += map(str, runs)
    if not there:
        raise UserError(f"nothing of {path} exists yet", f"`plmsae run {path}` makes it")
    yield from ((store, folder) for folder in there)


def clean_root(target: str, yes: bool, older_hours: float, unused: bool, as_json: bool) -> int:
    """List what may go below a folder, in a bucket or not, or an experiment's `data_root`; with `yes` delete it."""

    def work() -> int:
        from plmsae_cli.store.housekeeping import remove

        store, root, tb_day = _cleaned(target)
        found, note = _leavings(store, root, older_hours * 3600, unused)
        for one in list(found) if yes else ():
            if one.whole and os.path.basename(one.path) in (_used(Path(root)) or ()):
                print(f"kept {one.path}: a run has begun to use it", file=sys.stderr)
                found.remove(one)
            else:
                remove(one, store)
        total = sum(one.bytes for one in found)
        if as_json:
            listed = [{"path": one.path, "bytes": one.bytes, "why": one.why} for one in found]
            print_json(deleted=yes, bytes=total, found=listed, **({"note": note} if note else {}))
        elif found:
            print(table([[one.path, size(one.bytes), one.why] for one in found], ["path", "size", "why"]))
        said = f"{len(found)} thing(s), {size(total)}" + (f", ${total / 1e12 * tb_day:,.2f} a day" if tb_day else "")
        print(
            f"deleted {said}" if yes else f"{said}; nothing was deleted (--yes deletes what is listed)", file=sys.stderr
        )
        if note:
            print(note, file=sys.stderr)
        return DONE

    return checked(work)


def _cleaned(target: str) -> tuple[Store, str, float | None]:
    """Where to look, how to reach it, and what 10^12 bytes cost a day, if somebody says so."""
    from plmsae_cli.cli.stage import load_for
    from plmsae_cli.store.fs import Store

    if not is_experiment(target):
        return Store(), target, None
    experiment = load_for(Path(target), None, False).experiment
    return Store(experiment.storage), experiment.data_folder(), experiment.price.tb_day


def _leavings(store: Store, root: str, older: float, unused: bool) -> tuple[list[Leaving], str]:
    """What may go, and a line on what could not be looked for."""
    from plmsae_cli.config.errors import UserError
    from plmsae_cli.store.fs import StoreError, is_remote
    from plmsae_cli.store.housekeeping import bucket_leavings, leavings, upload_leavings

    if is_remote(root):
        if unused:
            raise UserError(
                f"--unused is not for {root}: which runs, of any machine, use a bucket's data is not known",
                "leave it out; delete what you know to be of no use with your provider's tools",
            )
        found = list(bucket_leavings(store, root, older))
        try:
            return [*found, *upload_leavings(store, root, older)], ""
        except StoreError as error:
            return found, f"{error.message}: {error.hint}"
    if not Path(root).is_dir():
        raise UserError(f"{root} is not a folder", "name the root of your runs, a folder in a bucket, or a YAML")
    used = _used(Path(root))
    if unused and used is None:
        raise UserError(
            f"{root} holds no runs, so nothing says which data are used",
            "name a folder that holds the runs as well as the data",
        )
    return list(leavings(Path(root), used or (), older, unused)), ""


def _used(root: Path) -> set[str] | None:
    """Names of the data folders that runs under `root` point to; None where there is no run.

    Pointers are relative to where a run was started, which need not be here: the name, which holds the key, is what counts.
    """
    from plmsae_cli.runtime.run_folder import pointing_runs

    used: set[str] | None = None
    for _, pointers in pointing_runs(root):
        used = (used or set()) | {os.path.basename(pointer["folder"].rstrip("/")) for pointer in pointers.values()}
    return used
