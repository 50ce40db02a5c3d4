"""What all axes of evidence share: their tasks, their files, and how these become one set of tables.

An axis is a module of `axes` with `plan(scope)`, its tasks, and `work(task, scope, context)`, the files of one. The last of its
tasks leaves, in `eval/<axis>/` of the run,

    result.json             its figures, which become the axis's part of metrics.json (required)
    latents.parquet         one row a latent, columns of its own
    latent_concepts.parquet one row a pair (latent, concept)
    proteins.parquet        one row a protein: `id`, `length`, `in_training`, columns of its own

A task's id is `<axis>-<identity>` with, where there are several, `-<step>`: other options are other tasks. One axis knows
nothing of another; those that read what `concepts` found wait for its last task, which is in their identity.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from plmsae_cli.config.base import digest
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.evaluation import Eval
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.runtime.task import Resources, Task
from plmsae_cli.store.fs import FileRecord, Store, join
from plmsae_cli.store.manifest import Part, canonical_json, read_manifest, read_parts
from plmsae_cli.store.tables import read_table

if TYPE_CHECKING:
    from plmsae_cli.store.lineage import Lineage

EVAL = "eval"
UNKNOWN_ACTIVE = 64
"""Latents active on a residue, in plans, where the architecture does not fix it."""
FORMAT = 2
"""Of the files that axes leave: to be raised when those of earlier versions no longer serve."""


@dataclass(frozen=True)
class Scope:
    """The run that is evaluated."""

    experiment: Experiment
    store: Store

    @cached_property
    def lineage(self) -> Lineage:
        from plmsae_cli.store.lineage import Lineage  # pulls pyarrow in, which what axes compute can do without

        return Lineage(self.experiment, self.store)

    @property
    def options(self) -> Eval:
        assert self.experiment.eval is not None
        return self.experiment.eval

    @cached_property
    def folder(self) -> str:
        return self.lineage.run_folder()

    @property
    def dataset(self) -> str:
        """Folder of the dataset the dictionary was trained on."""
        return self.lineage.dataset().folder

    @cached_property
    def manifest(self) -> dict[str, Any] | None:
        """The dataset's; None before it is made."""
        return read_manifest(self.store, self.dataset)

    def made(self) -> dict[str, Any]:
        """The dataset's manifest.

        Raises:
            UserError: the dataset is not finished.
        """
        if self.manifest is None:
            raise UserError(
                f"{self.dataset} is not finished: it has no MANIFEST.json",
                "run the stage that makes it, or the whole experiment with `plmsae run`",
            )
        return self.manifest

    def identity(
        self, axis: str, science: Mapping[str, Any], inputs: Mapping[str, str] | None = None, of_run: bool = True
    ) -> str:
        """Eight hex digits that stand for the run (unless the axis is not about it), the axis's options and its files."""
        run = {"run": self.lineage.run_identity()} if of_run else {}
        body = {"format": FORMAT, **run, axis: dict(science)}
        return digest({**body, "inputs": dict(inputs)} if inputs else body)[:8]

    def content(self, path: str) -> str:
        """Hash of a file that an axis reads."""
        if path not in self._contents:  # several axes may read one file, of gigabytes
            self._contents[path] = self.store.hash(str(self.store.local(path))).xxh3
        return self._contents[path]

    def contents(self, **paths: str | None) -> dict[str, str]:
        """Hashes of the files that an axis reads, by name, for its identity; of one that is not given, nothing."""
        return {name: self.content(path) for name, path in paths.items() if path is not None}

    @cached_property
    def _contents(self) -> dict[str, str]:
        return {}

    def shape(self) -> tuple[int, int, int]:
        """Dimensions of the activations, latents, and latents active on a residue: 64 where no k fixes them.

        Of an imported dictionary the file says, until the run has its own.
        """
        dimensions = self.manifest["d"] if self.manifest else self.lineage.d
        train = self.experiment.train
        assert train is not None
        if train.imported is None:
            assert train.sae is not None
            return dimensions, train.sae.width(dimensions), train.sae.k if train.sae.has("k") else UNKNOWN_ACTIVE
        return dimensions, self._imported["num_latents"], self._imported.get("k", UNKNOWN_ACTIVE)

    @cached_property
    def _imported(self) -> Mapping[str, Any]:
        """Settings of the imported dictionary, which several axes ask for, and which may be gigabytes."""
        from plmsae_cli.runtime.dictionaries import read_dictionary
        from plmsae_cli.runtime.saved import read_sae_facts

        if self.store.exists(join(self.folder, "sae", "sae.json")):
            config: Mapping[str, Any] = read_sae_facts(self.folder, self.store)["config"]
            return config
        assert self.experiment.train is not None
        assert self.experiment.train.imported is not None
        return read_dictionary(self.experiment.train.imported, self.store).model.settings()

    def require_same_model(self, remedy: str) -> None:
        """Raises UserError where `train.data` was embedded with another model than `model.weights`, or nobody knows which."""
        if self.manifest is None:
            embed = self.experiment.embed
            if embed is not None and embed.imported is not None and not embed.imported.of_model:
                raise UserError(
                    "the model of imported activations is not known",
                    f"set embed.imported.of_model if it is model.weights, or {remedy}",
                )
            return
        embedded = self.manifest["weights"]
        if embedded is None:
            raise UserError(f"{self.dataset} was made from imported activations, whose model is not known", remedy)
        if self.lineage.weights.sha256 != embedded["sha256"]:
            raise UserError(
                f"model.weights is {self.lineage.weights.name}, but the dataset was embedded with {embedded['name']}",
                f"name that model, or {remedy}",
            )

    def path(self, axis: str, *names: str) -> str:
        return join(self.folder, EVAL, axis, *names)

    def task(
        self, axis: str, identity: str, step: str = "", needs: Sequence[str] = (), cost: float = 1.0, **args: Any
    ) -> Task:
        """One task of an axis; `needs` are steps of the same axis."""
        stem = f"{axis}-{identity}"
        return Task(
            f"{stem}-{step}" if step else stem,
            "eval",
            (self.folder,),
            tuple(f"{stem}-{need}" for need in needs),
            Resources(gpus=1),
            cost,
            {"axis": axis, "stem": stem, "step": step, **args},
        )

    def pieces(
        self, axis: str, identity: str, name: str, of: int, cost: float, needs: Sequence[str] = (), **args: Any
    ) -> list[Task]:
        """`of` tasks of a step, `<name>-<index>of<of>`, which share its cost."""
        return [
            self.task(axis, identity, f"{name}-{index}of{of}", needs, cost / of, index=index, of=of, **args)
            for index in range(of)
        ]

    def recorded(self, task: Task) -> bool:
        """Whether the task was done."""
        return self.store.exists(join(self.folder, "parts", f"{task.id}.json"))

    def parts_of(self, task: Task, steps: Sequence[str]) -> list[Part]:
        """What these steps of the task's axis left."""
        wanted = [f"{task.args['stem']}-{step}" for step in steps]
        parts = read_parts(self.store, self.folder, known=wanted)
        return [parts[name] for name in wanted]

    def files_of(self, task: Task, steps: Sequence[str]) -> list[str]:
        """Names of their files, relative to the run's folder."""
        return [file.name for part in self.parts_of(task, steps) for file in part.files]

    def write_json(self, axis: str, name: str, body: Mapping[str, Any]) -> FileRecord:
        return self.store.write(self.path(axis, name), [canonical_json(body)])

    def read_json(self, axis: str, name: str) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.store.read(self.path(axis, name)))
        return body

    def write_table(self, axis: str, name: str, columns: Any) -> FileRecord:
        return write_table(self.store, self.path(axis, name), columns)

    def read_table(self, axis: str, name: str) -> Any:
        return read_table(self.store, self.path(axis, name))


def csv_of(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    """These columns of the rows as CSV, numbers to four decimals."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([f"{row[name]:.4f}" if isinstance(row[name], float) else row[name] for name in columns])
    return text.getvalue().encode()


def write_table(store: Store, path: str, columns: Any) -> FileRecord:
    """Write a mapping of columns, or a table, as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    pq.write_table(table, sink, compression="zstd")
    return store.write(path, [sink.getbuffer()])
