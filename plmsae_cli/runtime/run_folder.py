"""The folder of one run: what was asked, with what, where the data is, how far it got."""

from __future__ import annotations

import difflib
import errno
import io
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.files import is_experiment
from plmsae_cli.runtime.environment import environment, uncommitted
from plmsae_cli.runtime.processes import me
from plmsae_cli.store.housekeeping import DATA_FOLDER

_STALE_READS = 5
BEAT_S = 60.0
"""Seconds between two signs of life in status.json."""
_writing = threading.RLock()
"""Held by a thread more than once: a second Ctrl-C writes a last status from within whatever it meets."""


def write_text(path: Path, text: str) -> None:
    """Replace a small local file atomically. Raises OSError that names it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Machines that share a folder may have processes of one number, containers most of all.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: Path, body: Any) -> None:
    write_text(path, json.dumps(body, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's JSON object, or None where there is no file. UserError where it holds none."""
    try:
        body = json.loads(_read(path))
        if not isinstance(body, dict):
            raise ValueError("it holds no JSON object")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: {error}", "move it aside; the same `plmsae run` then writes it anew"
        ) from error
    return body


def _read(path: Path) -> str:
    """The text of a file that another machine may replace meanwhile: of the one that was opened NFS has no bytes then."""
    for _ in range(_STALE_READS):
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return path.read_text(encoding="utf-8")


def read_yaml(path: Path) -> Any:
    """A YAML that this package wrote, or None where there is no file. UserError where it is not YAML."""
    try:
        return YAML(typ="safe").load(path)
    except FileNotFoundError:
        return None
    except YAMLError as error:
        raise UserError(
            f"{path} is damaged: {error}", "move it aside; the same `plmsae run` then writes it anew"
        ) from error


def files_named(root: Path, name: str) -> list[Path]:
    """Files of a name below a root, in order. Unlike `rglob` it passes over folders that vanish meanwhile."""
    return sorted(Path(parent, name) for parent, _, names in os.walk(root) if name in names)


def pointing_runs(root: Path) -> Iterator[tuple[Path, dict[str, dict[str, Any]]]]:
    """Runs under `root` that use data, with what they point to: name -> `folder`, `key` and `rows`.

    Raises:
        UserError: the pointers of a run are damaged.
    """
    seen: set[str] = set()
    for parent, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else [name for name in folders if not DATA_FOLDER.fullmatch(name)]
        seen.add(real)
        if "artifacts.json" not in names:
            continue
        yield Path(parent), read_pointers(Path(parent))


def read_pointers(run: Path) -> dict[str, dict[str, Any]]:
    """What a run points to (artifacts.json), nothing where it has not come so far. Raises UserError where it is damaged."""
    path = run / "artifacts.json"
    try:
        pointers: dict[str, dict[str, Any]] = json.loads(_read(path)) or {}
        for pointer in pointers.values():
            os.path.basename(pointer["folder"])
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged, so it does not say which data its run uses ({error})",
            "move it aside and start its experiment again, which writes it anew, or move the run elsewhere",
        ) from error
    return pointers


class RunDiffers(UserError):
    """The experiment is not the one that the run of this name was started with."""


