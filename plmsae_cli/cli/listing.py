"""`ls`: what there is, runs and data."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from plmsae_cli.cli.exits import DONE, checked, complain
from plmsae_cli.cli.show import dollars, print_json, size, table

_SHOWN = {"fvu": "fvu", "l0_mean": "l0", "dead_share": "dead", "recovered_zero": None, "loss": "loss"}
"""Figures of an evaluation, and what training calls them."""
_USERS = 4
DAMAGED = "damaged"
"""State of a run that has a file nobody can read."""


def list_root(root: Path, as_json: bool) -> int:
    """Runs under a root (trials of sweeps included) and data folders, with who uses which."""

    def work() -> int:
        from plmsae_cli.runtime.run_folder import files_named
        from plmsae_cli.store.housekeeping import FREED
        from plmsae_cli.store.manifest import MANIFEST

        require_root(root, "ls")
        if (root / MANIFEST).is_file():
            return show_data(root, as_json)
        runs = [_run(folder, root) for folder in run_folders(root)]
        users: dict[str, list[str]] = {}
        for found in runs:
            for pointer in found["artifacts"].values():
                users.setdefault(os.path.basename(pointer["folder"].rstrip("/")), []).append(found["name"])
        finished = {path.parent: path for name in (FREED, MANIFEST) for path in files_named(root, name)}
        data = [sound for _, path in sorted(finished.items()) if (sound := _sound(path, users))]
        if as_json:
            print_json(runs=runs, data=data)
            return DONE
        if not runs and not data:
            print(f"no runs in {root} yet; `plmsae run experiments/` makes some")
            return DONE
        rows = [[r["name"], r["words"], *(_figure(r, name) for name in _SHOWN), dollars(r["usd"])] for r in runs]
        columns = ["run", "state", "FVU", "L0", "dead", "loss recovered", "loss", "cost"]
        optional = ("loss", "cost")  # empty where no language model was trained, no price was set
        kept = [i for i, name in enumerate(columns) if name not in optional or any(row[i] != "-" for row in rows)]
        print(table([[row[i] for i in kept] for row in rows], [columns[i] for i in kept]))
        if any("(" in cell for row in rows for cell in row[2:]):
            print("in brackets: the last step of training, where there is no evaluation")
        if data:
            print()
            cells = [
                [
                    d["folder"],
                    f"{d['rows']:,}",
                    "freed" if "freed" in d else size(d["bytes"]),
                    d["dtype"],
                    _users(d["used_by"]),
                ]
                for d in data
            ]
            print(table(cells, ["data", "rows", "size", "type", "used by"]))
        return DONE

    return checked(work)


def require_root(root: Path, verb: str) -> None:
    """Raises UserError where the root that a verb was given is no folder."""
    from plmsae_cli.config.errors import UserError

    if not root.is_dir():
        raise UserError(
            f"{root} is not a folder", f"`plmsae run` makes runs/; another root is named: `plmsae {verb} my-root`"
        )


def run_folders(root: Path) -> list[Path]:
    """Runs under a root, trials of sweeps included."""
    from plmsae_cli.runtime.run_folder import files_named

    return [path.parent for path in files_named(root, "status.json") if "logs" not in path.parts]


def _run(folder: Path, root: Path) -> dict[str, Any]:
    """A run's line. One with a damaged file is told of, and hides no other."""
    from plmsae_cli.config.errors import UserError
    from plmsae_cli.runtime.foretold import cost
    from plmsae_cli.runtime.processes import live_state, state_words
    from plmsae_cli.runtime.results import headline, last_metrics
    from plmsae_cli.runtime.run_folder import read_json, read_pointers

    name = folder.resolve().name if folder == root else str(folder.relative_to(root))
    found: dict[str, Any] = {"name": name, "folder": str(folder)}
    try:
        status = read_json(folder / "status.json") or {}
        return {
            **found,
            "state": live_state(status),
            "words": state_words(status),
            "stage": status.get("stage"),
            "seconds": status.get("stage_seconds", {}),
            "usd": cost(folder, status.get("stage_seconds", {})),
            "figures": headline(folder),
            "last": last_metrics(folder),
            "artifacts": read_pointers(folder),
        }
    except UserError as error:
        complain(error.message, error.hint)
        nothing: dict[str, Any] = {
            "stage": None,
            "seconds": {},
            "usd": None,
            "figures": {},
            "last": None,
            "artifacts": {},
        }
        return {**found, "state": DAMAGED, "words": DAMAGED, **nothing}


