"""The one typed tree of an experiment. Every default lives here; every docstring is the field's help."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from plmsae_cli.config.base import Name, Section, rule
from plmsae_cli.config.data import Embed, Keep, Model, Optimize, Shuffle, Storage
from plmsae_cli.config.evaluation import Eval
from plmsae_cli.config.language_models import TRAINED, LanguageModels, Representations
from plmsae_cli.config.launching import Launch, Limits, Price
from plmsae_cli.config.sweep import Sweep
from plmsae_cli.config.training import Train

__all__ = ["Embed", "Experiment", "Launch", "Storage", "Train"]

OF_DICTIONARIES = (
    "fidelity", "concepts", "families", "probes", "encode", "contacts", "structure", "steering", "features",
)  # fmt: skip
"""Axes of `eval` that score a sparse autoencoder."""
STAGES = ("embed", "shuffle", "optimize", "train", "sweep", "eval")


class Wandb(Section):
    """Weights & Biases mirrors metrics.jsonl. The key comes from the environment or `wandb login`."""

    mode: Literal["off", "offline", "online"] = "off"
    """`off`, `offline` (files to `wandb sync` later) or `online`."""
    project: str = "plmsae"
    """Project name."""
    entity: str | None = None
    """Team or user; default: the account's own."""
    group: str | None = None
    """Group of runs; the trials of a sweep use the sweep's name."""


