"""A dictionary built to fire exactly on known residues: `plmsae eval` finds it first, with the scores worked out by hand."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from plmsae_cli.config.yaml import load
from plmsae_cli.executors.pipeline import plan_stage
from plmsae_cli.executors.worker import LocalContext, run_task
from plmsae_cli.plm.alphabet import encode, pack
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.runtime.task import Task
from plmsae_cli.sae.export import to_state
from plmsae_cli.sae.topk import TopK
from plmsae_cli.store.fs import Store
from plmsae_cli.store.proteins import read_proteins
from plmsae_cli.store.tensorfile import TensorFile, write_tensors

Plmsae = Callable[..., Any]
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
LATENTS = 64
BACKGROUND = "ADEFGHIKLNPQRSTVY"  # without W, C and M, which are planted
CONCEPTS = """
eval:
  fidelity: {{loss_recovered: false}}
  concepts:
    {{annotations: {table}, min_instances: 10, keep_instances: 10, split: random, nulls: [{nulls}], tasks: {tasks},
      bootstraps: 200}}
"""


def latent_of(letter: str) -> int:
    """Places that no order of letters suggests."""
    return (7 * LETTERS.index(letter) + 3) % LATENTS


def proteins(number: int) -> list[dict[str, Any]]:
    """Random proteins; W is the active site but for every third protein, where A is; C lies in domains of five residues."""
    chosen = random.Random(0)
    made = []
    for index in range(number):
        letters = chosen.choices(BACKGROUND, k=60)
        for place in range(4, 60, 10):  # a C in the middle of each stretch of ten
            letters[place] = "C"
        letters[9] = letters[29] = "W"
        if index % 3 == 0:
            letters[49] = "A"
        sites = [50] if index % 3 == 0 else [10, 30]
        domains = [(place - 1, place + 3) for place in (4, 24, 44)]  # from 1, inclusive: C and two residues either side
        made.append({"id": f"P{index:03}", "sequence": "".join(letters), "sites": sites, "domains": domains})
    return made


def write_table(path: Path, made: list[dict[str, Any]]) -> None:
    lines = ["Entry\tSequence\tActive site\tDomain [FT]"]
    for one in made:
        sites = "; ".join(f'ACT_SITE {s}; /note="Nucleophile"; /evidence="ECO:1"' for s in one["sites"])
        domains = "; ".join(f'DOMAIN {a}..{b}; /note="SH3 {n}"' for n, (a, b) in enumerate(one["domains"], 1))
        lines.append(f"{one['id']}\t{one['sequence']}\t{sites}\t{domains}")
    path.write_text("\n".join(lines) + "\n")


def plant(run: Path, weights: Path) -> None:
    """Replace the run's dictionary by one whose latents are indicators of letters: layer 0 depends on the letter alone."""
    model = load_plm(str(weights))
    packed = pack([encode(LETTERS)])
    x_LD = model(packed.tokens_T, packed.documents, layers=[0]).hidden[0][1:-1].detach().double()
    sae = TopK(x_LD.shape[1], LATENTS, k=4)
    state, _ = to_state(sae)
    inverse_DL = torch.linalg.pinv(x_LD)
    for place, letter in enumerate(LETTERS):
        state["w_enc_ND"][latent_of(letter)] = inverse_DL[:, place].float()
        state["b_enc_N"][latent_of(letter)] = -0.5
        state["maximum_N"][latent_of(letter)] = 0.5
    state["w_dec_ND"].fill_(x_LD.shape[1] ** -0.5)
    write_tensors(Store(), str(run / "sae" / "sae.safetensors"), state, {"format": "plmsae.sae/1"})


