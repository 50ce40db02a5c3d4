"""train: resumed is uninterrupted, ranks agree, an export eats raw activations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.pipeline import Done, run_experiment
from plmsae_cli.runtime.progress import PlainReporter
from plmsae_cli.runtime.saved import load_sae, load_sae_with_facts, open_blocks
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted
from plmsae_cli.stages import train_sae
from plmsae_cli.stages.train import plan
from plmsae_cli.store.activations import Statistics
from plmsae_cli.store.checkpoint import load_newest
from plmsae_cli.store.fs import DamagedError, Store, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.training import loop

Build = Callable[..., Experiment]
Go = Callable[..., Done]

# What depends on the clock; everything else in metrics.jsonl is science.
CLOCK = {"tokens_per_second", "loader_wait", "step_ms", "loader_share"}


def state_of(run: Path) -> dict[str, torch.Tensor]:
    found = load_newest(run / "checkpoints")
    assert found is not None
    return dict(found.tensors)


def science_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask to stop as a signal would, before this step."""
    real = loop.fault
    count = 0

    def fault(point: str, **where: object) -> None:
        nonlocal count
        if point == "train.step":
            count += 1
            if count == step:
                STOP.request()
        real(point, **where)

    monkeypatch.setattr(loop, "fault", fault)


