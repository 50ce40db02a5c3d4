"""The sections that make data: where it lives, from which proteins, in which form."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from plmsae_cli.config.base import SCIENCE, Auto, Bytes, Count, Fraction, Section, Whole, rule


class Storage(Section):
    """How to reach `s3://` paths. Credentials come from the environment or the AWS files, never from here."""

    endpoint_url: str | None = None
    """Address of an S3-speaking server other than AWS, such as `https://minio.lab:9000`."""
    profile: str | None = None
    """Profile in `~/.aws/credentials`; default: the usual AWS search order."""
    region: str | None = None
    """Region of the bucket; default: from the environment, else `us-east-1`."""
    anonymous: bool = False
    """Read public buckets without credentials."""
    allow_http: bool = False
    """Permit a plain-http endpoint: faster on a trusted network, readable by everyone on it."""


class Model(Section):
    """The protein language model whose activations are explained."""

    weights: str = "bundled"
    """`bundled` (a small demo model), a published name such as `esm2_t33_650M_UR50D`, a fair-esm `.pt`, a
    Hugging Face ESM-2 folder, or the folder of one of our runs. `hf:` and a folder, or a name in the local Hugging
    Face cache, is any encoder that transformers reads. Identified by its content's sha256."""


class Imported(Section):
    """Activations that another program has computed, brought into our store instead of being computed."""

    path: str
    """A file, or a folder whose files are read in the order of their names (numbers by value); local. With several
    `embed.layers` it contains `{layer}`, as in `acts/layer_{layer}`."""
    format: Auto | Literal["npy", "safetensors", "interplm", "saelens"] = "auto"
    """`npy` and `safetensors`: matrices [rows, width], one a file; `interplm`: its shards (`.pt`, `.dat`); `saelens`: its
    cached activations (Arrow); `auto`: by the files' names."""
    of_model: bool = False
    """Whether `model.weights` has computed them, at `embed.layers` as we count: the width is checked, and with `embed.fasta`
    `eval` may run the model."""


