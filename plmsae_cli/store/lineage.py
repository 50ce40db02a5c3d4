"""Names of artifacts: what a folder holds decides what it is called.

key = digest of the section's science fields, the format version and the inputs' keys. FASTA files and weights enter by the
hash of their content, so renamed inputs are the same inputs and two experiments share an embedding without being told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from plmsae_cli.config.base import digest
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.store.foreign import files_of
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.imports import Source, open_source, scan_imported
from plmsae_cli.store.manifest import read_manifest
from plmsae_cli.store.proteins import Scan, scan
from plmsae_cli.store.weights import WeightsInfo, cache_folder, resolve_weights

FORMATS = {
    "embed": "plmsae.activations/1",
    "shuffle": "plmsae.shuffled/1",
    "optimize": "plmsae.blocks/1",
    "tokens": "plmsae.tokens/1",
}


@dataclass(frozen=True)
class Ref:
    """An artifact's name, and what went into it."""

    stage: str
    key: str
    folder: str
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)

    def provenance(self) -> dict[str, Any]:
        """The manifest's first fields."""
        return {
            "format": FORMATS[self.stage],
            "stage": self.stage,
            "key": self.key,
            "config": dict(self.config),
            "inputs": dict(self.inputs),
        }


class Lineage:
    """The artifacts of one experiment. Reads inputs only as far as their names need it."""

    def __init__(self, experiment: Experiment, store: Store) -> None:
        self.experiment = experiment
        self.store = store
        self._sources: dict[str, Source] = {}

    def _ref(self, stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Ref:
        key = digest({"format": FORMATS[stage], "config": dict(config), "inputs": dict(inputs)})
        return Ref(stage, key, join(self.experiment.data_folder(), f"{stage}-{key}"), config, inputs)

    @cached_property
    def weights(self) -> WeightsInfo:
        # Planning fetches nothing: a run downloads published weights before it plans.
        return resolve_weights(self.experiment.model.weights, self.store, download=False)

    @property
    def d(self) -> int:
        """Dimension of the residual stream."""
        embed = self.experiment.embed
        if embed is not None and embed.imported is not None:
            return self.source(embed.layers[0]).d
        return int(self.weights.config["d"])

    @property
    def num_layers(self) -> int | None:
        """Of the model; None where activations are imported and nobody says from which."""
        return int(self.weights.config["num_layers"]) if self.has_model else None

    @property
    def has_model(self) -> bool:
        """Whether the rows are those of `model.weights`."""
        embed = self.experiment.embed
        return embed is None or embed.imported is None or embed.imported.of_model

    def source(self, layer: int) -> Source:
        """Where the activations of a layer are imported from."""
        embed = self.experiment.embed
        assert embed is not None
        assert embed.imported is not None
        path = embed.imported.path.replace("{layer}", str(layer))
        if path not in self._sources:
            self._sources[path] = open_source(path, embed.imported.format)
        return self._sources[path]

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row of one layer."""
        assert self.experiment.embed is not None
        return self.width * {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1}[self.experiment.embed.dtype]

    @property
    def width(self) -> int:
        """Numbers of one stored row: d, and of int8 two bytes more, its scale."""
        assert self.experiment.embed is not None
        return self.d + (2 if self.experiment.embed.dtype == "int8" else 0)

    @cached_property
    def fasta(self) -> Path:
        assert self.experiment.embed is not None
        assert self.experiment.embed.fasta is not None
        return self.store.local(self.experiment.embed.fasta)

    @cached_property
    def scan(self) -> Scan:
        """Lengths, split and hash of the proteins (one pass over the FASTA, cached), or of what imported rows say of theirs."""
        embed = self.experiment.embed
        assert embed is not None
        proteins = None if embed.fasta is None else scan(self.fasta, embed)
        if embed.imported is None:
            assert proteins is not None
            return proteins
        source = self.source(embed.layers[0])
        return scan_imported(source, source.digest(cache_folder()), embed.holdout, proteins)

    def embed(self, layer: int, layout: str | None = None) -> Ref:
        """The activations of a layer; `layout` if other than the experiment's."""
        embed = self.experiment.embed
        assert embed is not None
        if self.num_layers is not None and layer > self.num_layers:
            raise UserError(
                f"embed.layers: {self.weights.name} has layers 0 to {self.num_layers}, {layer} is not one of them",
                f"the last layer is {self.num_layers}",
            )
        config = {**embed.science(), "layer": layer}
        if (layout or embed.layout) == "bucketed":
            # Without its rows it is another artifact; the rows are in the shuffle's, so the two are a pair.
            assert self.experiment.shuffle is not None
            config |= {"layout": "bucketed", "seed": self.experiment.shuffle.seed}
        # The number of heads, say, is not in the tensors: the model's configuration is part of its identity.
        model = {"weights": self.weights.sha256, "model": digest(dict(self.weights.config))} if self.has_model else {}
        fasta = {"fasta": self.scan.sha256} if embed.fasta is not None else {}
        return self._ref("embed", config, {**fasta, **model, **self._imported(layer)})

    def _imported(self, layer: int) -> dict[str, str]:
        embed = self.experiment.embed
        assert embed is not None
        if embed.imported is None:
            return {}
        source, first = self.source(layer), self.source(embed.layers[0])
        if self.has_model and source.d != self.weights.config["d"]:
            raise UserError(
                f"embed.imported: {source.path} has rows of width {source.d}, {self.weights.name} has {self.weights.config['d']}",
                "name the model that computed them in model.weights, or leave of_model out",
            )
        if (source.num_rows, source.d) != (first.num_rows, first.d):
            raise UserError(
                f"embed.imported: {source.path} has {source.num_rows:,} rows of width {source.d}, {first.path} "
                f"{first.num_rows:,} of {first.d}",
                "layers imported together are of the same residues and model; import others in an experiment of their own",
            )
        return {"imported": source.digest(cache_folder())}

    def shuffle(self, layer: int) -> Ref:
        assert self.experiment.shuffle is not None
        # Whoever sorts them, it is the same rows in the same order: all layouts lead to one dataset.
        return self._ref("shuffle", self.experiment.shuffle.science(), {"embed": self.embed(layer, "plain").key})

    def activations(self, layer: int) -> Ref:
        """The activations that belong to the shuffled rows: by the layout of those that are there, else the experiment's."""
        shuffled = read_manifest(self.store, self.shuffle(layer).folder)
        return self.embed(layer, None if shuffled is None else shuffled.get("layout", "plain"))

    def optimize(self, layer: int) -> Ref:
        assert self.experiment.optimize is not None
        return self._ref("optimize", self.experiment.optimize.science(), {"shuffle": self.shuffle(layer).key})

    def tokens(self) -> Ref:
        """The token shards a pLM trains on."""
        train = self.experiment.train
        assert train is not None
        assert train.plm is not None
        proteins = train.plm.fasta if train.plm.bin is None else train.plm.bin
        assert proteins is not None
        sources = {"train": proteins, **{f"valid-{k}": v for k, v in sorted(train.plm.valid.items())}}
        config = {"max_length": train.plm.max_length, "holdout": train.plm.holdout}
        return self._ref("tokens", config, {k: self._proteins_digest(v) for k, v in sources.items()})

    def _proteins_digest(self, files: str | list[str]) -> str:
        from plmsae_cli.store.proteins import fasta_sha256
        from plmsae_cli.store.tokens import find_shards, is_bin, shards_digest

        if is_bin(files):
            return shards_digest(self.store, find_shards(self.store, files))
        assert isinstance(files, str)
        return fasta_sha256(self.store.local(files))

    def dataset(self) -> Ref:
        """What `train` reads: this experiment's own blocks, or the folder `train.data` names."""
        train = self.experiment.train
        assert train is not None
        if train.data is None:
            return self.optimize(self.experiment.training_layer())
        manifest = read_manifest(self.store, train.data)
        if manifest is None or manifest.get("format") != FORMATS["optimize"]:
            raise UserError(
                f"train.data: {train.data} is not a finished dataset (no MANIFEST.json of format {FORMATS['optimize']})",
                "name an `optimize-<key>` folder; `plmsae ls` lists them",
            )
        return Ref("optimize", manifest["key"], train.data.rstrip("/"), manifest["config"], manifest["inputs"])

    def run_folder(self) -> str:
        assert self.experiment.name is not None
        return join(self.experiment.root, self.experiment.name)

    def run_identity(self) -> dict[str, Any]:
        """What a run is, for `same name = continue`: the training's science and its data."""
        train = self.experiment.train
        assert train is not None
        data = self.dataset().key if train.kind == "sae" else self.tokens().key
        # Where it is LitData's, several ranks and later epochs have another order; absent for ours, as before there was a choice.
        loader = {} if train.loader == "blocks" else {"loader": train.loader}
        own = {} if train.imported is None else {"imported": self.imported_files()}
        return {"train": train.science() | loader, "data": data, **own}

    def imported_files(self) -> dict[str, str]:
        """Hashes of the files that make `train.imported`, by name."""
        assert self.experiment.train is not None
        imported = self.experiment.train.imported
        assert imported is not None
        files = [self.store.local(path) for path in files_of(imported.path, self.store)]
        return {file.name: self.store.hash(str(file)).xxh3 for file in files}
