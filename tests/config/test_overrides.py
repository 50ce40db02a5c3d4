"""`--set` and sweeps: every path of the tree can be set, and only those."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ByteSize

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.overrides import apply, parse, points, trial
from plmsae_cli.config.tree import Entry, entries, locate, options, plain
from plmsae_cli.config.yaml import InvalidExperiment, load

SAE = (
    "embed: {fasta: x.fasta, layers: [24]}\nshuffle: {}\noptimize: {}\n"
    "train: {sae: {architecture: matryoshka_topk}}\nsweep: {grid: {train.seed: [0, 1]}}\n"
    "eval: {concepts: {annotations: a.tsv}, families: {proteins: a.fasta}, probes: {proteins: a.fasta},"
    " contacts: {structures: [a.pdb]}, encode: {fasta: a.fasta}, structure: {fasta: a.fasta},"
    " steering: {esmfold: random}}\n"
)
KINDS = [
    "architecture: matryoshka_topk", "architecture: batch_topk, k_start: 9", "architecture: jumprelu",
    "architecture: jumprelu, penalty: tanh", "architecture: relu_l1", "architecture: switch",
]  # fmt: skip
SPACE = "{train.lr: {low: 1e-5, high: 1e-3}}"
PLM = "train: {kind: plm, plm: {fasta: x.fasta, pack_tokens: 2048}}\n"
UNETS = [
    "train: {kind: plm, optimizer: muon, plm: {architecture: unet, fasta: x, pack_tokens: 2048, p_attention: true,"
    " starting_mask_rate: 0.1}}\n",
    "train: {kind: plm, plm: {architecture: unet, fasta: x, pack_tokens: 2048, objective: masked_diffusion}}\n",
    "train: {kind: plm, plm: {fasta: x, pack_tokens: 2048, speedrun: {target_loss: 2.1}}}\n",
    "train: {kind: plm, plm: {pack_tokens: 2048}}\n",
]
MODELS = [
    "eval: {lm: {fasta: x}}\n", "eval: {lm: {models: [bundled]}}\n", "eval: {representations: {tasks: [x.csv]}}\n",
    "eval: {representations: {tasks: [localisation], annotations: x}}\n",
]  # fmt: skip
SAMPLES: dict[Any, list[Any]] = {
    bool: [True, False], int: [2, 4096, 3, 24], float: [0.25, 3.5], str: ["some text"],
}  # fmt: skip
LEAVES = [path for path, entry in entries().items() if entry.section is None]


def candidates(entry: Entry) -> Iterator[Any]:
    """Values of the field's type, some of which suit the rest of the experiment."""
    special: dict[str, Any] = {
        "name": "a-name", "embed.layers": [3], "train.layer": 24, "train.sae.fractions": [0.25, 0.75],
        "train.betas": [0.5, 0.75], "train.plm.valid": {"a": "b.fasta"}, "sweep.grid": {"train.sae.k": [1, 2]},
        "eval.contacts.structures": ["a.pdb"], "eval.contacts.methods": ["head"], "eval.steering.strengths": [2.0],
        "eval.structure.structures": ["a.pdb"], "eval.structure.ids": ["T1024"], "eval.structure.modes": ["in_place"],
        "eval.structure.k": [4], "eval.structure.prefixes": "groups", "eval.steering.latents": [3],
        "eval.steering.residues": "active",
        "eval.concepts.nulls": ["pca"], "train.kind": "sae", "launch.slurm.options": {"qos": "high"},
        "train.plm.bin": "x.bin", "eval.lm.models": ["bundled"], "eval.lm.bin": "x.bin",
        "eval.representations.models": ["bundled"], "eval.representations.tasks": ["y.csv"],
        "eval.representations.layers": [1], "eval.representations.l2": [2.0],
        "launch.gpus": [0, 3],
        "sweep.random.space": {"train.lr": {"low": 1e-5, "high": 1e-4}},
        "sweep.optuna.space": {"train.seed": {"low": 0, "high": 99}},
        "train.saes": [{"k": 8}, {"k": 16, "architecture": "topk"}],
    }  # fmt: skip
    if entry.path in special:
        yield special[entry.path]
        return
    for kind, _ in options(entry.annotation, entry.metadata):
        if get_origin(kind) is Literal:
            yield from get_args(kind)
        elif kind is ByteSize:
            yield 123_000_000
        else:
            yield from SAMPLES[kind]