def _sound(path: Path, users: dict[str, list[str]]) -> dict[str, Any] | None:
    """`_data`, or None after a word about a manifest that is damaged."""
    from plmsae_cli.config.errors import UserError

    try:
        return _data(path, users)
    except UserError as error:
        if path.exists():  # else it was freed or deleted just now
            complain(error.message, error.hint)
        return None


def _data(path: Path, users: dict[str, list[str]]) -> dict[str, Any]:
    """Facts of an artifact, from its manifest or from the record of one that was freed.

    Raises:
        UserError: the manifest is damaged.
    """
    from plmsae_cli.config.errors import UserError
    from plmsae_cli.runtime.run_folder import read_json

    folder, manifest = path.parent, read_json(path)
    if manifest is None or not {"stage", "key"} <= manifest.keys():
        raise UserError(
            f"{path} is damaged: it does not say what it is", "remove it and start again: the folder is finished anew"
        )
    files = manifest.get("files", [])
    chunks = sum(file["name"].startswith("chunk-") for file in files)
    facts = (
        "d", "heldout_rows", "ordered_rows", "sorted_in", "chunk_rows", "seed", "weights", "fasta", "num_layers", "inputs",
        "created", "freed",
    )  # fmt: skip
    return {
        "folder": str(folder),
        "stage": manifest["stage"],
        "key": manifest["key"],
        "rows": manifest.get("rows", manifest.get("tokens", 0)),
        "bytes": sum(file["size"] for file in files),
        "files": len(files),
        **({"chunks": chunks} if chunks else {}),
        **{name: manifest[name] for name in (*facts, "imported") if name in manifest},
        "dtype": manifest.get("dtype") or "-",
        "layer": manifest.get("layer"),
        "used_by": users.get(folder.name, []),
    }


def show_data(folder: Path, as_json: bool) -> int:
    """One artifact: how much, in which form, from where."""
    from plmsae_cli.store.manifest import MANIFEST

    found = _data(folder / MANIFEST, {})
    if as_json:
        print_json(**found)
        return DONE
    weights, fasta = found.get("weights"), found.get("fasta")
    sorted_in = found.get("sorted_in")
    lines = {
        "rows": f"{found['rows']:,}" + (f" and {found['heldout_rows']:,} held out" if "heldout_rows" in found else ""),
        "size": f"{size(found['bytes'])} in {found['files']:,} files",
        "layout": f"bucketed: {found['ordered_rows']:,} of them in protein order, all sorted in {sorted_in}"
        if sorted_in
        else None,
        "chunks": f"{found['chunks']:,} of up to {found['chunk_rows']:,} rows" if "chunks" in found else None,
        "type": f"{found['dtype']}, {found['d']:,} dimensions" if "d" in found else found["dtype"],
        "layer": f"{found['layer']} of {found.get('num_layers') or '?'}" if found["layer"] is not None else None,
        "model": f"{weights['name']} (sha256 {weights['sha256'][:12]})" if weights else None,
        "proteins": f"{fasta['name']} (sha256 {fasta['sha256'][:12]})" if fasta else None,
        "imported": f"{found['imported']['path']} ({found['imported']['format']})" if "imported" in found else None,
        "seed": str(found["seed"]) if "seed" in found else None,
        "made from": ", ".join(f"{name} {value[:16]}" for name, value in found.get("inputs", {}).items()),
        "made": time.strftime("%Y-%m-%d %H:%M", time.localtime(found["created"])) if "created" in found else None,
    }
    print(f"{found['folder']}: {found['stage']}")
    for name, value in lines.items():
        if value:
            print(f"  {name}: {value}")
    return DONE


def _users(names: list[str]) -> str:
    """Some names: trials of a sweep may be a thousand."""
    more = len(names) - _USERS
    return (", ".join(names[:_USERS]) or "-") + (f" and {more} more" if more > 0 else "")


def _figure(run: dict[str, Any], name: str) -> str:
    if name in run["figures"]:
        return f"{run['figures'][name]:.4g}"
    last = run["last"] or {}
    value = None if run["figures"] or (name == "loss" and "fvu" in last) else last.get(_SHOWN[name])
    return "-" if value is None else f"({value:.4g})"
