"""`keep` gives up what nobody else reads: other runs, experiments that the queue has yet to start, trials that are not done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors import keep
from plmsae_cli.executors.pipeline import run_experiment
from plmsae_cli.runtime.run_folder import RunFolder
from plmsae_cli.store.fs import Store
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import read_manifest, verify
from tests.stages.conftest import Build, Quiet

DATA = ["embed", "shuffle", "optimize"]


def run(experiment: Experiment, stages: list[str], later: list[Experiment] | None = None) -> list[str]:
    """What `keep` said."""
    told = Quiet()
    run_experiment(experiment, stages, told, later=later or [])
    return [line for line in told.lines if "(keep)" in line]


def there(experiment: Experiment) -> list[str]:
    """Data stages whose folders are there and finished."""
    lineage, store = Lineage(experiment, Store()), Store()
    return [stage for stage in DATA if read_manifest(store, getattr(lineage, stage)(2).folder) is not None]


def test_an_embedding_that_another_run_has_yet_to_shuffle_is_kept(build: Build) -> None:
    first = build(name="first", keep__activations=False, keep__buckets=False)
    second = build(name="second", shuffle__seed=4)
    run(second, ["embed"])  # and stops there: its state is `done`, its dataset is not
    kept, freed = run(first, DATA)
    assert kept.startswith("kept ")
    assert f"{second.root}/second still reads it" in kept
    assert "shuffle-" in freed
    assert there(first) == ["embed", "optimize"]
    run(second, ["shuffle"])
    assert "second still reads it" in run(first, DATA)[0], "the dataset takes its statistics from the embedding"
    assert run(second, DATA) == []
    assert there(second) == DATA
    (freed,) = run(first, DATA)
    assert freed.startswith("freed ")
    assert there(first) == ["optimize"]
    assert there(second) == ["shuffle", "optimize"]
    assert run(first, DATA) == []


def test_what_the_queue_has_yet_to_start_keeps_its_embedding(build: Build) -> None:
    first, second = (build(name=f"run{seed}", shuffle__seed=seed, keep__activations=False) for seed in (3, 4))
    missing = build(name="missing", embed__fasta="/nowhere.fasta")
    (kept,) = run(first, DATA, [missing, second])
    assert "run4, which is yet to run, still reads it" in kept
    (freed,) = run(second, DATA)
    assert freed.startswith("freed ")
    assert there(second) == ["shuffle", "optimize"]


def test_who_begins_to_read_while_the_dataset_is_verified_keeps_the_embedding(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To verify a large dataset takes hours."""
    first, second = (build(name=f"run{seed}", shuffle__seed=seed, keep__activations=False) for seed in (3, 4))

    def meanwhile(store: Store, dataset: str) -> list[str]:
        run(second, ["embed"])
        return verify(store, dataset)

    monkeypatch.setattr(keep, "verify", meanwhile)
    (kept,) = run(first, DATA)
    assert "run4 still reads it" in kept
    assert there(first) == DATA


def test_data_that_another_run_frees_between_the_plan_and_the_pointer_are_made_again(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (build(name=f"run{seed}", shuffle__seed=seed, keep__activations=False) for seed in (3, 4))
    run(first, ["embed"])
    real = RunFolder.point

    def freed(self: RunFolder, artifacts: Mapping[str, Mapping[str, Any]]) -> None:
        monkeypatch.setattr(RunFolder, "point", real)
        run(first, DATA)
        real(self, artifacts)

    monkeypatch.setattr(RunFolder, "point", freed)
    run(second, ["embed"])
    assert there(first) == DATA, "freed by the first run, and made again by the second"


def test_pages_of_training_rows_keep_the_embedding(build: Build) -> None:
    first = build(name="first", keep__activations=False)
    pages = build(name="pages", eval__features={"split": "train"})
    run(pages, DATA)
    (kept,) = run(first, DATA)
    assert "pages still reads it" in kept
    (Path(pages.root) / "pages").rename(Path(pages.root) / "pages.archived-1")
    (freed,) = run(first, DATA)
    assert freed.startswith("freed ")


def test_a_damaged_record_frees_nothing(build: Build) -> None:
    first = build(name="first", keep__activations=False)
    other = Path(first.root) / "other" / "artifacts.json"
    other.parent.mkdir(parents=True)
    other.write_text('{"embed": ')
    (said,) = run(first, DATA)
    assert "embed-" in said
    assert f" (keep): {other} is damaged" in said
    assert there(first) == DATA


@pytest.mark.parametrize(("field", "own"), [("shuffle.seed", True), ("train.sae.k", False)])
def test_a_sweep_frees_what_its_trials_share_when_the_last_has_read_it(build: Build, field: str, own: bool) -> None:
    sweep = build(sweep={"grid": {field: [3, 4]}}, keep__activations=False, train__tokens=256, eval=None)
    said = run(sweep, [*DATA, "sweep"])
    assert [line.split()[0] for line in said] == (["kept", "freed"] if own else ["freed"])
    assert len(list(Path(sweep.root).glob("data/optimize-*/MANIFEST.json"))) == (2 if own else 1)
    assert not list(Path(sweep.root).glob("data/embed-*/MANIFEST.json"))