def reached(experiment: Experiment, path: str) -> Any:
    value: Any = experiment.dump()
    for key in path.split("."):
        value = value[key]
    return value


@pytest.mark.parametrize("path", LEAVES)
def test_every_field_can_be_set(path: str, tmp_path: Path) -> None:
    file = tmp_path / "exp.yaml"
    bodies = [PLM if path.startswith("train.plm") else SAE]
    if path == "train.saes":
        bodies = [SAE.replace("sweep: {", "sweep: {stream: shared, ")]
    if path.startswith(("sweep.random.", "sweep.optuna.")):
        bodies = [SAE.replace("grid: {train.seed: [0, 1]}", f"{path.split('.')[1]}: {{space: {SPACE}}}")]
    if path.startswith(("launch.ray.", "launch.slurm.")):
        bodies = [f"{SAE}launch: {{executor: {path.split('.')[1]}}}\n"]
    if path == "launch.nodes":
        bodies = [f"{SAE}launch: {{executor: slurm}}\n"]
    if path == "launch.rendezvous":
        bodies = [f"{SAE}launch: {{nodes: 2, rendezvous: 'a:1'}}\n"]
    if path.startswith("embed.imported."):
        bodies = [SAE.replace("embed: {", "embed: {imported: {path: acts, of_model: true}, ")]
    if path.startswith("train.imported."):
        bodies = ["embed: {fasta: x, layers: [24]}\nshuffle: {}\noptimize: {}\ntrain: {imported: {path: ae.pt}}\n"]
    if path == "embed.ordered_rows":
        bodies = [SAE.replace("layers: [24]", "layers: [24], layout: bucketed")]
    if path == "limits.usd":
        bodies = [f"{SAE}price: {{gpu_hour: 2.5}}\n"]
    if path == "train.cache_limit":
        bodies = [SAE.replace("train: {", "train: {cache: there, ")]
    if path.startswith("train.plm."):
        bodies += UNETS
    if path.startswith(("eval.lm", "eval.representations")):
        bodies = MODELS
    if path.startswith("train.sae."):
        bodies += [SAE.replace("architecture: matryoshka_topk", kind) for kind in KINDS]
    accepted = 0
    for body, value in product(bodies, candidates(entries()[path])):
        text = plain(value) if not isinstance(value, dict) else str(value)
        file.write_text(body)
        try:
            loaded = load(file, [f"{path}={text}"])
        except InvalidExperiment:
            continue
        assert reached(loaded.experiment, path) == value
        assert loaded.origins[path] == "--set"
        accepted += 1
    assert accepted > 0


@pytest.mark.parametrize("path", [path for path, entry in entries().items() if entry.nullable])
def test_null_stands_for_itself_where_it_may(path: str) -> None:
    data = apply({}, {path: None})
    for key in path.split("."):
        assert key in data
        data = data[key]
    assert data is None


def test_null_elsewhere_takes_the_default() -> None:
    assert apply({"train": {"seed": 3, "lr": 1.0}}, {"train.lr": None}) == {"train": {"seed": 3}}


def test_apply_copies_and_makes_sections() -> None:
    data = {"train": None, "embed": {"layers": [1]}}
    value = [1, 2]
    result = apply(data, {"train.sae.k": 8, "embed.layers": value, "eval": {}})
    assert result == {"train": {"sae": {"k": 8}}, "embed": {"layers": [1, 2]}, "eval": {}}
    value.append(3)
    assert (result["embed"]["layers"], data) == ([1, 2], {"train": None, "embed": {"layers": [1]}})


def test_apply_through_a_value_is_an_error() -> None:
    with pytest.raises(UserError, match="train is not a section"):
        apply({"train": 5}, {"train.lr": 1.0})


