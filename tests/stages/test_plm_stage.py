"""train, kind plm: tokens, ranks, resuming, learning, and a result that embed reads."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.pipeline import Done, plan_stage
from plmsae_cli.plm.alphabet import AMINO_ACIDS, decode, encode, pack, wrap
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted
from plmsae_cli.stages import tokens
from plmsae_cli.store.activations import ActivationShards
from plmsae_cli.store.checkpoint import load_newest
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import verify
from plmsae_cli.store.proteins import read_proteins
from plmsae_cli.store.tokens import TokenStream, open_tokens
from plmsae_cli.store.weights import load_state, resolve_weights
from plmsae_cli.training import loop
from plmsae_cli.training.agreed import AGREE_EVERY
from plmsae_cli.training.packs import Packs
from plmsae_cli.training.plm_objective import PLMObjective

Go = Callable[..., Done]
CLOCK = {"tokens_per_second", "loader_wait", "step_ms", "loader_share", "train_seconds"}


@pytest.fixture(scope="session")
def repeats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 proteins that each walk one and the same circle of the 20 amino acids, from anywhere on it."""
    rng = np.random.default_rng(0)
    circle = "".join(rng.permutation(list(AMINO_ACIDS))) * 4
    path = tmp_path_factory.mktemp("repeats") / "repeats.fasta"
    starts, lengths = rng.integers(0, 20, 300), rng.integers(12, 60, 300)
    lines = [f">p{i}\n{circle[s : s + n]}\n" for i, (s, n) in enumerate(zip(starts, lengths, strict=True))]
    path.write_text("".join(lines))
    return path


@pytest.fixture
def plm(tmp_path: Path, repeats: Path) -> Callable[..., Experiment]:
    """A tiny language model on the repeats; keywords change `train`, `plm__x` its plm section, `run__x` the rest."""

    def make(name: str = "plm", **changes: Any) -> Experiment:
        section = {
            "fasta": str(repeats), "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "max_length": 60,
            "holdout": 0.1, "pack_tokens": 256, "eval_every": 4, "eval_tokens": 1024,
        }  # fmt: skip
        train = {
            "kind": "plm", "batch_tokens": 512, "tokens": 512 * 12, "lr": 3e-3, "log_every": 1, "checkpoint_every": 5,
            "lr_warmup_steps": 2,
        }  # fmt: skip
        rest: dict[str, Any] = {}
        for key, value in changes.items():
            place, _, field = key.rpartition("__")
            {"": train, "plm": section, "run": rest}[place][field] = value
        root = str(tmp_path / "runs")
        return Experiment.model_validate({"name": name, "root": root, "train": {**train, "plm": section}, **rest})

    return make


Plm = Callable[..., Experiment]


