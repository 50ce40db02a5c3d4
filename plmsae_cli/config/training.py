"""The sections that train: the sparse autoencoder, the protein language model, the loop."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from plmsae_cli.config.base import SCIENCE, Auto, Bytes, Count, Fraction, Section, rule

Positive = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
CACHE_LIMIT = 10**12
"""Default of `train.cache_limit` in bytes."""


_TOPK = ("k", "k_aux", "aux_coefficient", "k_start", "k_anneal")
_PENALTY = ("sparsity_coefficient", "sparsity_warmup")
_TANH = ("tanh_scale", "pre_act_coefficient")
# Which of SAE's fields each architecture has.
OPTIONS: dict[str, tuple[str, ...]] = {
    "topk": _TOPK,
    "multi_topk": _TOPK,
    "matryoshka_topk": (*_TOPK, "fractions"),
    "batch_topk": (*_TOPK, "selection"),
    "matryoshka_batch_topk": (*_TOPK, "selection", "fractions"),
    "jumprelu": (*_PENALTY, "penalty", "target_l0", "bandwidth", "theta_start", *_TANH),
    "gated": _PENALTY,
    "relu_l1": (*_PENALTY, "unit_rows"),
    "switch": ("k", "num_experts", "balance_coefficient"),
}


class SAE(Section):
    """The dictionary: what kind, how wide, how sparse."""

    architecture: Annotated[
        Literal[
            "topk", "multi_topk", "matryoshka_topk", "batch_topk", "matryoshka_batch_topk", "jumprelu", "gated",
            "relu_l1", "switch",
        ],
        SCIENCE,
    ] = "topk"  # fmt: skip
    """`topk`: the k largest latents of each token (Gao et al. 2024). `multi_topk`: the same, trained to be good with
    4 k too. `batch_topk`: k a token on average over the batch, then a threshold. `matryoshka_topk` and
    `matryoshka_batch_topk`: either with nested prefixes that each reconstruct alone. `jumprelu`, `gated`, `relu_l1`: a
    penalty instead of k. `switch`: TopK in one of several experts, chosen by token."""
    expansion: Annotated[Positive | None, SCIENCE] = None
    """Latents per dimension of the activations; 8 when neither this nor `num_latents` is given."""
    num_latents: Annotated[Count | None, SCIENCE] = None
    """Number of latents, instead of `expansion`."""
    init: Annotated[Literal["auto", "random", "fitted", "data"], SCIENCE] = "auto"
    """Where rows start: `random` directions, W_enc = W_dec; `fitted`: the same, W_enc scaled to the least error at the
    start; `auto`: the one of these that suits the data; `data`: directions of residues from their centre, fitted."""
    k: Annotated[Count, SCIENCE] = 64
    """Active latents a token (L0); `batch_topk`: their mean."""
    k_aux: Annotated[Count | None, SCIENCE] = None
    """Dead latents that AuxK revives at once; default: half the activations' dimension."""
    aux_coefficient: Annotated[float, Field(ge=0.0), SCIENCE] = 1 / 32
    """Weight of the AuxK loss; 0 switches it off."""
    aux_fitted: Annotated[bool, SCIENCE] = True
    """Whether AuxK fits the length of what dead latents reconstruct before comparing it; `false` is Gao et al.'s."""
    fractions: Annotated[list[Positive] | None, SCIENCE] = None
    """Matryoshka only: each group's share of the latents, summing to 1; default 1/16, 1/16, 1/8, 1/4, 1/2."""
    k_start: Annotated[Count | None, SCIENCE] = None
    """Active latents at the first step, from which training goes linearly to `k`; default: `k` throughout."""
    k_anneal: Annotated[Share | None, SCIENCE] = None
    """Share of the run in which `k_start` becomes `k`; default 0.1."""
    selection: Annotated[Literal["global", "local"] | None, SCIENCE] = None
    """BatchTopK only: choose latents over the batch of all ranks (`global`, default) or each rank by itself (`local`)."""
    sparsity_coefficient: Annotated[Positive | None, SCIENCE] = None
    """Weight of the sparsity penalty as in the papers; default: `relu_l1` and `gated` 5 (L1), `jumprelu` 6e-4 (L0),
    1 (with `target_l0`) or 5 (`penalty: tanh`)."""
    sparsity_warmup: Annotated[Share | None, SCIENCE] = None
    """Share of the run in which the penalty's weight rises linearly; default 0.05, with `penalty: tanh` 1."""
    penalty: Annotated[Literal["l0", "tanh"] | None, SCIENCE] = None
    """JumpReLU only: the number of active latents (`l0`, default, Rajamanoharan et al. 2024) or tanh of their
    activation and a pre-activation term (`tanh`, Anthropic, January 2025)."""
    target_l0: Annotated[Positive | None, SCIENCE] = None
    """JumpReLU with `penalty: l0` only: penalise the squared relative distance of L0 from this; default: L0 itself."""
    bandwidth: Annotated[Positive | None, SCIENCE] = None
    """JumpReLU only: width of the window around the threshold in which it gets a gradient, for inputs with mean
    square 1; default 1e-3 sqrt(d), with `penalty: tanh` 2."""
    theta_start: Annotated[Positive | None, SCIENCE] = None
    """JumpReLU only: thresholds at the start; default 1e-3 sqrt(d), with `penalty: tanh` 0.1."""
    tanh_scale: Annotated[Positive | None, SCIENCE] = None
    """JumpReLU with `penalty: tanh` only: c in tanh(c z); default 4."""
    pre_act_coefficient: Annotated[Annotated[float, Field(ge=0.0)] | None, SCIENCE] = None
    """JumpReLU with `penalty: tanh` only: weight of the pre-activation term; default 3e-6."""
    unit_rows: Annotated[bool | None, SCIENCE] = None
    """`relu_l1` only: keep decoder rows at norm 1, as InterPLM does; default false (Anthropic, April 2024)."""
    num_experts: Annotated[Count | None, SCIENCE] = None
    """`switch` only: experts that share the latents equally; default 8."""
    balance_coefficient: Annotated[Annotated[float, Field(ge=0.0)] | None, SCIENCE] = None
    """`switch` only: weight of the experts' load balance beside the squared error a dimension; default 3."""

    @model_validator(mode="after")
    def _one_width(self) -> SAE:
        if self.expansion is not None and self.num_latents is not None:
            raise rule(
                "num_latents", "expansion and num_latents both set the dictionary's width", "keep one of the two"
            )
        if self.num_latents is not None and self.has("k") and self.k > self.num_latents:
            raise rule(
                "k", f"k ({self.k}) is larger than num_latents ({self.num_latents})", "lower k or raise num_latents"
            )
        return self

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> SAE:
        for name in dict.fromkeys(name for names in OPTIONS.values() for name in names):
            if not self.has(name) and self.changed(name):
                having = ", ".join(kind for kind, names in OPTIONS.items() if name in names)
                raise rule(
                    name,
                    f"{name} has no effect with architecture: {self.architecture}",
                    f"remove it or use architecture: {having}",
                )
        if not self.aux_fitted and not (self.has("aux_coefficient") and self.aux_coefficient):
            raise rule("aux_fitted", "aux_fitted has no effect without AuxK", "remove it, or set aux_coefficient")
        if self.k_anneal is not None and self.k_start is None:
            raise rule("k_anneal", "k_anneal has no effect without k_start", "remove it or add k_start")
        without = ("target_l0",) if self.penalty == "tanh" else _TANH
        for name in without if self.architecture == "jumprelu" else ():
            if getattr(self, name) is not None:
                other = "l0" if self.penalty == "tanh" else "tanh"
                raise rule(
                    name,
                    f"{name} has no effect with penalty: {self.penalty or 'l0'}",
                    f"remove it or use penalty: {other}",
                )
        return self

    @model_validator(mode="after")
    def _fractions_are_shares(self) -> SAE:
        if self.fractions is not None and abs(sum(self.fractions) - 1.0) > 1e-3:
            raise rule(
                "fractions",
                f"fractions sum to {sum(self.fractions):.4f}, not 1",
                "each is one group's share of the latents",
            )
        return self

    def has(self, name: str) -> bool:
        """Whether the architecture has the option of this name."""
        return name in OPTIONS[self.architecture]

    def options(self) -> dict[str, Any]:
        """The architecture's options by the names of its constructor, those left to its defaults absent."""
        values = {name: getattr(self, name) for name in OPTIONS[self.architecture]}
        return {name: value for name, value in values.items() if value is not None}

    def width(self, d: int) -> int:
        """Number of latents for activations of dimension `d`."""
        return self.num_latents if self.num_latents is not None else round((self.expansion or 8.0) * d)


