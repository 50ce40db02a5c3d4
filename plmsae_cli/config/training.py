"""The section that trains, for every kind of model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from plmsae_cli.config.base import ADDED, SCIENCE, Auto, Bytes, Count, Fraction, Positive, Section, Share, Whole, rule
from plmsae_cli.config.imported import ImportedSAE
from plmsae_cli.config.plm import PLM
from plmsae_cli.config.sae import SAE

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
CACHE_LIMIT = 10**12
"""Default of `train.cache_limit` in bytes."""


class Train(Section):
    """One training run."""

    kind: Annotated[Literal["sae", "plm"], SCIENCE] = "sae"
    """`sae`: a sparse autoencoder on the optimized dataset. `plm`: a protein language model on a FASTA."""
    data: str | None = None
    """A finished dataset folder, local or `s3://`, instead of this experiment's own `optimize`."""
    loader: Literal["blocks", "litdata"] = "blocks"
    """What reads the dataset: `blocks`, our threads; `litdata`, LitData's own loader (`pip install plmsae[litdata]`, local
    folders), with another order on several ranks and in later epochs."""
    cache: str | None = None
    """Local folder, best on an NVMe disk, that keeps what is read from an `s3://` dataset: for several epochs, and for several
    trainers on one machine."""
    cache_limit: Bytes = Field(default="1TB", validate_default=True)
    """Most bytes in `cache`; when it is full, what it has stays."""
    layer: Whole | None = None
    """Which embedded layer to train on; optional where `embed.layers` has one."""
    seed: Annotated[Seed, SCIENCE] = 0
    """Seed of the initialisation and of later epochs' block order; touches no data."""
    sae: Annotated[SAE | None, SCIENCE] = None
    """Options of `kind: sae`."""
    saes: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    """Several SAEs instead of one, trained side by side on one reading of the dataset: what each has other than `sae`, such
    as `[{k: 32}, {k: 64, architecture: batch_topk}]`."""
    imported: Annotated[ImportedSAE | None, ADDED] = None
    """Take a dictionary of another project instead of training one: only its latents' maxima are measured on the dataset."""
    plm: Annotated[PLM | None, SCIENCE] = None
    """Options of `kind: plm`."""
    tokens: Annotated[Count | None, SCIENCE] = None
    """Tokens (residues) to train on; default one epoch. More than the dataset holds means several epochs."""
    batch_tokens: Annotated[Count, SCIENCE] = 8192
    """Tokens of one step over ALL ranks."""
    optimizer: Annotated[Literal["adam", "muon", "signum"], SCIENCE] = "adam"
    """`adam`; `muon`: matrices by their orthogonalised momentum (Jordan et al. 2024), the rest by Adam; of a pLM the matrices
    of its blocks; `signum`: the sign of a momentum (Bernstein et al. 2018), which keeps half of Adam's state."""
    lr: Annotated[Auto | Positive, SCIENCE] = "auto"
    """Peak learning rate. `auto` for an SAE: 2e-4 / sqrt(num_latents / 2^14) (Gao et al. 2024), with `adam` at least
    min(10 / steps, .02) / sqrt(d), which short runs need; with `muon` 2e-3; for a pLM: 1e-3, with `signum` 1e-4, with `muon`
    see `plm.lr_hidden` and its like."""
    lr_warmup_steps: Annotated[Auto | Whole, SCIENCE] = "auto"
    """Steps of linear warm-up; `auto` is the smaller of 1,000 and a twentieth of the run."""
    lr_decay: Annotated[Share, SCIENCE] = 0.2
    """Last share of the run over which the rate falls linearly to zero."""
    betas: Annotated[Annotated[list[Fraction], Field(min_length=2, max_length=2)], SCIENCE] = [0.9, 0.999]
    """Adam's decay rates; with `optimizer: muon`, of all that is not a matrix."""
    eps: Annotated[Positive, SCIENCE] = 6.25e-10
    """Adam's epsilon."""
    moments: Annotated[Literal["float32", "bfloat16"], SCIENCE] = "float32"
    """What `optimizer: adam` keeps its moments in; `bfloat16`, rounded at random without bias, is half as large."""
    momentum: Annotated[Auto | Fraction, SCIENCE] = "auto"
    """Decay rate of the momentum of `muon` (`auto`: .95) and `signum` (`auto`: .9)."""
    grad_clip: Annotated[Positive | None, SCIENCE] = 1.0
    """Largest norm of the gradient over all parameters; null leaves gradients alone. SAE: of the gradient of the
    squared error summed over dimensions and averaged over tokens, the unit in which papers write the loss."""
    dead_tokens: Annotated[Auto | Count, SCIENCE] = "auto"
    """Tokens without firing after which a latent counts as dead; `auto` is min(10 M, a tenth of the run)."""
    compute: Annotated[Auto | Literal["float32", "bfloat16"], SCIENCE] = "auto"
    """Arithmetic of the forward and backward; masters are float32. `auto` is bfloat16 on GPUs that have it."""
    kernels: Literal["auto", "fused", "plain"] = "auto"
    """The training step of an SAE: `fused` CUDA kernels (TopK, BatchTopK and their Matryoshkas, on one GPU also
    JumpReLU with `penalty: l0` and Switch, with Adam in bfloat16), `plain` PyTorch, or the fused one where it can be."""
    compile: bool = True
    """Compile the passes of a pLM, and of SAEs without fused kernels where that is faster, on a GPU (torch.compile); false is
    slower and takes more memory, for a version of torch whose compiler is at fault."""
    parallel: Literal["auto", "data", "latents"] = "auto"
    """How several ranks share an SAE: `data`, the tokens of a batch; `latents`, the dictionary (TopK and its Matryoshka),
    which sends activations instead of gradients; `auto` is `data` unless kernels are fused and `latents` sends at most a
    third."""
    log_every: Count = 50
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: Count = 1000
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept; at least two, so that a damaged one costs little."""
    profile: bool = False
    """Look into ten steps after the first ten, on the first rank: trace, table and bottleneck in the run's `profile/`."""

    @model_validator(mode="after")
    def _kind_has_its_options(self) -> Train:
        if self.kind == "plm":
            if self.plm is None:
                raise rule("plm", "kind: plm needs a plm section", "add `plm: {fasta: proteins.fasta.gz}`")
            for name in ("sae", "saes"):
                if getattr(self, name) is not None:
                    raise rule(name, f"{name} has no effect with kind: plm", "remove one of the two")
            if self.batch_tokens % self.plm.pack_tokens:
                raise rule(
                    "batch_tokens",
                    f"batch_tokens ({self.batch_tokens}) is not a multiple of plm.pack_tokens ({self.plm.pack_tokens})",
                    f"nearest: {max(1, round(self.batch_tokens / self.plm.pack_tokens)) * self.plm.pack_tokens}",
                )
            if self.parallel != "auto":
                raise rule("parallel", "parallel has no effect with kind: plm", "remove it")
            if self.optimizer != "muon" and self.plm.changed("muon_momentum_warmup_steps"):
                raise rule(
                    "plm.muon_momentum_warmup_steps",
                    f"muon_momentum_warmup_steps has no effect with optimizer: {self.optimizer}",
                    "set optimizer: muon or remove it",
                )
            if self.plm.cooldown_steps is not None and self.changed("lr_decay"):
                raise rule("lr_decay", "plm.cooldown_steps says how long the rate falls", "remove one of the two")
        elif self.plm is not None:
            raise rule("plm", "a plm section has no effect with kind: sae", "set kind: plm or remove it")
        return self

    @model_validator(mode="after")
    def _imported_is_not_trained(self) -> Train:
        if self.imported is not None:
            for name in type(self).model_fields:
                if name not in ("data", "layer", "imported", "cache_limit") and self.changed(name):
                    raise rule(
                        name, f"{name} has no effect on train.imported, which is not trained", "remove one of the two"
                    )
        return self

    @model_validator(mode="after")
    def _latents_can_be_shared(self) -> Train:
        kind = self.autoencoder().architecture
        if self.parallel == "latents" and self.kind == "sae" and kind not in ("topk", "matryoshka_topk"):
            raise rule("parallel", f"parallel: latents has no way to share {kind}", "use data, or architecture: topk")
        if self.parallel == "latents" and self.optimizer == "muon":
            raise rule("parallel", "parallel: latents splits the matrices that muon needs whole", "use data, or adam")
        return self

    @model_validator(mode="after")
    def _options_of_the_loader(self) -> Train:
        for name in ("loader", "cache"):
            if self.kind == "plm" and self.changed(name):
                raise rule(name, f"{name} has no effect with kind: plm", "remove it")
        if self.cache is None and int(self.cache_limit) != CACHE_LIMIT:
            raise rule("cache_limit", "cache_limit has no effect without cache", "remove it or name a cache folder")
        if self.cache is not None and (self.loader == "litdata" or self.cache.startswith("s3://")):
            why = "with loader: litdata" if self.loader == "litdata" else "in S3: it is a local folder"
            raise rule("cache", f"cache has no effect {why}", "remove it")
        return self

    @model_validator(mode="after")
    def _options_of_the_optimizer(self) -> Train:
        if self.optimizer == "adam" and self.momentum != "auto":
            raise rule("momentum", "momentum has no effect with optimizer: adam", "set betas, or another optimizer")
        if self.optimizer != "adam" and self.moments != "float32":
            raise rule(
                "moments",
                f"moments: {self.moments} has no effect with optimizer: {self.optimizer}",
                "use optimizer: adam",
            )
        for name in ("betas", "eps"):
            if self.optimizer == "signum" and self.changed(name):
                raise rule(name, f"{name} has no effect with optimizer: signum", "set momentum, or another optimizer")
        return self

    def steps(self, per_epoch: int) -> int:
        """Steps of an SAE's run: `tokens` in whole batches, or one epoch."""
        return per_epoch if self.tokens is None else max(1, self.tokens // self.batch_tokens)

    def autoencoder(self) -> SAE:
        """The SAE's options, defaults where the section is absent."""
        return self.sae or SAE()
