"""Options of `train.kind: sae`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import model_validator

from plmsae_cli.config.base import ADDED, SCIENCE, Count, NotNegative, Positive, Section, Share, rule

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
    "relu_l1": (*_PENALTY, "unit_rows", "error"),
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
    start (architectures with `k`); `auto`: the one of these that suits the data; `data`: directions of residues from their
    centre, fitted."""
    k: Annotated[Count, SCIENCE] = 64
    """Active latents a token (L0); `batch_topk`: their mean."""
    k_aux: Annotated[Count | None, SCIENCE] = None
    """Dead latents that AuxK revives at once; default: half the activations' dimension."""
    aux_coefficient: Annotated[NotNegative, SCIENCE] = 1 / 32
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
    """Weight of the sparsity penalty as in the papers; default: `relu_l1` and `gated` 5 (L1; with `error: norm`
    .08), `jumprelu` 6e-4 (L0), 1 (with `target_l0`) or 5 (`penalty: tanh`)."""
    sparsity_warmup: Annotated[Share | None, SCIENCE] = None
    """Share of the run in which the penalty's weight rises linearly; default 0.05, with `penalty: tanh` 1."""
    penalty: Annotated[Literal["l0", "tanh"] | None, SCIENCE] = None
    """JumpReLU only: the number of active latents (`l0`, default, Rajamanoharan et al. 2024) or tanh of their
    activation and a pre-activation term (`tanh`, Anthropic, January 2025)."""
    target_l0: Annotated[Positive | None, SCIENCE] = None
    """JumpReLU with `penalty: l0` only: penalise the squared relative distance of L0 from this, at most the number of
    latents; default: L0 itself."""
    bandwidth: Annotated[Positive | None, SCIENCE] = None
    """JumpReLU only: width of the window around the threshold in which it gets a gradient, for inputs with mean
    square 1; default 1e-3 sqrt(d), with `penalty: tanh` 2."""
    theta_start: Annotated[Positive | None, SCIENCE] = None
    """JumpReLU only: thresholds at the start; default 1e-3 sqrt(d), with `penalty: tanh` 0.1."""
    tanh_scale: Annotated[Positive | None, SCIENCE] = None
    """JumpReLU with `penalty: tanh` only: c in tanh(c z); default 4."""
    pre_act_coefficient: Annotated[NotNegative | None, SCIENCE] = None
    """JumpReLU with `penalty: tanh` only: weight of the pre-activation term; default 3e-6."""
    unit_rows: Annotated[bool | None, SCIENCE] = None
    """`relu_l1` only: keep decoder rows at norm 1, as InterPLM does; default false (Anthropic, April 2024)."""
    error: Annotated[Literal["squared", "norm"] | None, ADDED] = None
    """`relu_l1` only: minimise a residue's squared error (default), or its length, `norm`, as InterPLM does."""
    num_experts: Annotated[Count | None, SCIENCE] = None
    """`switch` only: experts that share the latents equally; default 8."""
    balance_coefficient: Annotated[NotNegative | None, SCIENCE] = None
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
        if self.init == "fitted" and not self.has("k"):
            why = "its thresholds choose what is active"
            raise rule("init", f"init: fitted has no effect with architecture: {self.architecture}: {why}", "remove it")
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
