"""`embed.layout: bucketed`: the dataset of the plain layout to the byte, from files that embed sorted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plmsae_cli.cli.housekeeping import verify_targets
from plmsae_cli.cli.listing import list_root
from plmsae_cli.cli.show import plan_lines
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.executor import fix_plans
from plmsae_cli.executors.pipeline import Done, missing_inputs, plan_stage
from plmsae_cli.executors.share import Share, run_share
from plmsae_cli.executors.worker import LocalContext, run_task
from plmsae_cli.store.activations import ActivationShards
from plmsae_cli.store.blocks import Blocks
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.housekeeping import leavings
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import read_manifest, verify
from plmsae_cli.store.permutation import Permutation
from plmsae_cli.store.proteins import locate_rows, read_proteins
from tests.stages.conftest import Quiet

Build = Callable[..., Experiment]
Go = Callable[..., Done]
DATA = ["embed", "shuffle", "optimize"]
MEMORY = 2_000_000
SORTED = {"embed__layout": "bucketed", "shuffle__memory": MEMORY}


def files_of(folder: str, *but: str) -> dict[str, bytes]:
    """Files by name, without those that have times in them."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
    return {n: b for n, b in found.items() if not n.startswith(("parts/", "MANIFEST", "index.json", *but))}


def folders(experiment: Experiment, stage: str) -> list[str]:
    assert experiment.embed is not None
    lineage = Lineage(experiment, Store())
    return [getattr(lineage, stage)(layer).folder for layer in experiment.embed.layers]


@pytest.fixture
def pair(build: Build, tmp_path: Path) -> Callable[..., tuple[Experiment, Experiment]]:
    """The same experiment in both layouts, each with data of its own."""

    def make(**changes: Any) -> tuple[Experiment, Experiment]:
        plain = build(shuffle__memory=MEMORY, data_root=str(tmp_path / "plain"), **changes)
        return plain, build(data_root=str(tmp_path / "bucketed"), **SORTED, **changes)

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"embed__layers": [1, 2], "train__layer": 2},
        {"embed__dtype": "int8", "embed__shard": "20kB"},
        {"embed__pooled": True, "embed__dtype": "bfloat16", "launch__workers": 2, "embed__ordered_rows": 0},
    ],
    ids=["one layer", "two layers", "int8", "two workers, no slice"],
)
def test_the_dataset_is_that_of_the_plain_layout_to_the_byte(
    pair: Callable[..., tuple[Experiment, Experiment]], go: Go, changes: dict[str, Any]
) -> None:
    of_layout = {"embed__ordered_rows"} & set(changes)
    plain, ours = pair(**{k: v for k, v in changes.items() if k not in of_layout})
    if of_layout:
        ours = Experiment.model_validate(ours.dump() | {"embed": ours.dump()["embed"] | {"ordered_rows": 0}})
    for experiment in (plain, ours):
        go(experiment, DATA)
    store = Store()
    for theirs, own in zip(folders(plain, "optimize"), folders(ours, "optimize"), strict=True):
        assert Path(theirs).name == Path(own).name
        assert files_of(theirs, "plan") == files_of(own, "plan")
        assert Path(theirs, "index.json").exists()
        one, two = (read_manifest(store, f) for f in (theirs, own))
        assert one is not None
        assert two is not None
        assert one["row_sum"] == two["row_sum"]
        assert {f["name"]: f["xxh3"] for f in one["files"] if "index" not in f["name"]} == {
            f["name"]: f["xxh3"] for f in two["files"] if "index" not in f["name"]
        }
    for embedded, shuffled in zip(folders(ours, "embed"), folders(ours, "shuffle"), strict=True):
        assert verify(store, embedded) == [] == verify(store, shuffled)
        one, two = (read_manifest(store, f) for f in (embedded, shuffled))
        assert one is not None
        assert two is not None
        assert one["row_sum"] == two["row_sum"]
        assert one["layout"] == two["layout"] == "bucketed"
        assert two["format"] == "plmsae.shuffled/1"
        assert len(list(Path(shuffled).glob("map-*"))) == two["maps"] > 1


