"""From runs to one folder of static pages that open from disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from plmsae_cli import __version__
from plmsae_cli.browse.features import Features, read_features
from plmsae_cli.browse.index import index_body, windows
from plmsae_cli.browse.layout import Layout, arrange
from plmsae_cli.browse.pages import RANDOM, Pages
from plmsae_cli.browse.scripts import script
from plmsae_cli.config.errors import UserError

GROUP = 8
"""Latents in a file: what one click loads."""
MOTIF_GROUP = 1024
"""Latents in a file of windows for the motif search."""
MARK = "site.json"
"""Says that a folder is a site, and last what it was made from: then it is finished."""
_OURS = {"made_by": "plmsae browse"}
_SOURCES = ("features/index.json", "latents.parquet", "steering/result.json", "steering/effects.parquet")
"""What tells, by when they were written, that a run has other results."""
Progress = Callable[[float, float], None]


def build_site(
    runs: Sequence[Path], folder: Path, structures: Sequence[str] = (), progress: Progress = lambda *_: None
) -> Path:
    """Write the pages of one or two runs into a folder and return its index.html.

    Args:
        structures: PDB or mmCIF files (`file:CHAIN` for one chain) and folders of them.

    Raises:
        UserError: a run has no features, or the folder holds something else.
    """
    found = [read_features(run) for run in runs]
    given = _structures(structures, found)
    _clear(folder)
    for place, features in enumerate(found):
        _write_run(folder / "data" / str(place), str(place), features, given[place])
        progress(place + 1, len(found))
    if len(found) == 2:
        from plmsae_cli.browse.pairing import pair

        for place, body in enumerate(pair(found[0], found[1])):
            _write(folder / "data" / str(place) / "matches.js", f"{place}/matches", body)
    write_static(folder, [features.index["run"] for features in found], __version__)
    (folder / MARK).write_text(json.dumps({**_OURS, "from": identity(runs, structures)}), encoding="utf-8")
    return folder / "index.html"


def write_static(folder: Path, names: Sequence[str], version: str) -> None:
    """What does not depend on what the dictionaries are, but on their names."""
    _write(folder / "data" / "site.js", "site", {"runs": list(names), "version": version})
    static = files("plmsae_cli.browse") / "static"
    for name in ("index.html", "style.css"):
        (folder / name).write_bytes((static / name).read_bytes())
    (folder / "app.js").write_text(bundle(), encoding="utf-8")
    (folder / "vendor").mkdir(exist_ok=True)
    for one in (static / "vendor").iterdir():
        (folder / "vendor" / one.name).write_bytes(one.read_bytes())


def identity(runs: Sequence[Path], structures: Sequence[str]) -> str:
    """A hash of what a finished site was made from, which tells no path; another one means that it is out of date."""
    sources = [run / "eval" / name for run in runs for name in _SOURCES]
    stamps = [_stamp(path) for path in (*sources, *_structure_files(structures))]
    return hash_of(json.dumps([__version__, bundle(), stamps, sorted(structures)]))


def _stamp(path: Path) -> list[Any]:
    stat = path.stat() if path.is_file() else None
    return [str(path.resolve()), stat and stat.st_mtime_ns, stat and stat.st_size]


def _structure_files(structures: Sequence[str]) -> list[Path]:
    if not structures:
        return []
    from plmsae_cli.browse.structures import find
    from plmsae_cli.evaluation.contacts.structure import split_chain

    return [Path(split_chain(path)[0]) for path in find(structures)]


def is_current(folder: Path, runs: Sequence[Path], structures: Sequence[str]) -> bool:
    """Whether the folder is a finished site of these runs as they are now."""
    mark = _mark(folder)
    return mark is not None and mark.get("from") == identity(runs, structures)


def _mark(folder: Path) -> dict[str, Any] | None:
    """What the folder says of itself; None where it is no site, finished or not."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return mark if isinstance(mark, dict) and mark.items() >= _OURS.items() else None


def bundle() -> str:
    """The page's program: the files of `static/js` in the order of their names, in one closed scope."""
    sources = sorted((files("plmsae_cli.browse") / "static" / "js").iterdir(), key=lambda one: one.name)
    parts = [one.read_text(encoding="utf-8") for one in sources if one.name.endswith(".js")]
    return '(() => {\n"use strict";\n' + "\n".join(parts) + "})();\n"


def hash_of(text: str) -> str:
    """Twelve hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _clear(folder: Path) -> None:
    """Empty a folder of an earlier site.

    Raises UserError where it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", "name a folder for the pages")
    if folder.is_dir() and any(folder.iterdir()) and _mark(folder) is None:
        raise UserError(f"{folder} holds other things", "name a new or empty folder for the pages")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(json.dumps(_OURS), encoding="utf-8")
    if (folder / "data").is_dir():
        shutil.rmtree(folder / "data")
    (folder / "data").mkdir()


def _structures(paths: Sequence[str], found: Sequence[Features]) -> list[dict[int, str]]:
    """Coordinates of the proteins of each run."""
    if not paths:
        return [{} for _ in found]
    from plmsae_cli.browse.structures import find, match

    wanted = find(paths)
    given = [match(wanted, features.proteins) for features in found]
    if not any(given):
        raise UserError(
            f"none of {len(wanted)} structures belongs to a protein with an example",
            "a structure is known by the protein's id in its file name, or by its sequence",
        )
    return given


def _write(path: Path, name: str, body: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(script(name, body))


def write_index(folder: Path, name: str, body: dict[str, Any]) -> None:
    """The data of the first page."""
    _write(folder / "index.js", f"{name}/index", body)


def _write_run(folder: Path, name: str, features: Features, structures: dict[int, str]) -> None:
    number = features.num_latents
    motif_files = -(-number // MOTIF_GROUP) if any(row["sequence"] for row in features.proteins.values()) else 0
    body = index_body(features, _layout(features.run), GROUP, motif_files)
    body["structures"] = len(structures)
    write_index(folder, name, body)
    for protein, text in structures.items():
        _write(folder / f"structure-{protein}.js", f"{name}/structure-{protein}", text)
    places = {protein: f"{name}/structure-{protein}" for protein in structures}
    children: dict[int, list[int]] = {}
    for latent, parent in enumerate(features.latents.get("parent", ())):
        if parent is not None:
            children.setdefault(parent, []).append(latent)
    pages = Pages(features, children, places)
    motifs: list[list[str]] = []
    size = features.index["latents_per_group"]
    for group, examples, concepts in features.groups(RANDOM):
        for latent in range(group * size, min((group + 1) * size, number)):
            pages.add(latent, examples.get(latent, []), concepts.get(latent, []))
            motifs.append(windows(examples.get(latent, []), features.proteins))
            if (latent + 1) % GROUP == 0 or latent + 1 == number:
                _write(folder / f"group-{latent // GROUP:05}.js", f"{name}/group-{latent // GROUP:05}", pages.body())
                pages = Pages(features, children, places)
            if motif_files and ((latent + 1) % MOTIF_GROUP == 0 or latent + 1 == number):
                at = latent // MOTIF_GROUP
                _write(folder / f"motif-{at:05}.js", f"{name}/motif-{at:05}", motifs)
                motifs = []


def _layout(run: Path) -> Layout | None:
    """The decoder map; None where the run's dictionary is not there."""
    from plmsae_cli.runtime.saved import load_sae_with_facts

    try:
        sae = load_sae_with_facts(run).model
    except UserError:
        return None
    return arrange(sae.w_dec_ND.detach().numpy())