class RunFolder:
    """`<root>/<name>`. Local, because logs append and locks lock."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.identity = self.path / "identity.json"
        self.report = self.path / "report" / "index.html"
        self.stop_file = self.path / "STOP"
        self.log = self.path / "logs" / "run.log"

    def begin(self, experiment: Experiment, text: str | None) -> None:
        """Record what was asked and with what; called at every start, so the newest environment is the one shown."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.stop_file.unlink(missing_ok=True)
        if text is not None:
            write_text(self.path / "experiment.yaml", text)
        yaml = YAML()
        resolved = io.StringIO()
        yaml.dump(experiment.dump(), resolved)
        write_text(self.path / "resolved.yaml", resolved.getvalue())
        write_json(self.path / "environment.json", environment())
        if changes := uncommitted():
            write_text(self.path / "uncommitted.diff", changes)
        else:
            (self.path / "uncommitted.diff").unlink(missing_ok=True)

    def point(self, artifacts: Mapping[str, Mapping[str, Any]]) -> None:
        """Add pointers to data folders (artifacts.json)."""
        write_json(self.path / "artifacts.json", {**read_pointers(self.path), **artifacts})

    def status(self, **changes: Any) -> None:
        """Merge into status.json; `stage_seconds` are added to those of earlier starts, by stage."""
        path = self.path / "status.json"
        with _writing:
            body = read_json(path) or {"schema": 1, "state": "new", "stage_seconds": {}}
            spent = body.setdefault("stage_seconds", {})
            for stage, seconds in changes.pop("stage_seconds", {}).items():
                spent[stage] = round(spent.get(stage, 0.0) + seconds, 2)
            if "state" in changes:
                body.pop("waiting", None)  # a start that was killed may have left it
            body.update(changes, updated=time.time(), **me())
            write_json(path, body)

    def beat(self) -> None:
        """A sign of life in status.json, while it says that the run is running."""
        path = self.path / "status.json"
        with _writing:
            body = read_json(path) or {}
            if body.get("state") == "running":
                write_json(path, {**body, "updated": time.time()})

    def claim_identity(self, identity: Mapping[str, Any]) -> None:
        """Continue the run of this name, or refuse when its science differs.

        One that differs by a later end alone (`train.plm.max_hours`, the loss of `train.plm.speedrun`) goes on to that end,
        a finished one too: no step depends on where the last one will be.

        Raises:
            RunDiffers: lists each field that differs, old and new.
        """
        known = read_json(self.identity)
        if known is None:
            write_json(self.identity, identity)
            return
        changes = differences(known, json.loads(json.dumps(identity)))
        if changes and all(_ends_later(*change) for change in changes):
            # The record first: without it the training goes on from its newest checkpoint, under either identity.
            (self.path / "parts" / "train.json").unlink(missing_ok=True)
            write_json(self.identity, identity)
        elif changes:
            lines = "\n".join(f"  {where}: {old!r} -> {new!r}" for where, old, new in changes)
            raise RunDiffers(
                f"{self.path} holds a run that differs in:\n{lines}",
                "give the experiment another name, or pass --restart to archive the old run",
            )

    def claimed(self, identity: Mapping[str, Any]) -> bool:
        """Whether the run is known to be this one."""
        return bool(read_json(self.identity) == json.loads(json.dumps(identity)))

    def archive(self) -> Path | None:
        """Move the run aside (`--restart` never deletes)."""
        if not self.path.exists():
            return None
        stamp = time.strftime("%Y%m%d-%H%M%S")
        target = self.path.with_name(f"{self.path.name}.archived-{stamp}")
        number = 1
        while target.exists():
            number += 1
            target = self.path.with_name(f"{self.path.name}.archived-{stamp}-{number}")
        os.replace(self.path, target)
        return target


@contextmanager
def beating(runs: Sequence[RunFolder]) -> Iterator[None]:
    """Within, runs give a sign of life every minute, for those who look on from another machine."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_S):
            for run in runs:
                with suppress(OSError, UserError):  # a full disk ends a run where it matters
                    run.beat()

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join()


def find_run(run: Path, holds: str = "status.json") -> Path:
    """The folder of a run named by its path, or by its name under `runs/`. Raises UserError where none `holds` the file."""
    for folder in (run, Path("runs") / run):
        if (folder / holds).is_file():
            return folder
    raise _no_run(run, holds)


def refuse_sweep(folder: Path) -> None:
    """Raises UserError for the folder of a sweep, where one run is wanted."""
    if (folder / "sweep.json").is_file():
        hint = f"name one, such as {folder}/trials/HASH; `plmsae status {folder}` says which is best"
        raise UserError(f"{folder} is a sweep: its trials are runs", hint)


def _no_run(named: Path, lacks: str) -> UserError:
    """The error of a name that no run has, with what may be meant."""
    begun = [*Path("runs").glob("*/status.json"), *Path("runs").glob("*/*/status.json")]
    names = sorted(path.parent.relative_to("runs").as_posix() for path in begun)
    if is_experiment(named):
        hint = f"name the run and not its YAML: {named.stem}, unless it has a name of its own"
    elif close := difflib.get_close_matches(str(named), names, 3, 0.5):
        hint = f"did you mean {' or '.join(close)}?"
    else:
        hint = (
            "`plmsae ls` lists the runs"
            if names
            else "no run has begun in runs/ yet; one elsewhere is named by its folder"
        )
    return UserError(f"{named} is not a run (no {lacks})", hint)


def _ends_later(where: str, old: Any, new: Any) -> bool:
    """Whether a difference of two identities is an end that is further off, or none any more."""
    if where == "train.plm.max_hours":
        return old is not None and (new is None or new > old)
    if where == "train.plm.speedrun.target_loss":
        return bool(new < old)
    return where == "train.plm.speedrun" and new is None


def differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """Leaves at which two JSON values differ, as (dotted path, old, new)."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        return found
    return [] if old == new else [(where, old, new)]