def test_rows_are_traced_back_and_the_slice_is_the_first_rows(build: Build, go: Go, tmp_path: Path) -> None:
    whole = build(**SORTED)
    part = build(**SORTED, embed__ordered_rows=1500, data_root=str(tmp_path / "other"))
    for experiment in (whole, part):
        go(experiment, DATA)
    store = Store()
    shards = ActivationShards(store, *folders(whole, "embed"))
    blocks = Blocks(store, *folders(whole, "optimize"))
    assert shards.stop == blocks.num_rows
    rows, placed = shards.read(0, shards.stop), blocks.read(0, blocks.num_rows)
    order = Permutation(blocks.num_rows, 3, domain="shuffle")
    assert torch.equal(placed[torch.from_numpy(order(np.arange(len(rows))))], rows)
    table = read_proteins(store, join(*folders(whole, "optimize"), "proteins.parquet"), split="train")
    protein, residue = locate_rows(table, order.inverse(np.array([5])))
    offset = table["row_offset"][int(protein[0])].as_py()
    assert torch.equal(placed[5], rows[offset + int(residue[0])])

    sliced = ActivationShards(store, *folders(part, "embed"))
    assert (sliced.start, sliced.stop) == (0, 1500)
    assert torch.equal(sliced.read(0, 1500), rows[:1500])
    manifest = read_manifest(store, *folders(part, "embed"))
    assert manifest is not None
    assert (manifest["rows"], manifest["ordered_rows"]) == (len(rows), 1500)
    names = [f["name"] for f in manifest["files"]]
    assert 0 < sum(name.startswith("shard-") for name in names) < sum(name.startswith("heldout/") for name in names)


def test_killed_after_any_task_and_between_two_records(build: Build, go: Go, tmp_path: Path) -> None:
    changes = {**SORTED, "embed__layers": [1, 2], "train__layer": 2, "embed__shard": "250kB"}
    calm = build(**changes, data_root=str(tmp_path / "calm"))
    go(calm, DATA)
    wanted = [files_of(f) for stage in DATA for f in folders(calm, stage)]
    store = Store()
    count = len(plan_stage("embed", build(**changes, data_root=str(tmp_path / "none")), store).tasks)
    assert count > 4
    for stop in range(1, count):
        experiment = build(**changes, data_root=str(tmp_path / f"cut-{stop}"))
        plan = plan_stage("embed", experiment, store)
        fix_plans(plan, store)
        context = LocalContext(experiment, lambda *_, **__: None)
        for task in plan.tasks[:stop]:
            run_task(task, context)
        # As after a kill between the records of one task: the last is in some of its folders only.
        for folder in plan.tasks[stop - 1].folders[stop % 2 :: 2]:
            Path(folder, "parts", f"{plan.tasks[stop - 1].id}.json").unlink()
        go(experiment, DATA)
        assert [files_of(f) for stage in DATA for f in folders(experiment, stage)] == wanted
    # Between the manifests of the two: the shuffle's alone is made again, from the same proteins.
    embedded, shuffled = folders(experiment, "embed")[0], folders(experiment, "shuffle")[0]
    for folder in (shuffled, folders(experiment, "optimize")[0]):
        Path(folder, "MANIFEST.json").unlink()
    Path(shuffled, "map-00001.safetensors").unlink()
    before = Path(embedded, "MANIFEST.json").read_bytes()
    assert missing_inputs("optimize", experiment, store) == [f"{shuffled} (embed)"]
    assert missing_inputs("shuffle", experiment, store) == [f"{shuffled} (embed)"]
    go(experiment, DATA)
    assert Path(embedded, "MANIFEST.json").read_bytes() == before
    assert [files_of(f) for stage in DATA for f in folders(experiment, stage)] == wanted


def test_shares_of_machines_that_know_nothing_of_each_other(build: Build, go: Go, tmp_path: Path) -> None:
    calm, shared = (build(**SORTED, data_root=str(tmp_path / name)) for name in ("calm", "shared"))
    go(calm, ["embed"])
    said = [run_share(shared, "embed", Share(i, 3), Quiet()) for i in (2, 1, 3)]
    assert said[-1].startswith("embed is complete")
    assert "complete" in run_share(shared, "shuffle", Share(1, 1), Quiet())
    for stage in ("embed", "shuffle"):
        assert files_of(*folders(calm, stage)) == files_of(*folders(shared, stage))


def test_the_plan_shows_that_one_reading_and_one_writing_are_left(build: Build, go: Go) -> None:
    experiment = build(**SORTED)
    store = Store()
    before = {stage: plan_stage(stage, experiment, store) for stage in DATA}
    rows, row_bytes = before["embed"].figures["rows"], 4 * 32
    moved = before["optimize"].figures["layer-2"]
    assert before["shuffle"].done
    assert (
        before["shuffle"].figures["layer-2"]["bytes_read"] == 0 == before["shuffle"].figures["layer-2"]["bytes_written"]
    )
    assert (moved["bytes_read"], moved["bytes_written"]) == (rows * (row_bytes + 8), rows * row_bytes)
    lines = "\n".join(line for plan in before.values() for line in plan_lines(plan))
    assert "1 R + 1 W" in lines
    assert "shuffle: embed writes its files, layout: bucketed" in lines

    reporter = Quiet()
    done = go(experiment, DATA, reporter)
    assert set(done.stages) == {"embed", "optimize"}
    assert any(line.startswith("shuffle: nothing to do") and "embed writes" in line for line in reporter.lines)
    made = [p for stage in ("embed", "shuffle") for p in Path(*folders(experiment, stage)).rglob("*") if p.is_file()]
    assert before["embed"].figures["objects"] == len(made)
    size = sum(p.stat().st_size for p in made)
    assert before["embed"].figures["bytes"] < size < 1.2 * before["embed"].figures["bytes"] + 200_000
    pointers = done.run.path / "artifacts.json"
    assert pointers.read_text().count('"folder"') == 3
    after = plan_stage("optimize", experiment, store).figures["layer-2"]
    assert (after["bytes_read"], after["bytes_written"]) == (moved["bytes_read"], moved["bytes_written"])


