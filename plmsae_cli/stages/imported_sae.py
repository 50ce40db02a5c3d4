"""`train.imported`: the dictionary of another project becomes the run's, as if it had been trained here.

Everything that reads a run's SAE (`eval`, `browse`, `load_sae`, `export`) then reads this one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.imported import ImportedSAE
from plmsae_cli.runtime.task import Artifact, Context, Plan, Resources, Result, Task
from plmsae_cli.stages.common import remaining, require_manifest
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import read_manifest

if TYPE_CHECKING:
    from plmsae_cli.runtime.dictionaries import Foreign

_SIZES = re.compile(r"(?<![0-9])(8m|35m|150m|650m|3b|15b)(?![a-z0-9])")


def plan(lineage: Lineage, options: ImportedSAE) -> Plan:
    """One task, on one device.

    Raises:
        UserError: what is there cannot be read, or is of another model, layer or width than the dataset.
    """
    from plmsae_cli.config.base import digest

    dataset, folder = lineage.dataset(), lineage.run_folder()
    tasks = remaining(lineage.store, [Task("train", "train", (folder,), resources=Resources(gpus=1))])
    figures: dict[str, Any] = {"dataset": dataset.folder}
    if tasks:
        about = _about(lineage, read_manifest(lineage.store, dataset.folder))
        found = _read(options, lineage.store, *about)
        figures |= {
            "imported": f"{options.path} ({found.format})",
            "of": f"{found.weights}, layer {found.layer}",
            "latents": found.model.num_latents,
        }
    done = Artifact(folder, digest(lineage.run_identity()), not tasks)
    return Plan("train", tasks, {"run": done}, figures)


def work(task: Task, context: Context, options: ImportedSAE) -> Mapping[str, Result]:
    from plmsae_cli.runtime.device import pick_device
    from plmsae_cli.runtime.dist import gang
    from plmsae_cli.store.activations import Statistics
    from plmsae_cli.store.blocks import Blocks
    from plmsae_cli.store.checked import CheckedReads
    from plmsae_cli.training.export import MAXIMUM_ROWS, measure_maximum, write_sae

    lineage, store = Lineage(context.experiment, context.store), context.store
    dataset = lineage.dataset()
    manifest = require_manifest(store, dataset.folder)
    found = _read(options, store, *_about(lineage, manifest))
    with gang() as ranks:
        if not ranks.first:  # whoever starts several, one does it
            return {}
        model = found.model.to(pick_device(ranks.local_rank))
        with closing(CheckedReads(store, dataset.folder, manifest["files"])) as reads:
            blocks = Blocks(reads, dataset.folder)
            rows = min(blocks.num_rows, MAXIMUM_ROWS)
            measure_maximum([model], blocks, rows)
            reads.finish()
    facts = {name: manifest[name] for name in ("layer", "num_layers", "weights", "fasta")} | {
        "dataset": dataset.key,
        "dataset_rows": manifest["rows"],
        "gamma": Statistics.read(store, join(dataset.folder, "stats.safetensors")).gamma,
        "maximum_rows": rows,
        "imported": {
            "path": options.path,
            "format": found.format,
            "weights": found.weights,
            "layer": found.layer,
            "files": lineage.imported_files(),
        },
        "train": {"imported": options.science()},
    }
    (folder,) = task.folders
    files = write_sae(model, 1 / (options.norm_factor or 1.0), facts, join(folder, "sae"), store)
    return {folder: Result(files, {"imported": found.format})}


def _about(lineage: Lineage, manifest: Mapping[str, Any] | None) -> tuple[int, str | None, int]:
    """Width, language model (None where nobody knows it) and layer of the dataset, made or to be made."""
    if manifest is not None:
        return manifest["d"], (manifest["weights"] or {}).get("name"), manifest["layer"]
    return (
        lineage.d,
        lineage.weights.name if lineage.has_model else None,
        lineage.experiment.training_layer(),
    )


def _read(options: ImportedSAE, store: Store, d: int, weights: str | None, layer: int) -> Foreign:
    """The dictionary, which must be of the dataset's width, model and layer."""
    from plmsae_cli.runtime.dictionaries import read_dictionary

    found = read_dictionary(options, store)
    where = f"train.imported: {options.path}"
    silent = [name for name in ("weights", "layer") if getattr(found, name) is None]
    if silent:
        raise UserError(
            f"{where} does not say of which {' and '.join('model' if s == 'weights' else s for s in silent)} it is",
            f"add {' and '.join(f'train.imported.{name}' for name in silent)}: those it was trained on",
        )
    if found.model.d != d:
        raise UserError(
            f"{where} takes activations of width {found.model.d}, the dataset's have {d}",
            "embed the model that it was trained on (model.weights)",
        )
    if found.layer != layer:
        raise UserError(
            f"{where} is of layer {found.layer}, the dataset of layer {layer}",
            f"embed layer {found.layer}; if the file counts otherwise, say train.imported.layer as embed.layers counts",
        )
    assert found.weights is not None
    if weights is not None and _same_name(found.weights) != _same_name(weights):
        raise UserError(
            f"{where} is of {found.weights}, the dataset of {weights}",
            "embed that model; if it is the same by another name, say so in train.imported.weights",
        )
    return found


def _same_name(model: str) -> str:
    """ESM-2's size, by which projects name its models in many ways; of another model the end of its path."""
    name = model.rstrip("/").rpartition("/")[2].lower()
    size = _SIZES.search(name)
    return size[1] if size else name