@pytest.mark.parametrize(
    "options",
    [{}, {"train__moments": "bfloat16"}, {"train__optimizer": "muon"}, {"train__optimizer": "signum"}],
    ids=lambda options: next(iter(options.values()), "adam"),
)
def test_a_stopped_and_continued_run_is_bit_equal(
    options: dict[str, str], build: Build, go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = go(build(name="whole", **options), ["embed", "shuffle", "optimize", "train"]).run.path
    stop_at(7, monkeypatch)
    with pytest.raises(Interrupted):
        go(build(name="parts", **options))
    parts = Path(build().root) / "parts"
    status = json.loads((parts / "status.json").read_text())
    assert status["state"] == "interrupted"
    assert max(line["step"] for line in science_of(parts)) == 7
    STOP.asked = False
    done = go(build(name="parts", **options), ["embed", "shuffle", "optimize", "train"])
    both = json.loads((parts / "status.json").read_text())["stage_seconds"]["train"]
    assert both == pytest.approx(status["stage_seconds"]["train"] + done.stages["train"], abs=0.011)
    assert science_of(whole) == science_of(parts)
    first, second = state_of(whole), state_of(parts)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    ours, theirs = load_sae(whole), load_sae(parts)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_a_damaged_checkpoint_is_passed_over_and_named(
    build: Build, go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = go(build(name="whole")).run.path
    stop_at(12, monkeypatch)
    with pytest.raises(Interrupted):
        go(build(name="parts"))
    STOP.asked = False
    parts = Path(build().root) / "parts"
    newest = sorted((parts / "checkpoints").glob("step-*"))[-1]
    assert newest.name == "step-00000012"
    file = newest / "rank-0.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    go(build(name="parts"))
    assert "step-00000012 is damaged" in capsys.readouterr().err
    first, second = state_of(whole), state_of(parts)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert science_of(whole) == science_of(parts)


def test_two_ranks_train_what_one_trains_with_a_profile_told_once(
    build: Build, go: Go, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = ["embed", "shuffle", "optimize", "train"]
    one = go(build(name="one"), stages).run.path
    assert not (one / "profile").exists()
    capsys.readouterr()
    two = go(build(name="two", launch__ranks=2, train__profile=True), stages, PlainReporter()).run.path
    told = capsys.readouterr().err.splitlines()
    (title,) = (line for line in told if line.startswith("profile of steps 11 to 20: "))
    (sentence,) = (line for line in told if line.startswith("bottleneck: "))
    assert sorted(p.name for p in (two / "profile").iterdir()) == ["table.txt", "trace.json.gz"]
    table = (two / "profile" / "table.txt").read_text().splitlines()
    assert table[0] == title
    assert sentence in table
    for a, b in zip(science_of(one), science_of(two), strict=True):
        assert a["step"] == b["step"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["l0"] == pytest.approx(a["l0"], rel=1e-3)
    first, second = state_of(one), state_of(two)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)


def test_two_ranks_continue_what_one_began(build: Build, go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = go(build(name="whole")).run.path
    stop_at(9, monkeypatch)
    with pytest.raises(Interrupted):
        go(build(name="parts"))
    STOP.asked = False
    go(build(name="parts", launch__ranks=2))
    parts = Path(build().root) / "parts"
    for a, b in zip(science_of(whole), science_of(parts), strict=True):
        assert (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)


def test_the_export_eats_raw_activations(build: Build, go: Go) -> None:
    experiment = build()
    run = go(experiment).run.path
    saved = load_sae_with_facts(run)
    lineage = Lineage(experiment, Store())
    folder = lineage.dataset().folder
    blocks = open_blocks(folder)
    raw = torch.empty(200, blocks.d, dtype=blocks.dtype)
    blocks.read_into(0, raw)
    mean, scale = Statistics.read(Store(), join(folder, "stats.safetensors")).normalisation()
    tensors = state_of(run)
    x = (raw.float() - mean) * scale
    pre = (x - tensors["model.b_dec_D"]) @ tensors["model.w_enc_ND"].T + tensors["model.b_enc_N"]
    kept = torch.zeros_like(pre)
    top = pre.topk(4, dim=1)
    kept.scatter_(1, top.indices, top.values.clamp(min=0))
    expected = (kept @ tensors["model.w_dec_ND"] + tensors["model.b_dec_D"]) / scale + mean
    torch.testing.assert_close(saved.model(raw.float()), expected, rtol=1e-3, atol=1e-4)
    assert saved.facts["layer"] == 2
    every = torch.empty(blocks.num_rows, blocks.d, dtype=blocks.dtype)
    blocks.read_into(0, every)
    torch.testing.assert_close(saved.model.maximum_N, saved.model.encode_dense(every.float()).amax(0))


def test_a_run_with_other_science_is_refused_with_the_difference(build: Build, go: Go) -> None:
    go(build())
    with pytest.raises(UserError, match=r"train\.sae\.k: 4 -> 5") as caught:
        go(build(train__sae__k=5))
    assert "--restart" in str(caught.value.hint)
    go(build(train__log_every=7))  # cosmetic: allowed
    done = run_experiment(build(train__sae__k=5), ["train"], PlainReporter(), restart=True)
    assert len(list(done.run.path.parent.glob("run.archived-*"))) == 1


def test_rows_that_are_not_finite_stop_the_run_which_names_them_and_keeps_the_checkpoint(
    build: Build, go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_sae, "MEDIAN_ROWS", 128)  # or training would begin with it
    experiment = build()
    go(experiment, ["embed", "shuffle", "optimize"])
    folder = Path(Lineage(experiment, Store()).dataset().folder)
    chunk = sorted(folder.glob("chunk-*.bin"))[0]
    data = bytearray(chunk.read_bytes())
    # A NaN in the last row of the first chunk's last block, which one of the later batches reads.
    data[-4:] = b"\xff\xff\xff\x7f"
    record = Store().write(str(chunk), [data])
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    next(file for file in manifest["files"] if file["name"] == chunk.name)["xxh3"] = record.xxh3
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    blocks = open_blocks(str(folder))
    rows_RD = blocks.decode(blocks.read(0, blocks.num_rows))
    (row,) = (~rows_RD.isfinite().all(1)).nonzero().flatten().tolist()
    block = row // 128
    assert 0 < block < blocks.num_rows // 128
    named = rf"rows {128 * block:,} to {128 * block + 127:,} of the dataset \(block {block}\)"
    with pytest.raises(loop.Diverged, match=rf"the gradients of step {block + 1} were not finite.* from {named}"):
        go(experiment, ["train"])
    found = load_newest(Path(experiment.root) / "run" / "checkpoints")
    assert found is None or all(t.isfinite().all() for t in found.tensors.values())
    assert json.loads((Path(experiment.root) / "run" / "status.json").read_text())["state"] == "failed"


def test_a_chunk_that_is_not_what_was_written_ends_the_run_by_name(build: Build, go: Go) -> None:
    experiment = build()
    go(experiment, ["embed", "shuffle", "optimize"])
    folder = Path(Lineage(experiment, Store()).dataset().folder)
    chunk = folder / "chunk-0-1.bin"
    data = bytearray(chunk.read_bytes())
    data[5000] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(DamagedError, match=r"chunk-0-1\.bin is damaged"):
        go(experiment, ["train"])


@pytest.mark.parametrize("damaged", [False, True])
def test_chunks_that_training_has_not_come_to_are_read_and_checked_by_the_export(
    build: Build, go: Go, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    monkeypatch.setattr(train_sae, "MEDIAN_ROWS", 64)
    experiment = build(train__tokens=256)
    go(experiment, ["embed", "shuffle", "optimize"])
    chunks = sorted(Path(Lineage(experiment, Store()).dataset().folder).glob("chunk-*.bin"))
    assert len(chunks) > 3
    if damaged:
        data = bytearray(chunks[-1].read_bytes())
        data[5000] ^= 1
        chunks[-1].write_bytes(data)
        with pytest.raises(DamagedError, match=rf"{chunks[-1].name} is damaged"):
            go(experiment, ["train"])
    else:
        assert (go(experiment, ["train"]).run.path / "sae" / "sae.json").exists()


def test_litdatas_loader_trains_the_same_dictionary_in_the_first_epoch(build: Build, go: Go) -> None:
    pytest.importorskip("litdata")
    changes = {"optimize.block_rows": 128, "eval": None, "train.tokens": 1280}
    runs = [
        go(build(name=loader, **changes, **{"train.loader": loader}), None).run.path for loader in ("blocks", "litdata")
    ]
    assert len({(run / "sae" / "sae.safetensors").read_bytes() for run in runs}) == 1
    assert len({(run / "identity.json").read_bytes() for run in runs}) == 2


def test_batches_that_do_not_fit_are_refused_with_numbers(build: Build, go: Go) -> None:
    with pytest.raises(UserError, match=r"100000.*more than the \d+ rows"):
        go(build(train__batch_tokens=100_000, train__tokens=100_000))
    with pytest.raises(UserError, match="larger than the dictionary"):
        go(build(name="k", train__sae__k=65, train__sae__expansion=2))


@pytest.mark.parametrize("options", [{"train__moments": "bfloat16"}, {"train__optimizer": "signum"}])
def test_half_the_optimizers_state_is_four_bytes_a_parameter_less(options: dict[str, str], build: Build) -> None:
    full, half = (plan(build(**each), Store()).figures for each in ({}, options))
    assert full["memory_per_rank"] - half["memory_per_rank"] == 4 * full["parameters"]


def test_the_plan_has_the_peak_rate_that_a_run_reaches(build: Build, go: Go) -> None:
    for rate in ("auto", 3e-3):
        experiment = build(name=f"rate-{rate}", train__lr=rate)
        planned = plan(experiment, Store()).figures["lr"]
        run = go(experiment, ["embed", "shuffle", "optimize", "train"]).run.path
        reached = max(line["lr"] for line in science_of(run) if "lr" in line)
        assert planned == pytest.approx(reached, rel=1e-3)


def test_a_dataset_of_another_layer_is_refused(build: Build, go: Go) -> None:
    experiment = build()
    go(experiment, ["embed", "shuffle", "optimize"])
    folder = Lineage(experiment, Store()).dataset().folder
    with pytest.raises(UserError, match=r"train\.layer is 3, but .* holds layer 2"):
        go(build(name="other", train__data=folder, train__layer=3), ["train"])


def test_the_forecast_knows_how_wide_stored_rows_are(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plmsae_cli.stages.train._present", lambda _: None)
    said = [plan(build(embed__dtype=dtype), Store()).figures["predicted_from"] for dtype in ("float32", "float16")]
    wide, narrow = (float(text.split(" GB/s")[0].split()[-1]) for text in said)
    assert wide == pytest.approx(2 * narrow, rel=0.05)