def test_what_does_not_fit_the_memory_is_refused_with_the_shard_that_fits(build: Build, go: Go) -> None:
    tight = {"embed__layout": "bucketed", "embed__layers": [1, 2], "train__layer": 2, "shuffle__memory": "60kB"}
    with pytest.raises(UserError, match=r"shuffle\.memory") as caught:
        plan_stage("embed", build(**tight), Store())
    fitting = str(caught.value.hint).split()[1]
    with pytest.raises(UserError, match="the most"):  # it fits, and is so small that there are very many
        plan_stage("embed", build(**tight, embed__shard=fitting), Store())
    roomy = tight | {"shuffle__memory": "500kB", "embed__shard": "1MB"}
    with pytest.raises(UserError) as caught:
        plan_stage("embed", build(**roomy), Store())
    experiment = build(**roomy | {"embed__shard": str(caught.value.hint).split()[1]})
    go(experiment, DATA)
    small = build(**roomy | {"shuffle__memory": "60kB"})
    for folder in folders(small, "shuffle"):
        Path(folder, "MANIFEST.json").unlink()
    with pytest.raises(UserError) as caught:
        plan_stage("embed", small, Store())
    assert "fixed the shards" in str(caught.value.hint)


def test_layouts_do_not_mix_in_one_folder_but_share_a_finished_one(build: Build, go: Go) -> None:
    plain, ours = build(shuffle__memory=MEMORY), build(**SORTED)
    assert folders(plain, "embed") != folders(ours, "embed")
    assert folders(plain, "shuffle") == folders(ours, "shuffle")
    assert folders(build(**SORTED, shuffle__seed=4), "embed") != folders(ours, "embed")
    (shuffled,) = folders(plain, "shuffle")
    store = Store()
    fix_plans(plan_stage("shuffle", plain, store), store)
    with pytest.raises(UserError, match="layout: plain and is not finished"):
        plan_stage("embed", ours, store)
    go(plain, ["embed", "shuffle"])
    assert go(ours, DATA).stages.keys() == {"optimize"}  # with the statistics of the activations that were sorted

    Path(shuffled, "MANIFEST.json").unlink()
    Path(shuffled, "plan.json").unlink()
    fix_plans(plan_stage("embed", ours, store), store)
    with pytest.raises(UserError, match="layout: bucketed and is not finished"):
        plan_stage("shuffle", plain, store)


def test_housekeeping_knows_it(build: Build, go: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = build(**SORTED, keep__buckets=False, embed__ordered_rows=100)
    root = tmp_path / "runs"
    go(experiment, ["embed"])
    (embedded,), (shuffled,) = folders(experiment, "embed"), folders(experiment, "shuffle")
    assert list_root(Path(embedded), False) == 0
    assert "100 of them in protein order" in capsys.readouterr().out
    assert verify_targets([str(root)], False) == 0
    Path(shuffled, "map-00000.safetensors").write_bytes(b"x")
    assert verify_targets([str(root)], False) == 1
    assert "task shard-00000 made it" in capsys.readouterr().out
    for name in ("map-00000.safetensors", "MANIFEST.json"):
        Path(shuffled, name).unlink()
    go(experiment, experiment.stages())  # what was absent is made anew, then trained on and scored
    assert Path(shuffled, "FREED.json").exists()
    assert not list(Path(shuffled).glob("map-*"))
    used = {Path(folder).name for folder in (embedded, shuffled, *folders(experiment, "optimize"))}
    assert list(leavings(root, used, 0.0, unused=True)) == []
    assert go(experiment).stages == {}


def test_senseless_settings_are_refused(build: Build) -> None:
    with pytest.raises(ValueError, match="no shuffle section"):
        Experiment.model_validate({"embed": {"fasta": "x", "layers": [0], "layout": "bucketed"}})
    with pytest.raises(ValueError, match="ordered_rows has no effect"):
        build(embed__ordered_rows=5)
