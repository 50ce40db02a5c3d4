"""`--bugfix`: small, local, still the same kind of experiment, and a fixed point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.config.bugfix import bugfix
from plmsae_cli.config.bugfix.layers import BUNDLED_LAYERS, spread
from plmsae_cli.config.bugfix.sizes import STEPS
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.overrides import points, trial
from plmsae_cli.config.templates import NAMES, full_template, template
from plmsae_cli.config.yaml import load

ASSETS = Path("/assets")
EXAMPLES = sorted((Path(__file__).parents[2] / "experiments").rglob("*.yaml"))
DATA = "embed: {fasta: s3://b/x.fasta, layers: [9, 18, 33]}\nshuffle: {memory: 64GB}\noptimize: {chunk: 4GB}\n"
VARIETY = {
    "remote": "root: /scratch\ndata_root: s3://b/data\nstorage: {endpoint_url: https://h, anonymous: true}\n"
    "launch: {gpus: 8, ranks: 8}\nwandb: {mode: online}\nmodel: {weights: esm2_t48_15B_UR50D}\n" + DATA,
    "three-layers": DATA + "train: {layer: 18, tokens: 2_000_000_000, dead_tokens: 10_000_000}\neval: {}\n",
    "finished-data": "train: {data: s3://public/d, sae: {num_latents: 65536, k: 256, k_aux: 512}}\neval: {}\n",
    "finished-data-and-layer": "train: {data: s3://public/d, layer: 33}\nsweep: {grid: {train.seed: [0, 1, 2]}}\n",
    "own-and-finished-data": DATA + "train: {data: s3://public/d, layer: 30}\n",
    "layers-swept": DATA + "train: {layer: 9}\nsweep: {grid: {train.layer: [33, 9, 18], train.lr: [auto, 1e-3]}}\n",
    "widths-swept": DATA + "train: {layer: 9}\n"
    "sweep: {grid: {train.sae.num_latents: [null, 10240, 40960], train.sae.k: [32, 64, 128]}}\n",
    "factors-swept": DATA + "train: {layer: 9}\nsweep: {grid: {train.sae.expansion: [8, 32], train.sae.k: [64, 32],"
    " train.batch_tokens: [4096, 8192], train.seed: [1, 2]}}\n",
    "drawn": DATA
    + "train: {layer: 9}\nsweep: {random: {space: {train.sae.k: {low: 16, high: 512}, train.seed: [3, 4]}}}\n",
    "chosen": DATA + "train: {layer: 9}\nsweep: {optuna: {space: {train.lr: {low: 1e-5, high: 1e-3, log: true}}}}\n",
    "small-already": DATA + "train: {layer: 9, sae: {k: 2, expansion: 2}}\nsweep: {grid: {train.sae.k: [1, 4]}}\n",
    "inputs-swept": DATA + "train: {layer: 9}\nsweep: {grid: {embed.fasta: [a, b], model.weights: [x, y]}}\n",
    "many-layers": "embed: {fasta: x, layers: [0, 4, 8, 12, 16, 20, 24, 28, 32, 33]}\nshuffle: {}\noptimize: {}\n"
    "train: {layer: 24}\n",
    "jumprelu": DATA + "train: {layer: 9, sae: {architecture: jumprelu, target_l0: 64, num_latents: 65536}}\n",
    "jumprelu-swept": DATA + "train: {layer: 9, kernels: fused, sae: {architecture: jumprelu, target_l0: 800}}\n"
    "sweep: {grid: {train.sae.target_l0: [64, 800], train.kernels: [fused, plain]}}\n",
    "switch": DATA + "train: {layer: 9, sae: {architecture: switch, k: 32, num_experts: 32}}\n"
    "sweep: {grid: {train.sae.num_experts: [8, 32, 128]}}\n",
    "annealed": DATA + "train: {layer: 9, sae: {k: 32, k_start: 512}}\nsweep: {grid: {train.sae.k_start: [64, 512]}}\n",
    "saes": DATA
    + "train: {layer: 9, sae: {expansion: 16}, saes: [{k: 32}, {k: 64, architecture: batch_topk}, {k: 8}]}\n",
    "saes-swept": DATA + "train: {layer: 9, saes: [{num_latents: 65536}, {k: 16, num_latents: 8192}]}\n"
    "sweep: {stream: shared, grid: {train.lr: [auto, 1e-3]}}\n",
    "plm": "train: {kind: plm, batch_tokens: 65536, plm: {fasta: s3://b/x, valid: {far: s3://b/y}, num_layers: 30,"
    " hidden_size: 640, num_attention_heads: 20}}\n",
    "unet": "train: {kind: plm, optimizer: muon, batch_tokens: 524288, plm: {architecture: unet, fasta: x, num_layers: 24,"
    " hidden_size: 768, pack_tokens: 65536, p_attention: true, num_att_tokens: 256, window: 512, mask_rate: 0.3,"
    " starting_mask_rate: 0.1, mask_rate_steps: 9000, objective: masked_diffusion, diffusion_warmup_steps: 2000,"
    " cooldown_steps: 5000, max_hours: 8, speedrun: {target_loss: 2.1, max_parameters: 150000000}}}\n"
    "sweep: {grid: {train.plm.window: [512, 1024, null], train.plm.lr_hidden: [auto, 0.02]}}\n",
    "plm-swept": "train: {kind: plm, batch_tokens: 32768, plm: {fasta: x}}\n"
    "sweep: {grid: {train.plm.num_layers: [6, 12], train.plm.hidden_size: [192, 384, 768]}}\n",
    "plm-batches-swept": "train: {kind: plm, batch_tokens: 32768, plm: {fasta: x}}\n"
    "sweep: {grid: {train.batch_tokens: [16384, 32768], train.plm.pack_tokens: [8192, 16384]}}\n",
    "embed-only": DATA,
    "bucketed": DATA.replace("33]", "33], layout: bucketed, shard: 16GB") + "train: {layer: 9}\n",
    "cpu": "launch: {gpus: 0}\nembed: {fasta: x, layers: [3], compute: float16, long: error, max_length: 10}\n",
    **{f"template-{name}": template(name) for name in NAMES},
    "template-full": full_template(),
    **{f"example-{path.stem}": path.read_text(encoding="utf-8") for path in EXAMPLES},
}


@pytest.fixture(params=sorted(VARIETY))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Experiment, Experiment]:
    path = tmp_path / "exp.yaml"
    path.write_text(VARIETY[request.param], encoding="utf-8")
    experiment = load(path).experiment
    return experiment, bugfix(experiment, ASSETS)


Pair = tuple[Experiment, Experiment]


def test_it_is_a_fixed_point(pair: Pair) -> None:
    assert bugfix(pair[1], ASSETS) == pair[1]


def test_it_reads_back_from_its_own_dump(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "cut.yaml"
    path.write_text(json.dumps(pair[1].dump()))
    assert load(path).experiment == pair[1]


def test_nothing_is_remote_or_outside(pair: Pair) -> None:
    cut = pair[1]
    assert "s3://" not in json.dumps(cut.dump())
    assert (cut.model.weights, cut.root, cut.data_root) == ("bundled", "runs/bugfix", None)
    assert cut.storage == Experiment.model_validate({"embed": {"fasta": "x", "layers": [1]}}).storage
    assert cut.wandb.mode != "online"
    inputs = [cut.embed.fasta] if cut.embed else []
    if cut.train and cut.train.plm:
        inputs += [cut.train.plm.fasta, *cut.train.plm.valid.values()]
    if cut.eval and cut.eval.lm:
        assert cut.eval.lm.bin is None
        inputs += [cut.eval.lm.fasta]
    assert set(inputs) == {"/assets/smoke.fasta.gz"}


def test_the_shape_is_kept(pair: Pair) -> None:
    before, after = pair
    assert after.name == before.name
    assert set(after.stages()) >= set(before.stages())
    assert set(after.stages()) - set(before.stages()) <= {"embed", "shuffle", "optimize"}
    assert after.shares_stream == before.shares_stream
    if before.train is not None:
        assert after.train is not None
        assert len(after.train.saes or []) == min(2, len(before.train.saes or []))
        assert after.train.kind == before.train.kind
        assert after.train.autoencoder().architecture == before.train.autoencoder().architecture
        assert after.train.autoencoder().fractions == before.train.autoencoder().fractions


def test_it_is_small_and_two_ranks_can_share_it(pair: Pair) -> None:
    cut = pair[1]
    assert (cut.launch.executor, cut.launch.ranks) == ("local", 2)
    assert cut.launch.gpus in (0, "auto")
    if cut.embed is not None:
        assert max(cut.embed.layers) <= BUNDLED_LAYERS
    if cut.train is None:
        return
    trials = [trial(cut, point) for point in points(cut)] if cut.swept else [cut]
    assert 1 <= len(trials) <= 4
    for experiment in trials:
        train = experiment.train
        assert train is not None
        steps = (train.tokens or 0) / train.batch_tokens
        assert 1 <= steps <= 4 * STEPS
        packs = train.batch_tokens if train.plm is None else train.batch_tokens // train.plm.pack_tokens
        if train.plm is None:
            assert packs % 2 == 0
            assert train.kernels == "auto", "there may be no GPU here"
            assert (train.autoencoder().target_l0 or 0) <= 8
            assert train.autoencoder().k <= 8 or not train.autoencoder().has("k")
            # A bundled model of at least 64 dimensions.
            assert train.autoencoder().k <= train.autoencoder().width(64) <= 1024
        else:
            assert train.plm.num_layers <= 2
            assert train.plm.hidden_size <= 32


def test_swept_values_stay_distinct(pair: Pair) -> None:
    before, after = pair
    if before.sweep is None:
        return
    assert after.sweep is not None
    doubled = 0
    search = after.sweep.random or after.sweep.optuna
    for values in (after.sweep.grid or {} if search is None else search.space).values():
        assert len(values) <= 2
        assert len({json.dumps(value) for value in values}) == len(values)
        doubled += len(values) == 2
    assert doubled >= 1


def test_layers_keep_their_order_and_training_follows(tmp_path: Path) -> None:
    path = tmp_path / "exp.yaml"
    path.write_text(DATA + "train: {layer: 18}\n")
    cut = bugfix(load(path).experiment, ASSETS)
    assert cut.embed is not None
    assert cut.train is not None
    assert len(cut.embed.layers) == 3
    assert cut.embed.layers == sorted(cut.embed.layers)
    assert cut.train.layer == cut.embed.layers[1]


@settings(deadline=None, max_examples=200)
@given(st.sets(st.integers(0, 60), min_size=1, max_size=12), st.integers(1, 12))
def test_spread(numbers: set[int], most: int) -> None:
    mapping = spread(numbers, most)
    images = [mapping[number] for number in sorted(numbers)]
    assert set(mapping) == numbers
    assert images == sorted(images)
    assert 0 <= images[0] <= images[-1] <= most
    if len(numbers) <= most + 1:
        assert len(set(images)) == len(numbers)
    assert spread(images, most) == {image: image for image in images}


def test_listed_saes_stay_distinct_and_fit_their_widths(tmp_path: Path) -> None:
    path = tmp_path / "exp.yaml"
    path.write_text(DATA + "train: {layer: 9, saes: [{k: 32}, {k: 64, num_latents: 65536}]}\n")
    cut = bugfix(load(path).experiment, ASSETS)
    assert cut.train is not None
    assert cut.train.saes == [{"k": 4}, {"k": 8, "num_latents": 1024, "expansion": None}]