def test_free_keys_take_the_rest_of_the_path() -> None:
    assert locate("sweep.grid.train.sae.k") == ("sweep", "grid", "train.sae.k")
    assert apply({}, {"train.plm.valid.far": "x.fasta"}) == {"train": {"plm": {"valid": {"far": "x.fasta"}}}}
    assert locate("sweep.grid.") is None


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(sorted(entries())), st.integers(-(2**40), 2**40) | st.floats(-1e9, 1e9) | st.booleans())
def test_values_are_yaml(path: str, value: float | int | bool) -> None:
    name, read = parse(f"{path} = {plain(value)}")
    assert (name, read, type(read)) == (path, value, type(value))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("train.lr=1e-4", 1e-4), ("train.tokens=2_000_000", 2_000_000), ("wandb.mode=off", "off"),
        ("embed.layers=[12, 24]", [12, 24]), ("eval={}", {}), ("eval=null", None), ("root=a=b", "a=b"),
        ("embed.fasta=s3://bucket/x.fasta", "s3://bucket/x.fasta"), ("name='7'", "7"),
    ],
)  # fmt: skip
def test_parsed_values(argument: str, value: Any) -> None:
    read = parse(argument)[1]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("argument", "message", "hint"),
    [
        ("train.lr", "train.lr: must be path=value", "as in --set train.lr=1e-4"),
        ("=3", "must be path=value", "as in --set train.lr=1e-4"),
        ("train.lr=", "train.lr: no value behind the =", "null takes the default, or switches a section off"),
        ("train.lr=[1", "train.lr: a list is not closed", "end it with `]`, with commas between the values"),
        ("train.lr=!!x 1", "train.lr: YAML tags have no meaning here", "remove the word that begins with `!`"),
        ("train.k=3", "train.k: unknown path", "did you mean train.sae.k?"),
        ("trian.lr=3", "trian.lr: unknown path", "did you mean train.lr?"),
        ("train.sae.kk=3", "train.sae.kk: unknown path", "did you mean train.sae.k?"),
        ("lr=3", "lr: unknown path", "did you mean train.lr?"),
        ("train.lr.x=3", "train.lr.x: unknown path", "did you mean train.lr?"),
        ("train.sea.num_latent=3", "train.sea.num_latent: unknown path", "did you mean train.sae.num_latents?"),
        ("batch_size=3", "batch_size: unknown path", "did you mean train.batch_tokens?"),
        ("eval.fidelity.wibble=1", "eval.fidelity.wibble: unknown path",
         "keys of eval.fidelity: loss_recovered, mask_rate, proteins, batch_tokens"),
    ],
)  # fmt: skip
def test_malformed_arguments(argument: str, message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(argument)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_later_arguments_win(tmp_path: Path) -> None:
    file = tmp_path / "exp.yaml"
    file.write_text(SAE)
    train = load(file, ["train.lr=1e-3", "train.sae.k=4", "train.lr=1e-4", "train.sae={}"]).experiment.train
    assert train is not None
    assert train.sae is not None
    assert (train.lr, train.sae.k) == (1e-4, 64)


def test_every_field_has_a_help() -> None:
    assert {"train", "train.sae", "train.sae.k", "eval.fidelity.proteins"} <= set(entries())
    assert all(entry.help for entry in entries().values())


def test_points_are_the_product_and_trials_are_experiments(tmp_path: Path) -> None:
    file = tmp_path / "exp.yaml"
    file.write_text(SAE.replace("train.seed: [0, 1]", "train.sae.k: [16, 32], train.lr: [auto, 1e-3, 1e-4]"))
    experiment = load(file).experiment
    found = list(points(experiment))
    assert [tuple(point.values()) for point in found] == [
        (k, lr) for k in (16, 32) for lr in ("auto", 1e-3, 1e-4)
    ]  # fmt: skip
    one = trial(experiment, found[4])
    assert one.sweep is None
    assert one.train is not None
    assert (one.train.autoencoder().k, one.train.lr) == (32, 1e-3)
    assert one.model_copy(update={"train": None, "sweep": None}) == experiment.model_copy(
        update={"train": None, "sweep": None}
    )