class PLM(Section):
    """A protein language model trained from scratch (`train.kind: plm`)."""

    architecture: Annotated[Literal["esm2"], SCIENCE] = "esm2"
    """`esm2`: the ESM-2 encoder, so that `embed` reads the result."""
    fasta: str
    """Proteins to train on; split by the hash that `embed` uses."""
    valid: dict[str, str] = Field(default_factory=dict)
    """Further validation sets by name (such as held-out clusters): FASTA files that are never trained on."""
    num_layers: Annotated[Count, SCIENCE] = 6
    """Transformer blocks."""
    hidden_size: Annotated[Count, SCIENCE] = 192
    """Dimension of the residual stream."""
    num_attention_heads: Annotated[Count, SCIENCE] = 6
    """Heads a block; must divide `hidden_size` into even parts."""
    max_length: Annotated[Count, SCIENCE] = 1022
    """Longest protein in residues; longer ones are truncated."""
    holdout: Annotated[Fraction, SCIENCE] = 0.01
    """Share of the proteins kept for validation, by the hash of the sequence."""
    mask_rate: Annotated[Annotated[float, Field(gt=0.0, lt=1.0)], SCIENCE] = 0.15
    """Share of the residues to predict."""
    corruption: Annotated[Literal["bert", "mask"], SCIENCE] = "bert"
    """Chosen residues become: `bert` 80 % <mask>, 10 % random, 10 % kept; `mask` 100 % <mask>."""
    weight_decay: Annotated[float, Field(ge=0.0), SCIENCE] = 0.01
    """Decoupled weight decay of the matrices."""
    pack_tokens: Annotated[Count, SCIENCE] = 16_384
    """Tokens of one pack (micro-batch); `train.batch_tokens` is a multiple of it."""
    eval_every: Count = 1000
    """Steps between validations."""
    eval_tokens: Count = 1_000_000
    """Tokens of each validation set that are scored, with masks that never change."""

    @model_validator(mode="after")
    def _shapes(self) -> PLM:
        if self.hidden_size % self.num_attention_heads or (self.hidden_size // self.num_attention_heads) % 2:
            raise rule(
                "num_attention_heads",
                f"hidden_size ({self.hidden_size}) does not split into {self.num_attention_heads} heads of even width",
                "rotary embeddings need hidden_size / num_attention_heads to be an even number",
            )
        if self.pack_tokens < self.max_length + 2:
            raise rule(
                "pack_tokens",
                f"pack_tokens ({self.pack_tokens}) cannot hold one protein of max_length ({self.max_length}) + 2",
                "raise pack_tokens or lower max_length",
            )
        return self


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
    layer: Annotated[int, Field(ge=0)] | None = None
    """Which embedded layer to train on; optional where `embed.layers` has one."""
    seed: Annotated[int, SCIENCE] = 0
    """Seed of the initialisation and of later epochs' block order; touches no data."""
    sae: Annotated[SAE | None, SCIENCE] = None
    """Options of `kind: sae`."""
    saes: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    """Several SAEs instead of one, trained side by side on one reading of the dataset: what each has other than `sae`, such
    as `[{k: 32}, {k: 64, architecture: batch_topk}]`."""
    plm: Annotated[PLM | None, SCIENCE] = None
    """Options of `kind: plm`."""
    tokens: Annotated[Count | None, SCIENCE] = None
    """Tokens (residues) to train on; default one epoch. More than the dataset holds means several epochs."""
    batch_tokens: Annotated[Count, SCIENCE] = 8192
    """Tokens of one step over ALL ranks."""
    optimizer: Annotated[Literal["adam", "muon", "signum"], SCIENCE] = "adam"
    """`adam`; `muon`: matrices by their orthogonalised momentum (Jordan et al. 2024), the rest by Adam; `signum`: the sign of
    a momentum (Bernstein et al. 2018), which keeps half of Adam's state."""
    lr: Annotated[Auto | Positive, SCIENCE] = "auto"
    """Peak learning rate. `auto` for an SAE: 2e-4 / sqrt(num_latents / 2^14) (Gao et al. 2024; low for short runs), with
    `muon` 2e-3; for a pLM: 1e-3, with `signum` 1e-4."""
    lr_warmup_steps: Annotated[Auto | Annotated[int, Field(ge=0)], SCIENCE] = "auto"
    """Steps of linear warm-up; `auto` is the smaller of 1,000 and a twentieth of the run."""
    lr_decay: Annotated[Annotated[float, Field(ge=0.0, le=1.0)], SCIENCE] = 0.2
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
    """The training step of an SAE: `fused` CUDA kernels (TopK, BatchTopK and their Matryoshkas with Adam in
    bfloat16), `plain` PyTorch, or the fused one where it can be."""
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
        elif self.plm is not None:
            raise rule("plm", "a plm section has no effect with kind: sae", "set kind: plm or remove it")
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