class Experiment(Section):
    """One YAML: proteins to features. A stage whose section is absent is not run."""

    name: Name | None = None
    """Name of the run and of its folder under `root`; default: the file's stem."""
    root: str = "runs"
    """Local folder of runs: logs, metrics, checkpoints, reports."""
    data_root: str | None = None
    """Where data lives, by key, shared by all experiments; local or `s3://`; default `<root>/data`."""
    launch: Launch = Launch()
    """Where the work runs."""
    storage: Storage = Storage()
    """How to reach `s3://` paths."""
    model: Model = Model()
    """The protein language model."""
    embed: Embed | None = None
    """FASTA to activations."""
    shuffle: Shuffle | None = None
    """Activations to a global random order."""
    optimize: Optimize | None = None
    """Shuffled buckets to a streamable dataset."""
    train: Train | None = None
    """Dataset to a trained model."""
    sweep: Sweep | None = None
    """Many trainings on one dataset, instead of one."""
    eval: Eval | None = None
    """Evidence of what was learnt."""
    wandb: Wandb = Wandb()
    """Weights & Biases."""
    keep: Keep = Keep()
    """What stays on the disk when its purpose is served."""
    price: Price = Price()
    """What things cost, for the dry run."""
    limits: Limits = Limits()
    """What a start may take by its own plan."""

    @model_validator(mode="after")
    def _stages_have_their_inputs(self) -> Experiment:
        for stage, upstream in {"shuffle": "embed", "optimize": "shuffle", "sweep": "train"}.items():
            if getattr(self, stage) is not None and getattr(self, upstream) is None:
                raise rule(stage, f"{stage} needs a {upstream} section", f"add `{upstream}:` or remove `{stage}:`")
        if self.embed is not None and self.embed.layout == "bucketed" and self.shuffle is None:
            raise rule(
                "embed.layout",
                "layout: bucketed sorts rows by the order of shuffle, and there is no shuffle section",
                "add `shuffle: {}`, or remove layout",
            )
        if self.train is not None and self.train.kind == "sae" and self.train.data is None and self.optimize is None:
            raise rule(
                "train", "train needs data", "add embed, shuffle and optimize sections, or train.data: a dataset folder"
            )
        if self.limits.usd is not None and self.price == Price():
            raise rule(
                "limits.usd",
                "limits.usd cannot be reckoned without prices",
                "add `price: {gpu_hour: 2.5}`, or remove it",
            )
        if all(getattr(self, stage) is None for stage in STAGES):
            raise rule("", "no stage in this experiment", f"add one of: {', '.join(STAGES)}")
        return self

    @model_validator(mode="after")
    def _sweep_suits_what_it_trains(self) -> Experiment:
        if self.sweep is None or self.train is None:
            return self
        if self.sweep.stream == "each" and self.train.saes:
            raise rule(
                "sweep.stream",
                "train.saes share one reading of the dataset, sweep.stream: each does not",
                "use stream: shared, or sweep fields of train.sae instead of train.saes",
            )
        if self.train.imported is not None:
            raise rule("sweep", "train.imported is one finished dictionary: there is nothing to sweep", "remove it")
        if self.sweep.stream == "shared" and self.train.kind == "plm":
            raise rule(
                "sweep.stream", "stream: shared is for SAEs; language models train one after the other", "remove it"
            )
        return self

    @model_validator(mode="after")
    def _eval_has_what_it_scores(self) -> Experiment:
        if self.eval is None:
            return self
        if not self.has_dictionary:
            given = [axis for axis in OF_DICTIONARIES if self.eval.changed(axis)]
            why = "needs a train section" if self.train is None else "scores sparse autoencoders, and kind is plm"
            if given:
                raise rule(f"eval.{given[0]}", f"eval.{given[0]} {why}", "remove it; lm and representations need none")
            if not self.eval.of_models():
                remedy = "add `train:`, or eval.lm or eval.representations, or remove `eval:`"
                raise rule("eval", f"eval {why}", remedy)
        if self.train is None or self.train.kind != "plm":
            for name, axis in (("lm", self.eval.lm), ("representations", self.eval.representations)):
                if axis is not None and TRAINED in (axis.models or []):
                    raise rule(
                        f"eval.{name}.models", f"{TRAINED} is the model of train.kind: plm", "name another model"
                    )
        return self

    @model_validator(mode="after")
    def _search_has_its_figure(self) -> Experiment:
        optuna = None if self.sweep is None else self.sweep.optuna
        if optuna is None or self.train is None:
            return self
        field, metric = "sweep.optuna.metric", optuna.metric
        if self.train.kind == "plm" and metric != "loss":
            raise rule(field, f"a language model has no {metric}", "use metric: loss, the last validation's")
        if self.eval is None and metric not in ("fvu", "loss"):
            raise rule(field, f"{metric} is a figure of the evaluation, and there is no eval section", "add `eval: {}`")
        if metric.startswith("recovered") and self.eval is not None and not self.eval.fidelity.loss_recovered:
            raise rule(field, f"{metric} is not measured with eval.fidelity.loss_recovered: false", "use fvu")
        return self

    @model_validator(mode="after")
    def _eval_has_its_model(self) -> Experiment:
        if self.eval is None or self.embed is None or self.train is None or self.train.data is not None:
            return self
        imported = self.embed.imported
        if imported is not None and not imported.of_model:
            why, remedy = (
                "the model of imported activations is not known",
                "set embed.imported.of_model if it is model.weights",
            )
        elif imported is not None and self.embed.fasta is None:
            why, remedy = "the proteins of imported activations are not known", "add embed.fasta"
        else:
            return self
        if self.eval.fidelity.loss_recovered:
            raise rule(
                "eval.fidelity.loss_recovered",
                f"loss recovered runs the language model, and {why}",
                f"write loss_recovered: false, or {remedy}",
            )
        for axis in ("concepts", "families", "probes", "encode"):
            if getattr(self.eval, axis) is not None:
                raise rule(f"eval.{axis}", f"eval.{axis} runs the language model, and {why}", f"remove it, or {remedy}")
        return self

    @model_validator(mode="after")
    def _features_have_their_rows(self) -> Experiment:
        features = self.eval.features if self.eval is not None else None
        own = self.train is not None and self.train.data is None
        if features is not None and features.split == "train" and own and not self.keep.activations:
            raise rule(
                "eval.features.split",
                "eval.features reads activations that keep.activations: false gives up once the dataset is made",
                "use split: heldout, whose rows are in the dataset, or keep.activations: true",
            )
        return self

    @model_validator(mode="after")
    def _encoders_run_as_they_are(self) -> Experiment:
        if self.embed is not None and self.embed.compile is True and self.model.weights.startswith("hf:"):
            raise rule("embed.compile", "compile: true has no effect on hf: weights", "remove it")
        return self

    @model_validator(mode="after")
    def _eval_can_take_the_model_apart(self) -> Experiment:
        if self.eval is None or not self.model.weights.startswith("hf:"):
            return self
        if self.eval.fidelity.loss_recovered:
            raise rule(
                "eval.fidelity.loss_recovered",
                "loss recovered splices into the language model, which hf: weights do not allow",
                "write loss_recovered: false",
            )
        if self.eval.concepts is not None and "random_model" in self.eval.concepts.nulls:
            raise rule(
                "eval.concepts.nulls",
                "the null random_model needs an ESM-2 model, model.weights is an hf: encoder",
                "leave random_model out of eval.concepts.nulls",
            )
        return self

    @model_validator(mode="after")
    def _layer_is_embedded(self) -> Experiment:
        if self.train is None or self.embed is None or self.train.kind != "sae" or self.train.data is not None:
            return self
        layers = self.embed.layers
        if self.train.layer is None and len(layers) > 1:
            raise rule(
                "train", f"embed.layers has {len(layers)} layers: train.layer must name one", f"add layer: {layers[-1]}"
            )
        if self.train.layer is not None and self.train.layer not in layers:
            raise rule(
                "train.layer",
                f"train.layer {self.train.layer} is not in embed.layers {layers}",
                "embed it or train on another",
            )
        return self

    def training_layer(self) -> int:
        """The layer `train` reads (asserts that this experiment embeds)."""
        assert self.train is not None
        if self.train.layer is not None:
            return self.train.layer
        assert self.embed is not None
        return self.embed.layers[0]

    @property
    def has_dictionary(self) -> bool:
        """Whether it trains sparse autoencoders."""
        return self.train is not None and self.train.kind == "sae"

    @property
    def _scores_by_model(self) -> bool:
        """Whether an axis about dictionaries runs the language model."""
        if self.eval is None or not self.has_dictionary:
            return False
        axes = {axis for axis in OF_DICTIONARIES if getattr(self.eval, axis) is not None}
        return self.eval.fidelity.loss_recovered or axes != {"fidelity"}

    def language_models(self, axis: LanguageModels | Representations) -> list[str]:
        """The models that an axis of `eval` scores, as they were named."""
        if axis.models is not None:
            return axis.models
        return [TRAINED if self.train is not None and self.train.kind == "plm" else self.model.weights]

    def published_weights(self) -> list[str]:
        """The weights that a start reads, run folders apart: what is published and absent is downloaded first."""
        axes = self.eval.of_models() if self.eval is not None else []
        named = [weights for axis in axes for weights in self.language_models(axis)]
        own = [self.model.weights] if self.embed is not None or self._scores_by_model else []
        return list(dict.fromkeys([*own, *(weights for weights in named if weights.startswith("esm2_t"))]))

    def data_folder(self) -> str:
        """`data_root`, or `<root>/data`."""
        return (self.data_root or f"{self.root}/data").rstrip("/")

    @property
    def swept(self) -> bool:
        """Whether it trains many: the points of `sweep.grid`, the SAEs of `train.saes`, or both combined."""
        return self.sweep is not None or (self.train is not None and self.train.saes is not None)

    @property
    def shares_stream(self) -> bool:
        """Whether the many read the dataset together."""
        return self.swept and (self.sweep is None or self.sweep.stream == "shared")

    def stages(self) -> list[str]:
        """The stages this YAML contains, in pipeline order; where many are trained, by `sweep`, the base is not."""
        present = {stage for stage in STAGES if getattr(self, stage) is not None}
        if self.swept:
            present = present - {"train"} | {"sweep"}
        return [stage for stage in STAGES if stage in present]

    def dump(self) -> dict[str, Any]:
        """Every field with its value, as plain JSON."""
        return self.model_dump(mode="json")