class Embed(Section):
    """FASTA to activations: one row a residue, one artifact a layer."""

    fasta: str | None = None
    """Proteins, plain or gzip, local or `s3://`. Identified by content, so a renamed file is the same input. Required unless
    activations are `imported`; beside them it says whose rows they are, protein by protein in its order."""
    imported: Imported | None = None
    """Take activations that exist instead of computing them; absent: compute."""
    layers: Annotated[list[Whole], Field(min_length=1)]
    """Layers to store, all in one pass: 0 is the scaled embedding, k the residual stream after block k, the last
    one includes the final LayerNorm. The forward stops after the deepest."""
    max_length: Annotated[Count, SCIENCE] = 1022
    """Longest protein in residues; `long` says what happens beyond."""
    long: Annotated[Literal["truncate", "skip", "windows", "error"], SCIENCE] = "truncate"
    """Proteins longer than `max_length`: keep the first `max_length` residues, leave out, read all residues in
    overlapping windows of `max_length`, each residue from the window where it is most central, or stop."""
    unknown: Annotated[Literal["X", "skip", "error"], SCIENCE] = "X"
    """Letters outside ESM's alphabet: read as X, leave the protein out, or stop."""
    duplicates: Annotated[Literal["error", "first"], SCIENCE] = "error"
    """Two proteins with one id: stop, or keep the first."""
    empty: Annotated[Literal["error", "skip"], SCIENCE] = "error"
    """Proteins without a residue: stop, or leave out."""
    holdout: Annotated[Fraction, SCIENCE] = 0.01
    """Share of the proteins held out of training for `eval`, chosen by a hash of the sequence; at least 32
    proteins, at most half."""
    dtype: Annotated[Literal["bfloat16", "float16", "float32", "int8"], SCIENCE] = "bfloat16"
    """Stored type: 2, 2 or 4 bytes a number. `int8` is one byte, standardised by dimension, and two bytes more a row."""
    pooled: Annotated[bool, SCIENCE] = False
    """Also store each protein's mean over its residues, float32."""
    compute: Auto | Literal["bfloat16", "float16", "float32"] = "auto"
    """Arithmetic of the forward pass; `auto` is bfloat16 on GPUs that have it, float16 on older ones, float32 on
    a CPU."""
    batch_tokens: Auto | Count = "auto"
    """Most tokens packed into one forward pass; `auto` is what the GPU's memory holds, at most 65,536 (4,096 on a
    CPU). Halved, with a message, when memory runs out."""
    compile: Auto | bool = "auto"
    """Compile the forward pass (torch.compile); `auto` does on GPUs where the work is long enough to repay it."""
    shard: Bytes = Field(default="1GB", validate_default=True)
    """Bytes of one shard of one layer, the unit of work and of resuming. Fixed by the first start."""
    layout: Literal["plain", "bucketed"] = "plain"
    """`plain`: all rows in protein order. `bucketed`: embed writes them sorted by their place in the shuffled order, as
    `shuffle` would, which then has nothing to do; the same dataset, with one reading and one writing of all rows less."""
    ordered_rows: Whole = 20_000_000
    """With `layout: bucketed`: how many rows, from the first on, are kept in protein order as well. Fixed by the first start."""

    @property
    def window(self) -> int | None:
        """Residues of the windows that longer proteins are read in; None where none is."""
        return self.max_length if self.long == "windows" else None

    @model_validator(mode="after")
    def _each_layer_once(self) -> Embed:
        return self.require_each_once("layers")

    @model_validator(mode="after")
    def _slice_has_an_effect(self) -> Embed:
        if self.layout == "plain" and self.changed("ordered_rows"):
            raise rule(
                "ordered_rows",
                "ordered_rows has no effect with layout: plain, which keeps all rows in order",
                "remove it or use layout: bucketed",
            )
        return self

    @model_validator(mode="after")
    def _has_a_source(self) -> Embed:
        if self.imported is None:
            if self.fasta is None:
                raise rule(
                    "fasta",
                    "embed needs fasta, the proteins to embed",
                    "add fasta, or imported: activations that exist",
                )
            return self
        if self.layout == "bucketed":
            raise rule(
                "layout", "layout: bucketed has no effect on imported rows, which are copied in order", "remove it"
            )
        if "://" in self.imported.path:
            raise rule("imported.path", "activations are imported from a local disk", "copy them to one first")
        if len(self.layers) > 1 and "{layer}" not in self.imported.path:
            raise rule(
                "imported.path",
                f"embed.layers has {len(self.layers)} layers, imported.path names one place",
                "write {layer} where the path has the layer's number, or import one layer",
            )
        idle = ["compute", "batch_tokens", "compile"]
        if self.fasta is None:
            idle += ["max_length", "long", "unknown", "duplicates", "empty"]
            if self.pooled:
                raise rule(
                    "pooled", "pooled: true needs the proteins of the imported rows", "add fasta, or remove pooled"
                )
        for name in idle:
            if self.changed(name):
                without = "" if name in ("compute", "batch_tokens", "compile") else " without fasta"
                raise rule(name, f"embed.{name} has no effect on imported activations{without}", "remove it")
        return self

    def science(self) -> dict[str, Any]:
        chosen = super().science()
        if not self.pooled:  # as before the field existed, so that artifacts keep their names
            del chosen["pooled"]
        return chosen


class Shuffle(Section):
    """A uniform, seeded, invertible order over all training rows."""

    seed: Annotated[int, SCIENCE] = 0
    """Seed of the order: the same seed gives the same bytes on any number of workers."""
    memory: Bytes = Field(default="4GB", validate_default=True)
    """Peak memory of one task; all but 512 MB (a quarter, of little) holds rows. Fixed by the first start."""


class Keep(Section):
    """What stays on the disk when its purpose is served. A freed folder leaves a record and is made again only where
    something asks for it."""

    activations: bool = True
    """Activations, once the dataset made from them is finished and verified; false frees them."""
    buckets: bool = True
    """What `shuffle` wrote, once the dataset made from it is finished and verified; false frees it."""


class Optimize(Section):
    """Buckets to a streamable dataset: LitData chunks that unmodified `litdata` reads too."""

    chunk: Annotated[Bytes, SCIENCE] = Field(
        default="512MB", validate_default=True, json_schema_extra={"x-science": True}
    )
    """Bytes of one chunk file, rounded to whole blocks."""
    block_rows: Annotated[Count, SCIENCE] = 8192
    """Rows every chunk but the last is a multiple of: any training batch that divides it reads within one file."""

    @model_validator(mode="after")
    def _chunk_fits_litdata(self) -> Optimize:
        if self.chunk > 2**32 - 1:
            raise rule(
                "chunk", f"a LitData chunk holds at most 4 GiB, chunk is {self.chunk:,} bytes", "use chunk: 1GB or less"
            )
        return self