def science_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def state_of(run: Path) -> dict[str, torch.Tensor]:
    found = load_newest(run / "checkpoints")
    assert found is not None
    return dict(found.tensors)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask to stop as a signal would, in this step (from 0)."""

    def fault(point: str, **where: object) -> None:
        if where.get("step") == step:
            STOP.request()

    monkeypatch.setattr(loop, "fault", fault)


def texts_of(own: tokens.TokenSet) -> list[str]:
    """The sequences of a set."""
    stream = TokenStream(own.shards)
    return [decode(stream.read(int(a), int(n))) for a, n in zip(*own.documents, strict=True)]


def test_tokens_are_the_proteins_split_as_embed_splits_them(plm: Plm, go: Go, fasta: Path, tmp_path: Path) -> None:
    more = tmp_path / "clusters.fasta"
    more.write_text(">a\nMKVWW\n>b\nacdx\n>a\nMMM\n>empty\n>c\nMKJ\n")
    experiment = plm(plm__fasta=str(fasta), plm__valid={"clusters-30": str(more)}, plm__max_length=50)
    go(experiment)
    store, lineage = Store(), Lineage(experiment, Store())
    folder = lineage.tokens().folder
    assert verify(store, folder) == []
    manifest = json.loads((Path(folder) / "MANIFEST.json").read_text())
    assert experiment.train is not None
    assert experiment.train.plm is not None
    sets = tokens.read(store, folder, manifest, experiment.train.plm)
    texts = {name: texts_of(own) for name, own in sets.items()}
    assert texts["clusters-30"] == ["MKVWW", "ACDX", "MKX"]

    # The same proteins through embed fall on the same sides.
    body = {"fasta": str(fasta), "layers": [0], "holdout": 0.1, "max_length": 50, "dtype": "float32"}
    embedded = Experiment.model_validate({"name": "e", "root": str(tmp_path / "runs"), "embed": body})
    go(embedded)
    table = join(Lineage(embedded, store).embed(0).folder, "proteins.parquet")
    for name, side in (("train", "train"), ("random", "heldout")):
        sequences = read_proteins(store, table, split=side)["sequence"].to_pylist()
        assert texts[name] == sequences
        assert sequences

    # Plan and work agree on the numbers; the entropy is that of the letters.
    counts = Counter("".join(texts["train"]))
    assert manifest["residue_counts"] == [counts[letter] for letter in AMINO_ACIDS]
    assert manifest["tokens"] == sum(len(shard) for shard in sets["train"].shards)
    figures = plan_stage("train", experiment, store).figures
    assert figures["tokens_per_epoch"] == manifest["tokens"]
    standard = sum(counts[letter] for letter in AMINO_ACIDS)
    shares = [counts[letter] / standard for letter in AMINO_ACIDS if counts[letter]]
    config = json.loads((Path(experiment.root) / "plm" / "plm" / "config.json").read_text())
    assert config["facts"]["unigram_entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-12)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, repeats: Path) -> Path:
    """The proteins of `repeats` in three `.bin` files of a writer that fills a file to its last byte."""
    folder = tmp_path_factory.mktemp("shards")
    sequences = repeats.read_text().split("\n")[1::2]
    stream = np.concatenate([wrap(encode(sequence)) for sequence in sequences])
    for number, body in enumerate(np.split(stream, [3333, 3340])):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(body)
        (folder / f"train_{number}.bin").write_bytes(header.tobytes() + body.tobytes())
    return folder


def test_given_shards_train_as_the_fasta_of_their_proteins_does(plm: Plm, go: Go, shards: Path, repeats: Path) -> None:
    """The same proteins on the same sides in the same packs: every loss is the same number, with long ones cut too."""
    short = {"plm__max_length": 40, "tokens": 512 * 4, "checkpoint_every": 4, "seed": 5}
    one = go(plm("fasta", **short)).run.path
    given = plm(
        "bin", plm__fasta=None, plm__bin=f"{shards}/train_*.bin", plm__valid={"all": [f"{shards}/train_0.bin"]}, **short
    )
    before = plan_stage("train", given, Store()).figures
    assert before["shards"] == 3
    two = go(given).run.path

    def without_all(line: dict[str, Any]) -> dict[str, Any]:
        return {k: {n: v for n, v in line[k].items() if n != "all"} if k == "valid" else line[k] for k in line}

    assert [without_all(line) for line in science_of(two)] == science_of(one)
    folder = Lineage(given, Store()).tokens().folder
    manifest = json.loads((Path(folder) / "MANIFEST.json").read_text())
    other = json.loads((Path(Lineage(plm("fasta", **short), Store()).tokens().folder) / "MANIFEST.json").read_text())
    assert (manifest["proteins"], manifest["tokens"]) == (other["proteins"], other["tokens"])
    assert sum(manifest["residue_counts"]) > sum(
        other["residue_counts"]
    )  # the FASTA's are of what is left of long ones
    assert {file["name"] for file in manifest["files"]} == {
        f"{n}.documents.safetensors" for n in ("train", "random", "all")
    }
    assert plan_stage("train", given, Store()).figures["cut_proteins"] == manifest["cut_proteins"] > 50

    # The seed orders the proteins, draws the masks and the first weights.
    assert given.train is not None
    assert given.train.plm is not None
    own = tokens.read(Store(), folder, manifest, given.train.plm)["train"]
    counts = Counter("".join(texts_of(own)))
    assert manifest["residue_counts"] == [counts[letter] for letter in AMINO_ACIDS], "of the proteins trained on alone"
    packs = Packs(own.shards, 256, 42, 5, own.documents)
    peer = PLMObjective(given.train, packs, {}, 4, Gang(), torch.device("cpu"), torch.float32)
    assert science_of(two)[0]["loss"] == pytest.approx(float(peer.step(0)["loss"]), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plm__bin": "a.bin"}, "both are given"),
        ({"plm__fasta": None}, "neither is given"),
        ({"plm__fasta": None, "plm__bin": "a.fasta"}, "does not end in .bin"),
        ({"plm__valid": {"far": ["a.fasta", "b.fasta"]}}, "does not end in .bin"),
        ({"plm__fasta": None, "plm__bin": []}, "empty list"),
    ],
)
def test_sources_that_make_no_sense_are_refused(plm: Plm, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plm(**changes)


def test_the_data_order_changes_between_epochs_and_every_rank_count_sees_the_same(plm: Plm, shards: Path) -> None:
    own = [open_tokens(Store(), str(path)) for path in sorted(shards.iterdir())]
    packs = Packs(own, 256, 42, 0)
    orders = []
    first = 0
    for epoch in range(3):
        number = packs.epoch_packs(epoch)
        orders.append(torch.cat([packs.pack(first + i).tokens_T for i in range(number)]))
        first += number
    assert not torch.equal(orders[0][:2000], orders[1][:2000])
    assert not torch.equal(orders[1][:2000], orders[2][:2000])
    # The same proteins each time: token counts agree but for padding.
    counts = [torch.bincount(order[order != 1].long(), minlength=33) for order in orders]
    assert torch.equal(counts[0], counts[1])
    assert torch.equal(counts[1], counts[2])


def test_one_epoch_is_the_default(plm: Plm, go: Go) -> None:
    experiment = plm(tokens=None, batch_tokens=2048)
    steps = plan_stage("train", experiment, Store()).figures["steps"]
    run = go(experiment).run.path
    assert science_of(run)[-1]["step"] == steps
    config = json.loads((run / "plm" / "config.json").read_text())
    assert config["facts"]["steps"] == steps


def test_two_ranks_train_what_one_trains(plm: Plm, go: Go) -> None:
    one = go(plm("one")).run.path
    two = go(plm("two", run__launch={"ranks": 2})).run.path
    first, second = science_of(one), science_of(two)
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for a, b in zip(first, second, strict=True):
        if "valid" in a:
            found, other = a["valid"]["random"], b["valid"]["random"]
            assert other["residues"] == found["residues"] > 100
            assert other["loss"] == pytest.approx(found["loss"], rel=1e-4)
            continue
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert b["accuracy"] == pytest.approx(a["accuracy"], abs=0.02)
    # The first step, before differences in rounding grow.
    assert second[0]["loss"] == pytest.approx(first[0]["loss"], rel=1e-6)
    for name, tensor in state_of(one).items():
        torch.testing.assert_close(tensor, state_of(two)[name], rtol=1e-3, atol=2e-4)


def test_a_stopped_and_continued_run_is_bit_equal(plm: Plm, go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = go(plm("whole")).run.path
    stop_at(6, monkeypatch)
    with pytest.raises(Interrupted):
        go(plm("parts"))
    parts = whole.parent / "parts"
    assert max(line["step"] for line in science_of(parts)) == 7
    monkeypatch.undo()
    STOP.asked = False
    go(plm("parts"))
    assert science_of(whole) == science_of(parts)
    assert [line["step"] for line in science_of(whole) if "valid" in line] == [4, 8, 12]
    first, second = state_of(whole), state_of(parts)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    one, other = (load_state(resolve_weights(str(run / "plm"), Store())) for run in (whole, parts))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_two_ranks_agree_to_stop_and_one_continues(plm: Plm, go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """A STOP file, as any launcher can leave it: all ranks stop after one and the same step."""
    whole = go(plm("whole", tokens=512 * 60, log_every=10)).run.path
    parts = plm("parts", tokens=512 * 60, log_every=10, run__launch={"ranks": 2})
    folder = Path(parts.root) / "parts"
    monkeypatch.setenv("PLMSAE_FAULT", "sigterm:train.step:rank=1,step=3")
    with pytest.raises(Interrupted):
        go(parts)
    monkeypatch.delenv("PLMSAE_FAULT")
    stopped = load_newest(folder / "checkpoints")
    assert stopped is not None
    # Asked on one rank in step 3, agreed at step 16, obeyed at step 32.
    assert stopped.step == 2 * AGREE_EVERY
    assert not (folder / "STOP").exists()
    go(plm("parts", tokens=512 * 60, log_every=10))
    first, second = science_of(whole), science_of(folder)
    assert [line["step"] for line in first] == [line["step"] for line in second]
    losses = [(a["loss"], b["loss"]) for a, b in zip(first, second, strict=True) if "loss" in a]
    assert all(b == pytest.approx(a, rel=5e-3) for a, b in losses)


def test_it_learns_and_embed_reads_it(plm: Plm, go: Go, tmp_path: Path, repeats: Path) -> None:
    """On a circle of residues a neighbour tells the next: a model that reads context ends far below the entropy of
    the letters, on proteins it never saw."""
    run = go(plm(tokens=512 * 160, plm__eval_every=1000)).run.path
    config = json.loads((run / "plm" / "config.json").read_text())
    facts = config["facts"]
    assert facts["unigram_entropy"] == pytest.approx(math.log(20), abs=0.02)
    assert facts["valid"]["random"]["loss"] < 0.5 * facts["unigram_entropy"]
    lines = science_of(run)
    assert lines[0]["loss"] > 0.95 * facts["unigram_entropy"]
    assert lines[-1]["valid"]["random"] == facts["valid"]["random"]

    # The weights are the trained ones, and embed's rows are this model's.
    model = load_plm(str(run / "plm"))
    trained = state_of(run)
    assert all(torch.equal(p, trained[f"model.{name}"]) for name, p in model.named_parameters())
    body = {"fasta": str(repeats), "layers": [2], "dtype": "float32", "holdout": 0.1}
    embedded = Experiment.model_validate(
        {"name": "e", "root": str(tmp_path / "runs"), "model": {"weights": str(run / "plm")}, "embed": body}
    )
    go(embedded)
    folder = Lineage(embedded, Store()).embed(2).folder
    table = read_proteins(Store(), join(folder, "proteins.parquet"), split="train")
    shards = ActivationShards(Store(), folder)
    rows = torch.empty(shards.stop, 32)
    shards.read_into(0, rows)
    own = ESM2(ESM2Config(2, 32, 2))
    own.load_state_dict({k.removeprefix("model."): v for k, v in trained.items() if "model." in k}, strict=False)
    for index in (0, len(table) - 1):
        protein = {name: table[name][index].as_py() for name in ("sequence", "row_offset", "rows")}
        packed = pack([encode(protein["sequence"])])
        with torch.inference_mode():
            hidden = own(packed.tokens_T, packed.documents, layers=[2]).hidden[2]
        found = rows[protein["row_offset"] : protein["row_offset"] + protein["rows"]]
        torch.testing.assert_close(found, hidden[1:-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["train", "random", "../escape", "a/b", "Upper", ""])
def test_a_validation_set_cannot_take_another_sets_files(plm: Plm, repeats: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name a validation set"):
        plan_stage("train", plm(plm__valid={name: str(repeats)}), Store())


def test_batches_that_ranks_cannot_share_are_refused(plm: Plm) -> None:
    with pytest.raises(UserError, match="2 packs, which 3 ranks cannot share"):
        plan_stage("train", plm(run__launch={"ranks": 3}), Store())