@pytest.fixture
def trained(plmsae: Plmsae, write: Callable[..., Path], shared: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A trained run on layer 0 whose dictionary was replaced; gives the experiment with an eval section."""

    def make(evaluation: str) -> Path:
        path = write(evaluation="")
        text = path.read_text().replace("layers: [2]", "layers: [0]")
        path.write_text(text)
        if not (tmp_path / "runs" / "one" / "sae").exists():
            done = plmsae("run", path, "--no-progress")
            assert done.code == 0, done.err
            plant(tmp_path / "runs" / "one", shared["weights"])
        path.write_text(text + evaluation)
        return path

    return make


def test_planted_concepts_are_found_first_with_the_scores_of_counting(
    plmsae: Plmsae, trained: Callable[..., Path], tmp_path: Path
) -> None:
    made = proteins(40)
    write_table(tmp_path / "table.tsv", made)
    path = trained(
        CONCEPTS.format(table=tmp_path / "table.tsv", nulls="residual, pca, random_model, shuffled", tasks=1)
    )
    done = plmsae("eval", path, "--no-progress")
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "one" / "eval"
    half = {row["id"]: row["concepts_half"] for row in pq.read_table(folder / "proteins.parquet").to_pylist()}
    test = [one for one in made if half[one["id"]] == "test"]
    assert 15 < len(test) < 25
    result = json.loads((folder / "metrics.json").read_text())["concepts"]
    best = {row["concept"]: row for row in result["best"]}

    # Active site: W fires twice a protein, and is right in those whose site it is.
    right = sum(len(one["sites"]) for one in test if len(one["sites"]) == 2)
    precision, recall = right / (2 * len(test)), right / sum(len(one["sites"]) for one in test)
    row = best["Active site: Nucleophile"]
    assert row["latent"] == latent_of("W")
    assert (row["precision"], row["recall"]) == pytest.approx((precision, recall))
    assert row["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert row["interval_f1"][0] < row["f1"] < row["interval_f1"][1]

    # Domain: six C a protein, three of them in a domain each; all domains are hit.
    row = best["Domain [FT]: SH3"]
    assert row["latent"] == latent_of("C")
    assert (row["precision"], row["recall"], row["f1"]) == pytest.approx((0.5, 1.0, 2 / 3))
    assert row["interval_f1"] == pytest.approx([2 / 3, 2 / 3])
    # By residue: C is one of a domain's five residues.
    positives, others = 15 * len(test), 45 * len(test)
    hit, false = 3 * len(test), 3 * len(test)
    wins = hit * (others - false) + (hit * false + (positives - hit) * (others - false)) / 2
    assert row["auroc"] == pytest.approx(wins / (positives * others))

    amino = {row["concept"]: row for row in result["amino_acids"]}
    for letter in "WCAY":
        assert (amino[f"Amino acid: {letter}"]["latent"], amino[f"Amino acid: {letter}"]["f1"]) == (
            latent_of(letter),
            1.0,
        )
    assert set(result["codes"]) == {"sae", "residual", "pca", "random_model", "shuffled"}
    assert result["codes"]["sae"]["latents"] == LATENTS
    assert result["codes"]["residual"]["latents"] == result["codes"]["random_model"]["latents"] == 64
    shuffled = dict(zip(best, result["codes"]["shuffled"]["f1"], strict=True))
    assert shuffled["Active site: Nucleophile"] < 0.5 * best["Active site: Nucleophile"]["f1"]

    latents = pq.read_table(folder / "latents.parquet").to_pylist()
    assert latents[latent_of("C")]["concept"].startswith("Domain [FT]")
    assert latents[latent_of("C")]["concept_f1"] == pytest.approx(2 / 3)
    assert latents[latent_of("W")]["concept"].startswith("Active site")
    assert latents[0]["density"] == 0  # of the other axis
    assert latents[0]["concept"] is None
    with (folder / "concepts.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if int(row["latent"]) == latent_of("W")]
    assert rows[0]["concept"].startswith("Active site")
    assert float(rows[0]["f1"]) == pytest.approx(best["Active site: Nucleophile"]["f1"], abs=1e-4)
    assert "## Concepts (strict)" in (folder / "model_card.md").read_text()
    page = (tmp_path / "runs" / "one" / "report" / "index.html").read_text()
    table = page[
        page.index('<section id="concepts">') : page.index("</section>", page.index('<section id="concepts">'))
    ]
    assert re.search(rf">Domain \[FT\]: SH3</td>\s*<td[^>]*>{latent_of('C')}</td>", table)
    assert 'data-sort="0.6666666666666666">0.667' in table
    assert table.count("<svg") == 2
    assert not re.search(r"(src|href)=\"https?:", page)

    # A table too small, and one without columns of features, are told apart.
    path.write_text(path.read_text().replace("min_instances: 10", "min_instances: 1000"))
    assert "occurs 1000 times in the 40 proteins" in plmsae("eval", path, "--no-progress").err
    lines = ["Entry\tSequence", *(f"{one['id']}\t{one['sequence']}" for one in made)]
    (tmp_path / "table.tsv").write_text("\n".join(lines) + "\n")
    assert "nothing is known of the residues of the 40" in plmsae("eval", path, "--no-progress").err


def test_the_number_of_pieces_redoes_nothing_and_one_axis_does_not_redo_another(
    plmsae: Plmsae, trained: Callable[..., Path], tmp_path: Path
) -> None:
    write_table(tmp_path / "table.tsv", proteins(30))
    fill = {"table": tmp_path / "table.tsv", "nulls": "residual, shuffled"}
    path = trained(CONCEPTS.format(**fill, tasks=1))
    assert plmsae("eval", path, "--no-progress").code == 0
    folder = tmp_path / "runs" / "one"
    times = {name: (folder / "parts" / name).stat().st_mtime_ns for name in _parts(folder, "fidelity")}
    path = trained(CONCEPTS.format(**fill, tasks=3))
    again = plmsae("eval", path, "--no-progress")
    assert "nothing to do" in again.err + again.out
    # A piece that was lost is another matter, whatever the number asked for.
    path = trained(CONCEPTS.format(**fill, tasks=1))
    lost = next((folder / "eval" / "concepts" / "counts").glob("sae-*"))
    counts = lost.read_bytes()
    lost.unlink()
    assert plmsae("eval", path, "--no-progress").code == 0
    assert lost.read_bytes() == counts
    # Without the axis its tables go, and fidelity stays as it was.
    path = trained("\neval: {fidelity: {loss_recovered: false}}\n")
    assert plmsae("eval", path, "--no-progress").code == 0
    assert "concepts" not in json.loads((folder / "eval" / "metrics.json").read_text())
    assert not (folder / "eval" / "latent_concepts.parquet").exists()
    assert {name: (folder / "parts" / name).stat().st_mtime_ns for name in _parts(folder, "fidelity")} == times


def _parts(folder: Path, axis: str) -> list[str]:
    found = sorted(path.name for path in (folder / "parts").glob(f"{axis}-*.json"))
    assert found
    return found


def test_a_planted_family_is_found_first_with_the_scores_of_counting(
    plmsae: Plmsae, trained: Callable[..., Path], tmp_path: Path
) -> None:
    # W marks the family but for every fifth member, and also every fourth of the other proteins.
    chosen = random.Random(1)
    made, labels = [], ["id,family"]
    for index in range(120):
        letters = chosen.choices(BACKGROUND, k=40)
        member = index % 2 == 0
        marked = index % 10 != 0 if member else index % 8 == 1
        if marked:
            letters[index % 40] = "W"
        made.append((f"P{index}", "".join(letters), member, marked))
        labels.append(f"P{index},{'SH2;all' if member else 'PDZ;all'}")
    (tmp_path / "p.fasta").write_text("".join(f">sp|{name}|X_Y\n{s}\n" for name, s, _, _ in made))
    (tmp_path / "labels.csv").write_text("\n".join(labels) + "\n")
    path = trained(
        f"\neval:\n  fidelity: {{loss_recovered: false}}\n  families: {{proteins: {tmp_path / 'p.fasta'}, "
        f"labels: {tmp_path / 'labels.csv'}, clusters: kmer, top: 5, tasks: 2}}\n"
    )
    done = plmsae("eval", path, "--no-progress")
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "one" / "eval"
    half = {row["id"]: row["families_half"] for row in pq.read_table(folder / "proteins.parquet").to_pylist()}
    test = [one for one in made if half[one[0]] == "test"]
    hits = sum(member and marked for _, _, member, marked in test)
    precision, recall = hits / sum(one[3] for one in test), hits / sum(one[2] for one in test)
    row = pq.read_table(folder / "latents.parquet").to_pylist()[latent_of("W")]
    assert (row["family"], row["pattern"]) == ("SH2", "point")
    assert (row["family_precision"], row["family_recall"]) == pytest.approx((precision, recall))
    assert row["family_f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    result = json.loads((folder / "metrics.json").read_text())["families"]
    assert result["classes"] == 3
    by_class = {one["family"]: one for one in result["by_class"]}
    assert by_class["SH2"]["latent"] == latent_of("W")
    share = sum(one[2] for one in test) / len(test)
    assert by_class["SH2"]["chance"] == pytest.approx(2 * share / (1 + share))
    assert result["found"] == sum(one["f1"] > 0.5 for one in by_class.values())
    best = [one for one in result["best"] if one["family"] == "SH2"]
    assert best[0]["latent"] == latent_of("W")
    assert best[0]["interval_f1"][0] < best[0]["f1"] < best[0]["interval_f1"][1]
    assert result["patterns"]["dead"] == LATENTS - len(BACKGROUND) - 1
    first = (folder / "families" / "result.json").read_bytes()
    shutil.rmtree(folder / "families")
    path.write_text(path.read_text().replace("tasks: 2", "tasks: 1"))
    assert plmsae("eval", path, "--no-progress").code == 0
    assert (folder / "families" / "result.json").read_bytes() == first


def test_planted_probes_are_the_best_single_latents(
    plmsae: Plmsae, trained: Callable[..., Path], tmp_path: Path
) -> None:
    made = proteins(60)
    write_table(tmp_path / "table.tsv", made)
    labels = [f"{one['id']}\t{'enzyme' if len(one['sites']) == 1 else 'other'}" for one in made]
    (tmp_path / "go.tsv").write_text("\n".join(labels) + "\n")
    path = trained(
        f"\neval:\n  fidelity: {{loss_recovered: false}}\n  probes: {{proteins: {tmp_path / 'table.tsv'}, "
        f"labels: {tmp_path / 'go.tsv'}, clusters: kmer, min_instances: 10}}\n"
    )
    done = plmsae("eval", path, "--no-progress")
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "runs" / "one" / "eval" / "metrics.json").read_text())["probes"]
    found = {row["target"]: row for row in result["targets"]}
    assert set(found) == {"Active site", "Domain [FT]", "enzyme", "other"}
    assert found["Active site"]["latent"] == latent_of("W")
    assert found["Domain [FT]"]["latent"] == latent_of("C")
    assert (found["enzyme"]["of"], found["Active site"]["of"]) == ("protein", "residue")
    # W fires on 2 of 60 residues of every protein, and C on three residues of each fifteen in domains, three others.
    positives, rows = 15, 60
    wins = 3 * (45 - 3) + (3 * 3 + 12 * 42) / 2
    assert found["Domain [FT]"]["auroc_single"] == pytest.approx(wins / (positives * (rows - positives)))
    assert 40 < result["proteins"]["train"] < 56
    halves = pq.read_table(tmp_path / "runs" / "one" / "eval" / "proteins.parquet")["probes_half"].to_pylist()
    assert [halves.count(half) for half in ("train", "test")] == [
        result["proteins"][half] for half in ("train", "test")
    ]
    for row in found.values():
        low, high = row["interval_auroc_single"]
        assert low <= row["auroc_single"] <= high
    # Every protein has as many W and C in and out of domains: nothing depends on which proteins are drawn.
    assert found["Domain [FT]"]["interval_auroc_single"] == pytest.approx([found["Domain [FT]"]["auroc_single"]] * 2)
    assert found["Active site"]["auroc_single_null"] < 0.7 < found["Active site"]["auroc_single"]


def test_own_proteins_are_encoded_residue_by_residue(
    plmsae: Plmsae, trained: Callable[..., Path], tmp_path: Path
) -> None:
    own = {"one": "WAC", "two": "CCYWY", "three": "A" * 9 + "W"}
    (tmp_path / "mine.fasta").write_text("".join(f">{name}\n{sequence}\n" for name, sequence in own.items()))
    write_table(tmp_path / "table.tsv", proteins(30))
    section = f"  encode: {{fasta: {tmp_path / 'mine.fasta'}, max_length: 9, top: 2, tasks: 2}}\n"
    path = trained(CONCEPTS.format(table=tmp_path / "table.tsv", nulls="", tasks=1) + section)
    done = plmsae("eval", path, "--no-progress")
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "one" / "eval"
    found = pq.read_table(folder / "encode" / "activations").to_pylist()
    wanted = {(name, place, latent_of(letter)) for name, s in own.items() for place, letter in enumerate(s[:9], 1)}
    assert {(row["protein"], row["residue"], row["latent"]) for row in found} == wanted
    assert len(found) == len(wanted)
    assert [row["activation"] for row in found] == pytest.approx([0.5] * len(found), abs=1e-4)
    top = pq.read_table(folder / "top_latents.parquet").to_pylist()
    by_rank = {(row["protein"], row["rank"]): row for row in top}
    assert set(by_rank) == {("one", 1), ("one", 2), ("two", 1), ("two", 2), ("three", 1)}
    assert (by_rank["three", 1]["latent"], by_rank["three", 1]["residue"]) == (latent_of("A"), 1)
    concept = {row["latent"]: row["concept"] for row in pq.read_table(folder / "latents.parquet").to_pylist()}
    assert all(row["concept"] == concept[row["latent"]] for row in top)
    body = json.loads((folder / "metrics.json").read_text())["encode"]
    assert body == {"proteins": 3, "in_training": 0, "cut": 1, "residues": 17, "active": 17}
    # Another file, begun in three pieces and ended in one: the folder holds what was asked for last.
    kept = folder / "encode" / "activations"
    (tmp_path / "mine.fasta").write_text(">four\nWWA\n" + (tmp_path / "mine.fasta").read_text())
    path.write_text(path.read_text().replace("top: 2, tasks: 2", "top: 2, tasks: 3"))
    piece = next(task for task in planned(path) if task.args["step"] == "part-0of3")
    run_task(piece, LocalContext(load(path).experiment, lambda *_, **__: None))
    assert {place.name.partition("-")[0] for place in kept.iterdir()} >= {"0of2", "0of3"}
    path.write_text(path.read_text().replace("top: 2, tasks: 3", "top: 2, tasks: 1"))
    assert plmsae("eval", path, "--no-progress").code == 0
    assert {place.name.partition("-")[0] for place in kept.iterdir()} == {"0of1"}
    assert len(pq.read_table(kept)) == 20


def test_the_latents_of_the_best_concepts_are_steered(
    plmsae: Plmsae, trained: Callable[..., Path], tmp_path: Path
) -> None:
    write_table(tmp_path / "table.tsv", proteins(30))
    section = "  steering: {latents: concepts, top: 3, proteins: 3}\n"
    path = trained(CONCEPTS.format(table=tmp_path / "table.tsv", nulls="", tasks=1) + section)
    done = plmsae("eval", path, "--no-progress")
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "one" / "eval"
    latents = pq.read_table(folder / "latents.parquet").to_pylist()
    known = [row for row in latents if row["concept_f1"] is not None]
    best = sorted(known, key=lambda row: -row["concept_f1"])[:3]
    assert {row["latent"] for row in best} == {row["latent"] for row in latents if row["steering_kl"] is not None}


@pytest.mark.slow
def test_killed_in_an_axis_and_in_the_merge_it_ends_as_if_nothing_had_been(
    start: Callable[..., Any], plmsae: Plmsae, trained: Callable[..., Path], tmp_path: Path
) -> None:
    write_table(tmp_path / "table.tsv", proteins(30))
    path = trained(CONCEPTS.format(table=tmp_path / "table.tsv", nulls="residual", tasks=2))
    tasks = {task.args["step"] or task.args["axis"]: task.id for task in planned(path)}
    folder = tmp_path / "runs" / "one"
    for fault in (f"{tasks['count-1of2']}.written", f"{tasks['choose']}.begin", f"{tasks['merge']}.written"):
        process = start("eval", path, "--no-progress", PLMSAE_FAULT=f"kill:eval.{fault}")
        assert process.wait() == -9, process.log
    assert len(planned(path)) == 1  # the merge: all else is done
    assert plmsae("eval", path, "--no-progress").code == 0
    names = ("latents.parquet", "latent_concepts.parquet", "proteins.parquet", "metrics.json", "concepts.csv")
    killed = {name: (folder / "eval" / name).read_bytes() for name in names}
    shutil.rmtree(folder / "eval")
    assert plmsae("eval", path, "--no-progress").code == 0
    assert {name: (folder / "eval" / name).read_bytes() for name in names} == killed


def planned(path: Path) -> list[Task]:
    """What is left to do."""
    return list(plan_stage("eval", load(path).experiment, Store()).tasks)


def test_a_planted_reconstruction_has_the_fidelity_worked_out_by_hand(
    plmsae: Plmsae, trained: Callable[..., Path], shared: dict[str, Path], tmp_path: Path
) -> None:
    """Latents that tell letters, decoder rows that give half of each letter's activation back: the error is half of it, too."""
    path = trained("\neval: {fidelity: {proteins: 3}}\n")
    run = tmp_path / "runs" / "one"
    model = load_plm(str(shared["weights"]))
    packed = pack([encode(LETTERS)])
    with torch.inference_mode():
        x_LD = model(packed.tokens_T, packed.documents, layers=[0]).hidden[0][1:-1]
    file = TensorFile(Store(), str(run / "sae" / "sae.safetensors"))
    state = {name: file.read(name) for name in file.names()}
    for place, letter in enumerate(LETTERS):
        state["w_dec_ND"][latent_of(letter)] = x_LD[place]  # a latent is .5 where its letter is
    state["b_dec_D"].zero_()
    write_tensors(Store(), str(run / "sae" / "sae.safetensors"), state, dict(file.metadata))
    done = plmsae("eval", path, "--no-progress")
    assert done.code == 0, done.err
    found = json.loads((run / "eval" / "metrics.json").read_text())["fidelity"]
    folder = json.loads((run / "artifacts.json").read_text())["optimize"]["folder"]
    texts = {
        side: "".join(read_proteins(Store(), f"{folder}/proteins.parquet", split=side)["sequence"].to_pylist())
        for side in ("train", "heldout")
    }
    letters = sorted(set(texts["train"] + texts["heldout"]))
    packed = pack([encode("".join(letters))])
    with torch.inference_mode():
        x_AD = model(packed.tokens_T, packed.documents, layers=[0]).hidden[0][1:-1].double()
    place = {letter: n for n, letter in enumerate(letters)}
    rows = {side: x_AD[[place[letter] for letter in text]] for side, text in texts.items()}
    known_R = torch.tensor([letter in LETTERS for letter in texts["heldout"]])  # no latent tells X
    share = float(known_R.double().mean())
    assert (found["spliced_identity"], found["l0_mean"]) == ("exact", pytest.approx(share))
    assert found["cosine"] == pytest.approx(share, abs=1e-5)
    energy_R = rows["heldout"].square().sum(1)
    variance = (rows["heldout"] - rows["train"].mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(float(torch.where(known_R, energy_R / 4, energy_R).sum() / variance), rel=1e-4)
    low, high = found["interval_fvu"]
    assert low < found["fvu"] < high
