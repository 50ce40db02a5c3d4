"""`eval.features` against a scan of every activation, and the same bytes however the work is cut, killed and shared."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from csv import DictReader
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from plmsae_cli.config.yaml import load
from plmsae_cli.evaluation.features import reading
from plmsae_cli.executors.pipeline import plan_stage
from plmsae_cli.executors.worker import LocalContext, publish, run_task, work_on
from plmsae_cli.runtime.saved import load_sae
from plmsae_cli.store.activations import ActivationShards
from plmsae_cli.store.fs import Store
from plmsae_cli.store.permutation import counter_hash
from plmsae_cli.store.proteins import read_proteins

Plmsae = Callable[..., Any]
TOP, RANDOM, CONTEXT = 3, 2, 30
OPTIONS = f"top: {TOP}, random: {RANDOM}, context: {CONTEXT}, latents_per_group: 10"
EVAL = "eval: {{fidelity: {{loss_recovered: false}}, features: {{{}}}}}"
FINAL = ("index.json", "latents.parquet", "result.json", "examples")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few proteins are many blocks."""
    monkeypatch.setattr(reading, "_BLOCK_ROWS", 256)


@pytest.fixture
def trained(plmsae: Plmsae, write: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """An experiment with these options of `features`, on a run that is trained once; 30 proteins of 10 to 240 residues."""

    def make(options: str, more: str = "") -> Path:
        fasta = tmp_path / "p.fasta"
        if not fasta.exists():
            draw = random.Random(1)
            sequences = ("".join(draw.choices("ACDEFGHIKLMNPQRSTVWYX", k=draw.randint(10, 240))) for _ in range(90))
            sequences = list(sequences)
            sequences[60:] = ["K" + text[1:] for text in sequences[:30]]  # relatives
            fasta.write_text("".join(f">p{i} <b>&\n{text}\n" for i, text in enumerate(sequences)))
            path = write(evaluation="", fasta=fasta, data=tmp_path / "data")
            assert plmsae("run", path, "--no-progress").code == 0
        return write(evaluation=EVAL.format(options), fasta=fasta, data=tmp_path / "data", more=more)

    return make


def final(run: Path) -> dict[str, bytes]:
    """What readers of the folder see."""
    folder = run / "eval" / "features"
    files = (path for name in FINAL for path in sorted([folder / name, *(folder / name).rglob("*")]) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Scan:
    """Every activation of the side, and the lists that follow from them."""

    def __init__(self, experiment: Path, tmp_path: Path, heldout: bool = False) -> None:
        folder = next(path for path in (tmp_path / "data").glob("embed-*"))
        shards = ActivationShards(Store(), str(folder), heldout=heldout)
        table = read_proteins(Store(), str(folder / "proteins.parquet"), split="heldout" if heldout else "train")
        self.sequences, self.ids = table["sequence"].to_pylist(), table["id"].to_pylist()
        self.offset_P = table["row_offset"].to_numpy()
        model = load_sae(tmp_path / "runs" / "one")
        self.maximum_N = model.maximum_N.numpy()
        blocks = (shards.read(row, min(row + 256, shards.stop)) for row in range(0, shards.stop, 256))
        with torch.inference_mode():
            self.acts_RN = np.concatenate([model.encode_dense(x_BD).numpy() for x_BD in blocks])
        lengths = [len(text) for text in self.sequences]
        clusters = tmp_path / "runs" / "one" / "eval" / "features" / "clusters.parquet"
        self.cluster_P = pq.read_table(clusters)["cluster"].to_pylist() if clusters.exists() else []
        self.protein_R = np.repeat(np.arange(len(lengths)), lengths)
        self.position_R = np.concatenate([np.arange(1, length + 1) for length in lengths])

    def band(self, value: float, latent: int) -> int:
        return (
            3
            if self.maximum_N[latent] == 0
            else min(3, max(b for b in range(4) if value > b * self.maximum_N[latent] / 4))
        )

    def lists(self, latent: int, one_per: str) -> Iterator[tuple[str, int, int, int]]:
        """(kind, band, rank, row) in the order of the file."""
        acts_R = self.acts_RN[:, latent]
        rows = np.flatnonzero(acts_R > 0).tolist()
        bands = {row: self.band(acts_R[row], latent) for row in rows}
        key = {row: int(counter_hash(0, row, latent)) >> 32 for row in rows}
        for rank, row in enumerate(self._distinct(sorted(rows, key=lambda r: (-acts_R[r], r)), one_per)[:TOP], 1):
            yield "top", bands[row], rank, row
        for band in range(4):
            mine = sorted((row for row in rows if bands[row] == band), key=lambda r: (key[r], r))
            for rank, row in enumerate(self._distinct(mine, one_per)[:RANDOM], 1):
                yield "random", band, rank, row

    def _distinct(self, rows: list[int], one_per: str) -> list[int]:
        if one_per == "token":
            return rows
        first: dict[int, int] = {}
        for row in rows:
            protein = int(self.protein_R[row])
            first.setdefault(self.cluster_P[protein] if one_per == "cluster" else protein, row)
        return list(first.values())


def check(scan: Scan, run: Path, one_per: str) -> None:
    """Every example, and every count, is that of the scan."""
    folder = run / "eval" / "features"
    index = json.loads((folder / "index.json").read_text())
    rows, num_latents = scan.acts_RN.shape
    assert (index["rows"], index["num_latents"], index["proteins"]) == (rows, num_latents, len(scan.sequences))
    latents = pq.read_table(folder / "latents.parquet").to_pylist()
    shown = set()
    for group in range(index["groups"]):
        table = pq.read_table(folder / "examples" / f"group-{group:05}.parquet").to_pylist()
        first, last = group * 10, min(num_latents, group * 10 + 10)
        expected = [(n, *one) for n in range(first, last) for one in scan.lists(n, one_per)]
        assert [(r["latent"], r["kind"], r["band"], r["rank"], r["row"]) for r in table] == expected
        for row in table:
            acts_R = scan.acts_RN[:, row["latent"]]
            protein, position = row["protein"], row["position"]
            assert (protein, position) == (scan.protein_R[row["row"]], scan.position_R[row["row"]])
            assert row["activation"] == acts_R[row["row"]]
            length = len(scan.sequences[protein])
            assert (row["first"], row["last"]) == (max(1, position - CONTEXT), min(length, position + CONTEXT))
            around = acts_R[scan.offset_P[protein] + row["first"] - 1 : scan.offset_P[protein] + row["last"]]
            assert row["positions"] == (np.flatnonzero(around > 0) + row["first"]).tolist()
            assert row["activations"] == around[around > 0].tolist()
            shown.add(protein)
    proteins = pq.read_table(folder / "examples" / "proteins.parquet").to_pylist()
    assert [p["protein"] for p in proteins] == sorted(shown)
    assert all((p["id"], p["sequence"]) == (scan.ids[p["protein"]], scan.sequences[p["protein"]]) for p in proteins)
    for latent, row in enumerate(latents):
        check_counts(scan, latent, row, index["letters"])


def check_counts(scan: Scan, latent: int, row: dict[str, Any], letters: str) -> None:
    acts_R = scan.acts_RN[:, latent]
    fires_R = acts_R > 0
    assert (row["latent"], row["firing"]) == (latent, fires_R.sum())
    assert row["largest"] == acts_R.max()
    assert row["max"] == (scan.maximum_N[latent] or acts_R.max())
    if not row["firing"]:
        assert row["mean_active"] is row["letters"] is row["deciles"] is None
        assert sum(row["histogram"]) == 0
        return
    assert row["mean_active"] == pytest.approx(acts_R[fires_R].mean(), rel=1e-5)
    bands = [scan.band(value, latent) for value in acts_R[fires_R]]
    assert row["band_counts"] == np.bincount(bands, minlength=4).tolist()
    assert sum(row["histogram"]) == row["firing"]
    text = "".join(scan.sequences)
    mine = [text[r] for r in np.flatnonzero(fires_R)]
    assert row["letters"] == pytest.approx([mine.count(letter) / len(mine) for letter in letters], rel=1e-6)
    lengths = np.array([len(scan.sequences[p]) for p in scan.protein_R[fires_R]])
    assert row["mean_length"] == pytest.approx(lengths.mean(), rel=1e-6)
    tenth = (scan.position_R[fires_R] - 1) * 10 // lengths
    assert row["deciles"] == pytest.approx(np.bincount(tenth, minlength=10) / len(mine), rel=1e-6)


@pytest.mark.parametrize(
    ("one_per", "split"), [("protein", "train"), pytest.param("cluster", "heldout", marks=pytest.mark.slow)]
)
def test_examples_are_those_of_a_scan_and_bytes_do_not_depend_on_pieces_or_kills(
    plmsae: Plmsae, trained: Callable[..., Path], tmp_path: Path, one_per: str, split: str
) -> None:
    options = f"{OPTIONS}, one_per: {one_per}, split: {split}{', clusters: kmer' if one_per == 'cluster' else ''}"
    path = trained(options)
    run = tmp_path / "runs" / "one"
    done = plmsae("eval", path, "--no-progress")
    assert done.code == 0, done.err
    scan = Scan(path, tmp_path, heldout=split == "heldout")
    check(scan, run, one_per)
    assert (0 < len(set(scan.cluster_P)) < len(scan.sequences)) == (one_per == "cluster")
    first = final(run)
    assert len(first) > 5
    assert "nothing to do" in (again := plmsae("eval", path, "--no-progress")).err + again.out

    # The planner's bounds hold.
    figures = plan_stage("eval", load(path).experiment, Store()).figures
    folder = run / "eval" / "features"
    rows = [pq.read_metadata(file).num_rows for file in (folder / "examples").glob("group-*")]
    assert sum(rows) <= figures["features, examples"]
    lists = sum(file.stat().st_size for file in (folder / "select").iterdir())
    assert lists <= figures["features, candidate_bytes"] + 5000  # headers
    assert figures["features, rows"] == len(scan.acts_RN)

    # Five pieces, lists of a few latents at a time, files of a few activations, every task killed before its record.
    shutil.rmtree(run / "eval" / "features")
    path = trained(f"{options}, tasks: 5, memory: 20kB")
    experiment, store = load(path).experiment, Store()
    context = LocalContext(experiment, lambda *_, **__: None)
    tasks = list(plan_stage("eval", experiment, store).tasks)
    assert sum(task.args["axis"] == "features" for task in tasks) == 22 + (one_per == "cluster")
    for task in tasks:
        work_on(task, context)
        publish(task, context, work_on(task, context))
    assert len(list((run / "eval" / "features" / "select").glob("0of5-*"))) > 1
    assert len(list((run / "eval" / "features" / "gather").glob("0of5-*"))) > 1
    assert final(run) == first
    # A record lost later, of a task in the middle: what follows from it is there, and it leaves the same.
    (lost,) = (run / "parts").glob("features-*-gather-2of5.json")
    lost.unlink()
    for task in plan_stage("eval", experiment, store).tasks:
        run_task(task, context)
    assert final(run) == first


def annotated_table(path: Path, sequences: list[str]) -> None:
    """W is an active site; C and two residues to either side are a domain."""
    lines = ["Entry\tSequence\tActive site\tDomain [FT]"]
    for number, text in enumerate(sequences):
        sites = "; ".join(f'ACT_SITE {i}; /note="Nucleophile"' for i, letter in enumerate(text, 1) if letter == "W")
        places = [(max(1, i - 2), min(len(text), i + 2)) for i, letter in enumerate(text, 1) if letter == "C"]
        domains = "; ".join(f'DOMAIN {a}..{b}; /note="SH3"' for a, b in places)
        lines.append(f"A{number}\t{text}\t{sites}\t{domains}")
    path.write_text("\n".join(lines) + "\n")


def test_concepts_are_counted_at_every_threshold_and_examples_say_what_is_annotated(
    plmsae: Plmsae, trained: Callable[..., Path], tmp_path: Path
) -> None:
    draw = random.Random(2)
    others = ["".join(draw.choices("ACDEFGHIKLMNPQRSTVWY", k=80)) for _ in range(40)]
    trained(OPTIONS)
    in_training = (tmp_path / "p.fasta").read_text().split("\n")[1:90:2]
    annotated_table(tmp_path / "table.tsv", [*others, *in_training])
    more = "min_instances: 10, keep_instances: 5, nulls: [], bootstraps: 10, split: random"
    concepts = f"{{annotations: {tmp_path}/table.tsv, {more}}}"
    path = trained(f"{OPTIONS}, tasks: 2, concepts: 2")
    path.write_text(path.read_text().replace("features:", f"concepts: {concepts}, features:"))
    done = plmsae("eval", path, "--no-progress")
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "one" / "eval"
    published = {(r["latent"], r["concept"]): r for r in pq.read_table(folder / "latent_concepts.parquet").to_pylist()}
    counted = pq.read_table(folder / "features" / "concepts.parquet").to_pylist()
    assert len(counted) == sum(row["rank"] <= 2 for row in published.values()) > 50
    thresholds = json.loads((folder / "features" / "index.json").read_text())["concepts"]["thresholds"]
    for row in counted:
        known = published[row["latent"], row["concept"]]
        above = thresholds.index(pytest.approx(known["threshold"])) + 1
        inside, outside, found = (np.array(row[name]) for name in ("inside", "outside", "found"))
        assert inside[above:].sum() / max(1, inside[above:].sum() + outside[above:].sum()) == known["precision"]
        assert found[above:].sum() / found.sum() == pytest.approx(known["recall"], rel=1e-12)
        assert min(inside.min(), outside.min(), found.min()) >= 0
    assert len({int(inside.sum() + outside.sum())}) == 1

    best = {row["latent"]: row["concept"] for row in counted if row["rank"] == 1}
    scan = Scan(path, tmp_path)
    known_P = {p for p, text in enumerate(scan.sequences) if text in in_training}
    seen = set()
    for file in sorted((folder / "features" / "examples").glob("group-*")):
        for row in pq.read_table(file).to_pylist():
            text, here = scan.sequences[row["protein"]], row["position"] - 1
            expected = None
            if row["protein"] in known_P and row["latent"] in best:
                near = "W" if best[row["latent"]].startswith("Active") else "C"
                around = text[here] if near == "W" else text[max(0, here - 2) : here + 3]
                expected = near in around
            assert row["annotated"] is expected
            seen.add(expected)
    assert seen == {None, True, False}
    ranges = pq.read_table(folder / "features" / "examples" / "annotations.parquet").to_pylist()
    assert {row["protein"] for row in ranges} <= known_P
    assert all(scan.sequences[r["protein"]][r["start"] - 1] == "W" for r in ranges if r["concept"].startswith("Active"))
    check_export(plmsae, folder, list(published.values()))
    # Another number of concepts reads no row again.
    times = {part.name: part.stat().st_mtime_ns for part in (folder.parent / "parts").glob("features-*-gather-*")}
    path.write_text(path.read_text().replace("concepts: 2", "concepts: 1"))
    assert plmsae("eval", path, "--no-progress").code == 0
    assert {p.name: p.stat().st_mtime_ns for p in (folder.parent / "parts").glob("features-*-gather-*")} == times
    assert pq.read_table(folder / "features" / "concepts.parquet")["rank"].to_pylist() == [1] * len(best)


def check_export(plmsae: Plmsae, folder: Path, published: list[dict[str, Any]]) -> None:
    """The table has every pair once, every latent at least once, and says of it what latents.parquet does."""
    csv, parquet = folder / "table.csv", folder / "table.parquet"
    done = plmsae("export", folder.parent, "--csv", csv, "--parquet", parquet)
    assert done.code == 0, done.err
    rows = pq.read_table(parquet).to_pylist()
    latents = pq.read_table(folder / "latents.parquet").to_pylist()
    assert [row for row in rows if row["concept"] is None] == [
        row for row in rows if row["latent"] not in {one["latent"] for one in published}
    ]
    pairs = [{name: row[name] for name in published[0]} for row in rows if row["concept"] is not None]
    assert pairs == sorted(published, key=lambda one: (one["latent"], one["rank"]))
    assert sorted({row["latent"] for row in rows}) == list(range(len(latents)))
    assert all(row["density"] == latents[row["latent"]]["density"] for row in rows)
    with csv.open(newline="") as file:
        text = list(DictReader(file))
    assert [int(row["latent"]) for row in text] == [row["latent"] for row in rows]
    assert [row["concept"] or None for row in text] == [row["concept"] for row in rows]
    assert plmsae("export", folder.parent).code == plmsae("export", "absent", "--csv", csv).code == 2


def test_descriptions_are_asked_for_and_scored_on_unseen_proteins(
    plmsae: Plmsae, trained: Callable[..., Path], tmp_path: Path
) -> None:
    path = trained(OPTIONS + ", clusters: kmer, describe: {examples: 2, heldout: 4, window: 5}")
    done = plmsae("eval", path, "--no-progress")
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "one" / "eval" / "features"
    latents = pq.read_table(folder / "latents.parquet").to_pylist()
    prompts = [json.loads(line) for line in (folder / "describe" / "prompts.jsonl").read_text().splitlines()]
    assert [p["latent"] for p in prompts] == [row["latent"] for row in latents if row["firing"]]
    scan = Scan(path, tmp_path, heldout=True)
    truth = pq.read_table(folder / "describe" / "truth.parquet").to_pylist()
    asked = [json.loads(line) for line in (folder / "describe" / "scoring.jsonl").read_text().splitlines()]
    assert [row["example"] for row in truth] == [row["example"] for row in asked]
    kinds = dict.fromkeys(("firing", "family", "any"), 0)
    for row, question in zip(truth, asked, strict=True):
        assert row["activation"] == scan.acts_RN[row["row"], row["latent"]]
        text, here = scan.sequences[scan.protein_R[row["row"]]], scan.position_R[row["row"]] - 1
        assert question["sequence"] == text[max(0, here - 5) : here + 6]
        assert question["sequence"][question["residue"] - 1] == text[here]
        assert row["kind"] != "firing" or row["activation"] > 0
        kinds[row["kind"]] += 1
        assert "activation" not in question
    assert min(kinds.values()) > 20

    # Answers: the truth for one latent, noise for another, nothing for the rest.
    sure, unsure = latents_with_both = [n for n in {r["latent"] for r in truth} if _varies(truth, n)][:2]
    draw = random.Random(0)
    guess = {r["example"]: 3 * r["activation"] if r["latent"] == sure else draw.choice([0, 1, 5]) for r in truth}
    with (tmp_path / "said.jsonl").open("w") as said, (tmp_path / "guess.jsonl").open("w") as guessed:
        said.write(json.dumps({"latent": sure, "description": "tryptophan"}) + "\n")
        for row in truth:
            if row["latent"] in latents_with_both:
                guessed.write(json.dumps({"example": row["example"], "activation": guess[row["example"]]}) + "\n")
    answers = f"window: 5, descriptions: {tmp_path}/said.jsonl, predictions: {tmp_path}/guess.jsonl"
    path.write_text(path.read_text().replace("window: 5", answers))
    done = plmsae("eval", path, "--no-progress")
    assert done.code == 0, done.err
    latents = pq.read_table(folder / "latents.parquet").to_pylist()
    assert latents[sure]["description"] == "tryptophan"
    assert latents[sure]["description_pearson"] == pytest.approx(1)
    assert latents[sure]["description_spearman"] == pytest.approx(1)
    mine = [row for row in truth if row["latent"] == unsure]
    pair = [guess[row["example"]] for row in mine], [row["activation"] for row in mine]
    assert latents[unsure]["description_pearson"] == pytest.approx(pearsonr(*pair)[0], abs=1e-5)
    assert latents[unsure]["description_spearman"] == pytest.approx(spearmanr(*pair)[0], abs=1e-5)
    assert sum(row["description_pearson"] is not None for row in latents) == 2
    assert "descriptions" in json.loads((folder / "index.json").read_text())["parts"]

    for wrong, said in (("not JSON", "said.jsonl, line 1"), ('{"latent": 9999, "description": "x"}', "latent 9999")):
        (tmp_path / "said.jsonl").write_text(wrong + "\n")
        done = plmsae("eval", path, "--no-progress")
        assert done.code != 0
        assert said in done.err


def _varies(truth: list[dict[str, Any]], latent: int) -> bool:
    return len({row["activation"] for row in truth if row["latent"] == latent}) > 4


@pytest.mark.slow
def test_four_workers_write_what_one_writes(plmsae: Plmsae, trained: Callable[..., Path], tmp_path: Path) -> None:
    found = []
    for workers in (1, 4):
        path = trained(f"{OPTIONS}, tasks: 4", more=f"launch: {{workers: {workers}, gpus: 0}}\n")
        shutil.rmtree(tmp_path / "runs" / "one" / "eval", ignore_errors=True)
        for part in (tmp_path / "runs" / "one" / "parts").glob("features-*"):
            part.unlink()
        # Workers are processes of their own, with blocks of the usual size.
        reading._BLOCK_ROWS = 4096
        done = plmsae("eval", path, "--no-progress")
        assert done.code == 0, done.err
        found.append(final(tmp_path / "runs" / "one"))
    assert found[0] == found[1]
