"""Contacts and steering through the command line: a dictionary that loses nothing, a latent whose effect is known."""

from __future__ import annotations

import csv
import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from plmsae_cli.evaluation.contacts.jacobian import coupling, jacobian
from plmsae_cli.plm.alphabet import AMINO_ACIDS, MASK, encode, pack
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.runtime.masked_scores import masks
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.sae.export import to_state
from plmsae_cli.sae.topk import TopK
from plmsae_cli.store.fs import Store
from plmsae_cli.store.tensorfile import TensorFile, write_tensors
from plmsae_cli.store.weights import save_model

pytest.importorskip("biotite")
Plmsae = Callable[..., Any]
NAMES = "ALA CYS ASP GLU PHE GLY HIS ILE LYS LEU MET ASN PRO GLN ARG SER THR VAL TRP TYR"
THREE = {"ACDEFGHIKLMNPQRSTVWY"[n]: NAMES[4 * n : 4 * n + 3] for n in range(20)}
PLANTED, STRENGTH, MAXIMUM = 71, 2.0, 3.0
D, LATENTS = 32, 128


def write_structure(path: Path, sequence: str, seed: int) -> np.ndarray[Any, Any]:
    """A random walk that fills a small ball, so that far residues touch; gives the CB (CA of glycine) places."""
    draw = np.random.default_rng(seed)
    return write_places(path, sequence, np.round(draw.normal(scale=7.0, size=(len(sequence), 3)), 3))


def write_places(path: Path, sequence: str, places: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A PDB file with CB (CA of glycine) there, CA beside it."""
    lines: list[str] = []
    for number, (letter, place) in enumerate(zip(sequence, places, strict=True), 1):
        for atom in ("CA",) if letter == "G" else ("CA", "CB"):
            x, y, z = place if atom == "CB" or letter == "G" else place + 1.0
            where = f"{THREE[letter]} A{number:4d}    {x:8.3f}{y:8.3f}{z:8.3f}"
            lines.append(f"ATOM  {len(lines) + 1:5d}  {atom:<3} {where}  1.00  0.00           C")
    path.write_text("\n".join([*lines, "END", ""]))
    return places


def lossless(run: Path) -> dict[str, torch.Tensor]:
    """Put a dictionary there whose latents 0 to 63 are the dimensions and their negatives; the others are never active."""
    sae = TopK(D, LATENTS, k=D)
    state, _ = to_state(sae)
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    for name in ("w_enc_ND", "w_dec_ND"):
        state[name].zero_()
        state[name][: 2 * D] = both
    state["w_dec_ND"][2 * D :, 0] = 1.0
    state["b_enc_N"].zero_()
    state["b_enc_N"][2 * D :] = -1e3
    state["b_dec_D"].zero_()
    state["maximum_N"].fill_(0.5)
    write_tensors(Store(), str(run / "sae" / "sae.safetensors"), state, {"format": "plmsae.sae/1"})
    return state


def plant(run: Path, weights: Path) -> torch.Tensor:
    """A dictionary that loses nothing, and has one more latent, never active, that raises W."""
    state = lossless(run)
    x_D = torch.zeros(D, requires_grad=True)
    model = load_plm(str(weights))
    with torch.no_grad():
        packed = pack([encode("MKTWACDEFGHI")])
        x_D.copy_(model(packed.tokens_T, packed.documents, layers=[3]).hidden[3].mean(0))
    logits = model.lm_head(x_D, model.embed_tokens.weight)[4:24].log_softmax(-1)
    (slope_D,) = torch.autograd.grad(logits[AMINO_ACIDS.index("W")], x_D)
    state["w_dec_ND"][PLANTED] = slope_D / slope_D.norm()
    state["maximum_N"][PLANTED] = MAXIMUM
    write_tensors(Store(), str(run / "sae" / "sae.safetensors"), state, {"format": "plmsae.sae/1"})
    return state["w_dec_ND"][PLANTED]


@pytest.fixture
def trained(plmsae: Plmsae, write: Callable[..., Path], shared: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A run on the last layer, its dictionary replaced; gives the experiment with an eval section."""

    def make(evaluation: str, name: str = "one.yaml") -> Path:
        path = write(name, evaluation="")
        text = (
            path.read_text()
            .replace("layers: [2]", "layers: [3]")
            .replace("expansion: 2, k: 4", f"expansion: 4, k: {D}")
        )
        path.write_text(text)
        run = tmp_path / "runs" / path.stem
        if not (run / "sae").exists():
            done = plmsae("run", path, "--no-progress")
            assert done.code == 0, done.err
            plant(run, shared["weights"])
        path.write_text(text + "\neval:\n  fidelity: {loss_recovered: false}\n" + evaluation)
        return path

    return make


def sequences(number: int, length: int) -> list[str]:
    chosen = random.Random(4)
    return ["".join(chosen.choices("ACDEFGHIKLMNPQRSTVWY", k=length)) for _ in range(number)]


@pytest.mark.slow
def test_contacts_of_a_dictionary_that_loses_nothing(
    plmsae: Plmsae, trained: Callable[..., Path], shared: dict[str, Path], tmp_path: Path
) -> None:
    texts = sequences(2, 40)
    files = [tmp_path / "s.pdb", tmp_path / "other" / "s.pdb"]  # of one name, and two structures all the same
    files[1].parent.mkdir()
    places = [write_structure(file, text, n) for n, (file, text) in enumerate(zip(files, texts, strict=True))]
    listed = ", ".join(f"'{file}:A'" for file in files) + f", '{files[0]}'"  # the first once more, without its chain
    path = trained(f"  contacts: {{structures: [{listed}], tasks: 2, batch_tokens: 1500}}\n")
    done = plmsae("eval", path, "--no-progress")
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "one" / "eval"
    body = json.loads((folder / "metrics.json").read_text())["contacts"]
    model = load_plm(str(shared["weights"]))
    for text, where, row in zip(texts, places, body["proteins"], strict=True):
        contact = np.linalg.norm(where[:, None] - where[None], axis=-1) < 8.0
        score = coupling(jacobian(model, encode(text), 3, None, 4000, torch.device("cpu"))).numpy()
        ranked = sorted((-score[i, j], contact[i, j]) for i in range(40) for j in range(i + 24, 40))
        for cut, part in (("L", 1), ("L/2", 2), ("L/5", 5)):
            wanted = sum(hit for _, hit in ranked[: 40 // part]) / (40 // part)
            assert row["precision"]["jacobian"]["original"][cut] == pytest.approx(wanted)
        assert row["precision"]["jacobian"]["sae"] == row["precision"]["jacobian"]["original"]
        assert row["contacts"] == sum(contact[i, j] for i in range(40) for j in range(i + 24, 40))
    cuts = body["methods"]["jacobian"]
    assert any(cut["original"] != cut["zero"] for cut in cuts.values())
    assert all(cut["recovered"] == 1.0 for cut in cuts.values() if "recovered" in cut)
    pairs = pq.read_table(folder / "contacts" / "pairs" / "00000.parquet").to_pylist()
    assert len(pairs) == 16 * 17 / 2
    assert pairs[0]["distance"] == pytest.approx(np.linalg.norm(places[0][0] - places[0][24]), abs=1e-3)
    # The other number of pieces, another order of packs: the same bytes.
    first = (folder / "contacts" / "result.json").read_bytes()
    shutil.rmtree(folder / "contacts")
    path.write_text(path.read_text().replace("tasks: 2", "tasks: 1"))
    assert plmsae("eval", path, "--no-progress").code == 0
    assert (folder / "contacts" / "result.json").read_bytes() == first
    assert "## Contacts" in (folder / "model_card.md").read_text()
    page = (tmp_path / "runs" / "one" / "report" / "index.html").read_text()
    assert '<section id="contacts">' in page
    assert "contacts by jacobian, P@L" in plmsae("status", tmp_path / "runs" / "one").out
    # The attention head does not see the last layer, and these weights have none.
    path.write_text(path.read_text().replace("tasks: 1", "methods: [head]"))
    refused = plmsae("eval", path, "--no-progress")
    assert refused.code == 2
    assert "none reads layer 3, the last" in refused.err
    assert "methods: [jacobian]" in refused.err


def test_a_steering_direction_of_known_effect_is_first(
    plmsae: Plmsae, trained: Callable[..., Path], shared: dict[str, Path], tmp_path: Path
) -> None:
    texts = sequences(6, 30)
    (tmp_path / "p.fasta").write_text("".join(f">p{n}\n{text}\n" for n, text in enumerate(texts)))
    section = (
        f"  steering: {{fasta: {tmp_path / 'p.fasta'}, latents: [3, {PLANTED}, 40, 90], strengths: [{STRENGTH}],"
        " batch_tokens: 70, tasks: 5}\n"
    )
    path = trained(section)
    row_D = plant(tmp_path / "runs" / "one", shared["weights"])
    done = plmsae("eval", path, "--no-progress")
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "one" / "eval"
    model = load_plm(str(shared["weights"]))
    changes, kls = [], []
    for text in texts:  # after the last layer only the head follows
        packed = pack([encode(text)])
        masked = torch.zeros(len(text) + 2, dtype=torch.bool)
        masked[1:-1] = torch.from_numpy(masks(text, 0.15))
        tokens = packed.tokens_T.long().masked_fill(masked, MASK)
        with torch.no_grad():
            x = model(tokens, packed.documents, layers=[3]).hidden[3][masked]
            base, now = (
                model.lm_head(h, model.embed_tokens.weight)[:, 4:24].double().log_softmax(-1)
                for h in (x, x + STRENGTH * MAXIMUM * row_D)
            )
        changes.append((now - base).mean(0))
        kls.append((base.exp() * (base - now)).sum(1).mean())
    effects = {
        (row["latent"], row["readout"]): row
        for row in pq.read_table(folder / "steering" / "effects.parquet").to_pylist()
    }
    assert len(effects) == 4 * 21
    change_A = torch.stack(changes).mean(0)
    for letter, wanted in zip(AMINO_ACIDS, change_A.tolist(), strict=True):
        assert effects[PLANTED, letter]["effect"] == pytest.approx(wanted, abs=1e-5)
    assert effects[PLANTED, "KL"]["effect"] == pytest.approx(float(torch.stack(kls).mean()), abs=1e-5)
    ranked = sorted((key for key in effects if key[1] == "W"), key=lambda key: -effects[key]["effect"])
    assert ranked[0] == (PLANTED, "W")
    best = effects[PLANTED, "W"]
    assert best["effect"] > 0.2
    assert best["flipped"] < 0
    assert abs(best["direction"]) < best["effect"] / 2
    assert best["q"] < 0.01
    latents = pq.read_table(folder / "latents.parquet").to_pylist()
    assert len(latents) == LATENTS
    assert latents[PLANTED]["steering_up"] == "W"
    assert latents[PLANTED]["steering_up_effect"] == pytest.approx(best["effect"])
    assert latents[0]["steering_kl"] is None
    first = (folder / "steering" / "effects.parquet").read_bytes()
    shutil.rmtree(folder / "steering")
    path.write_text(path.read_text().replace("tasks: 5", "tasks: 1"))
    assert plmsae("eval", path, "--no-progress").code == 0
    assert (folder / "steering" / "effects.parquet").read_bytes() == first
    assert "## Steering (add)" in (folder / "model_card.md").read_text()
    assert '<section id="steering">' in (tmp_path / "runs" / "one" / "report" / "index.html").read_text()
    # A list that the dictionary does not have is refused in words.
    path.write_text(path.read_text().replace("90]", "128]"))
    refused = plmsae("eval", path, "--no-progress")
    assert refused.code != 0
    assert "names 128, the dictionary has 128" in refused.err
    # And so is one that never fired: nothing says how far it would be steered.
    weights = str(tmp_path / "runs" / "one" / "sae" / "sae.safetensors")
    file = TensorFile(Store(), weights)
    state = {name: file.read(name) for name in file.names()}
    state["maximum_N"][3] = 0.0
    write_tensors(Store(), weights, state, dict(file.metadata))
    path.write_text(path.read_text().replace("128]", "91]"))
    refused = plmsae("eval", path, "--no-progress")
    assert "eval.steering.latents: 3 never fired on training rows" in refused.err


def test_killed_between_pieces_it_ends_the_same(
    start: Callable[..., Any], plmsae: Plmsae, trained: Callable[..., Path], tmp_path: Path
) -> None:
    from plmsae_cli.config.yaml import load
    from plmsae_cli.executors.pipeline import plan_stage

    path = trained("  steering: {top: 3, proteins: 4, tasks: 2, mode: ablate, residues: active}\n")
    ids = [
        task.id for task in plan_stage("eval", load(path).experiment, Store()).tasks if task.args["axis"] == "steering"
    ]
    process = start("eval", path, "--no-progress", PLMSAE_FAULT=f"kill:eval.{ids[2]}.written")
    assert process.wait() == -9, process.log
    assert plmsae("eval", path, "--no-progress").code == 0
    folder = tmp_path / "runs" / "one" / "eval"
    killed = {name: (folder / name).read_bytes() for name in ("latents.parquet", "steering/effects.parquet")}
    shutil.rmtree(folder)
    assert plmsae("eval", path, "--no-progress").code == 0
    assert {name: (folder / name).read_bytes() for name in killed} == killed


@pytest.mark.slow
def test_evaluations_side_by_side(plmsae: Plmsae, trained: Callable[..., Path], tmp_path: Path) -> None:
    one, two = trained("", "one.yaml"), trained("  steering: {top: 2, proteins: 3}\n", "two.yaml")
    assert plmsae("eval", two, "--no-progress").code == 0
    refused = plmsae("eval", one, two, "--compare")
    assert refused.code == 2
    assert f"plmsae eval {one}" in refused.err
    assert plmsae("eval", one, "--no-progress").code == 0
    done = plmsae("eval", one, two, "--compare", "--json")
    assert done.code == 0, done.err
    body = json.loads(done.out)
    figures = {
        name: json.loads((tmp_path / "runs" / name / "eval" / "metrics.json").read_text()) for name in ("one", "two")
    }
    rows = {row[1]: row[2:] for row in body["rows"]}
    assert body["columns"] == ["axis", "figure", "one", "two"]
    assert rows["FVU"] == [figures["one"]["fidelity"]["fvu"], figures["two"]["fidelity"]["fvu"]]
    assert rows["effects tested"] == [None, 42]  # not measured: blank
    assert "mean best F1" not in rows
    with Path(body["csv"]).open() as file:
        lines = {line["figure"]: line for line in csv.DictReader(file)}
    assert lines["effects tested"]["one"] == ""
    assert float(lines["FVU"]["two"]) == figures["two"]["fidelity"]["fvu"]
    page = Path(body["report"]).read_text()
    assert page.split('<section id="curves">')[0].count("<tr>") == 1 + len(rows)
    assert "http" not in page.replace("http-equiv", "")
    shown = plmsae("eval", one, two, "--compare").out.splitlines()
    assert shown[0].split() == ["axis", "figure", "one", "two"]
    assert plmsae("eval", one, one, "--compare").code == 2
    assert plmsae("eval", one, two).code == 2


def test_structures_of_a_dictionary_that_loses_nothing(
    plmsae: Plmsae, trained: Callable[..., Path], tmp_path: Path
) -> None:
    """Random folding weights, so structures mean nothing; the dictionary with all its latents still changes none of them."""
    pytest.importorskip("transformers")
    pytest.importorskip("tmtools")
    texts = sequences(3, 36)
    (tmp_path / "p.fasta").write_text("".join(f">p{n}\n{text}\n" for n, text in enumerate(texts)))
    section = (
        f"  structure: {{fasta: {tmp_path / 'p.fasta'}, ids: [p0, p2], esmfold: random, recycles: 0, k: [1, {D}], "
    )
    steering = f"  steering: {{fasta: {tmp_path / 'p.fasta'}, latents: [3, {PLANTED}], esmfold: random, recycles: 0}}\n"
    path = trained(section + "tasks: 2}\n" + steering)
    done = plmsae("eval", path, "--no-progress")
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "one" / "eval"
    body = json.loads((folder / "metrics.json").read_text())["structure"]
    assert (body["proteins"], body["references"], body["demo"]) == (2, 0, True)
    assert body["spliced_identity"] == "exact"
    rows = pq.read_table(folder / "structure" / "folds.parquet").to_pylist()
    folds = {(row["id"], row["mode"], row["variant"], row["number"]): row for row in rows}
    assert len(folds) == 2 * (1 + 6 + 5)
    for name in ("p0", "p2"):
        for variant, number in (("sae", None), ("k", D)):
            whole = folds[name, "propagated", variant, number]
            assert whole["rmsd"] == pytest.approx(0.0, abs=1e-5)
            assert whole["lddt"] == 1.0
            assert whole["fvu"] == 0.0
            alone, kept = folds[name, "isolated", variant, number], folds[name, "isolated", "original", None]
            assert alone["rmsd"] == kept["rmsd"] > 0.01
        assert folds[name, "propagated", "k", 1]["rmsd"] > 0.01
        assert folds[name, "propagated", "k", 1]["l0"] == 1.0
        assert folds[name, "propagated", "zero", None]["rmsd"] > 0.01
        assert folds[name, "plain", "original", None]["tm"] == pytest.approx(1.0)
    by_way = {(fold["mode"], fold["variant"], fold["number"]): fold for fold in body["folds"]}
    mean = np.mean([folds[name, "isolated", "zero", None]["rmsd"] for name in ("p0", "p2")])
    assert by_way["isolated", "zero", None]["rmsd"] == pytest.approx(mean)
    assert len((folder / "structure" / "folds.csv").read_text().splitlines()) == 1 + len(rows)
    assert "## Structure" in (folder / "model_card.md").read_text()
    assert '<section id="structure">' in (tmp_path / "runs" / "one" / "report" / "index.html").read_text()
    effects = {
        (row["latent"], row["readout"]): row
        for row in pq.read_table(folder / "steering" / "effects.parquet").to_pylist()
    }
    assert len(effects) == 2 * (21 + 4)
    assert effects[PLANTED, "RMSD"]["effect"] > 1e-4
    latents = pq.read_table(folder / "latents.parquet").to_pylist()
    assert latents[PLANTED]["steering_sasa"] == effects[PLANTED, "SASA"]["effect"] != 0.0
    assert "solvent-accessible surface" in (folder / "model_card.md").read_text()
    # A prediction given as the experimental structure is found again, and another number of pieces changes no byte.
    references = tmp_path / "references"
    references.mkdir()
    (references / "p2.pdb").write_bytes((folder / "structure" / "pdb" / "00001.original.pdb").read_bytes())
    path.write_text(path.read_text().replace("tasks: 2", f"references: {references}, tasks: 1"))
    assert plmsae("eval", path, "--no-progress").code == 0
    table = {row["id"]: row for row in pq.read_table(folder / "proteins.parquet").to_pylist()}
    assert table["p0"]["reference_rmsd"] is None
    assert table["p2"]["reference_rmsd"] < 1e-3
    again = pq.read_table(folder / "structure" / "folds.parquet").to_pylist()
    assert [{k: v for k, v in row.items() if "reference" not in k} for row in again] == [
        {k: v for k, v in row.items() if "reference" not in k} for row in rows
    ]
    right = path.read_text()
    shutil.copy(references / "p2.pdb", references / "p0.pdb")
    misnamed = plmsae("eval", path, "--no-progress")
    assert "p0.pdb is no structure of p0" in misnamed.err
    for wrong, words in (
        ("esmfold: nowhere", "hf download nowhere"),
        ("esmfold: random, prefixes: groups", "no nested"),
    ):
        path.write_text(right.replace("esmfold: random", wrong, 1))
        refused = plmsae("eval", path, "--no-progress")
        assert refused.code == 2
        assert words in refused.err


@pytest.mark.parametrize(("package", "axis"), [
    ("biotite", "contacts: {structures: [x.pdb]}"),
    ("tmtools", "structure: {fasta: x.fasta, esmfold: random}"),
    ("transformers", "steering: {esmfold: random}"),
    ("Bio", "concepts: {annotations: x.dat}"),
])  # fmt: skip
def test_a_package_that_is_absent_is_named_before_anything_starts(
    plmsae: Plmsae, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, axis: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    for name, text in (("x.pdb", "END"), ("x.fasta", ">a\nMKV"), ("x.dat", "ID   X   Reviewed;   1 AA.")):
        (tmp_path / name).write_text(text + "\n")
    path = write(evaluation=f"\neval:\n  {axis}\n")
    done = plmsae("run", path, "--no-progress")
    assert done.code == 2
    assert "not installed" in done.err
    assert f"pip install 'plmsae[{'annotations' if package == 'Bio' else 'fold'}]'" in done.err
    assert not list(tmp_path.glob("runs/data/*"))


@pytest.mark.parametrize(("axis", "words"), [
    ("contacts: {{structures: ['{0}/s.pdb:Z']}}", "s.pdb has no chain 'Z'"),
    ("contacts: {{structures: ['{0}/s.pdb'], max_length: 9}}", "more than eval.contacts.max_length"),
    ("contacts: {{structures: ['{0}/short.pdb']}}", "24 apart"),
    ("structure: {{structures: ['{0}/s.pdb:Z'], esmfold: random}}", "s.pdb has no chain 'Z'"),
    ("structure: {{fasta: '{0}/p.fasta', ids: [a, c], esmfold: random}}", "has no c"),
    ("encode: {{fasta: '{0}/empty.fasta'}}", "empty.fasta is empty"),
    ("steering: {{fasta: '{0}/words.txt'}}", "neither a UniProt table nor"),
    ("families: {{proteins: '{0}/p.fasta', labels: '{0}/words.txt'}}", "line 1 has no tab and no comma"),
    ("probes: {{proteins: '{0}/p.fasta', labels: '{0}/words.txt'}}", "line 1 has no tab and no comma"),
])  # fmt: skip
def test_what_cannot_be_used_is_known_before_anything_starts(
    plmsae: Plmsae, write: Callable[..., Path], tmp_path: Path, axis: str, words: str
) -> None:
    write_structure(tmp_path / "s.pdb", sequences(1, 30)[0], 0)
    write_structure(tmp_path / "short.pdb", sequences(1, 20)[0], 0)
    for name, text in (("p.fasta", ">a\nMKVLA\n"), ("empty.fasta", ""), ("words.txt", "some words\n")):
        (tmp_path / name).write_text(text)
    path = write(evaluation=f"\neval:\n  {axis.format(tmp_path)}\n")
    done = plmsae("run", path, "--dry-run")
    assert (done.code, words in done.err) == (2, True), done.err
    assert not (tmp_path / "runs").exists()


def looking_model(folder: Path, seeker: str, sought: str) -> None:
    """One block, whose attention at one letter goes to another wherever it stands, and writes what it finds there."""
    model = ESM2(ESM2Config(num_layers=1, d=D, num_heads=1, token_dropout=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (model.layers[0].self_attn_layer_norm, model.emb_layer_norm_after, model.lm_head.layer_norm):
            norm.weight.fill_(1.0)
        model.embed_tokens.weight[4:24, :20] = torch.eye(20)
        slowest = D // 2 - 1  # of the rotary pairs: it hardly turns along a protein
        block: Any = model.layers[0].self_attn
        block.q_proj.weight[slowest, AMINO_ACIDS.index(seeker)] = 1.3
        block.k_proj.weight[slowest, AMINO_ACIDS.index(sought)] = 1.3
        block.v_proj.weight.copy_(torch.eye(D))
        block.out_proj.weight[:20, :20] = torch.eye(20).roll(1, 0)
        model.lm_head.dense.weight.copy_(torch.eye(D))
    save_model(Store(), str(folder), dict(model.state_dict()), asdict(model.config), {})


def test_a_planted_contact_is_first(plmsae: Plmsae, write: Callable[..., Path], tmp_path: Path) -> None:
    looking_model(tmp_path / "looking", "C", "W")
    letters = random.Random(0).choices("ADEFGHIKLMNPQRSTVY", k=40)
    letters[3], letters[33] = "W", "C"
    places = np.zeros((40, 3))
    places[:, 0] = 30.0 * np.arange(40)
    places[33] = places[3] + [0.0, 5.0, 0.0]  # the only contact
    write_places(tmp_path / "one.pdb", "".join(letters), places)
    path = write("one.yaml", weights=tmp_path / "looking", evaluation="")
    path.write_text(
        path.read_text().replace("layers: [2]", "layers: [1]").replace("expansion: 2, k: 4", "expansion: 4, k: 32")
    )
    assert plmsae("run", path, "--no-progress").code == 0
    lossless(tmp_path / "runs" / "one")
    section = (
        f"\neval:\n  fidelity: {{loss_recovered: false}}\n  contacts: {{structures: ['{tmp_path / 'one.pdb'}']}}\n"
    )
    path.write_text(path.read_text() + section)
    done = plmsae("eval", path, "--no-progress")
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "one" / "eval"
    pairs = pq.read_table(folder / "contacts" / "pairs" / "00000.parquet").to_pylist()
    for variant in ("original", "sae"):
        ranked = sorted(pairs, key=lambda row: -row[f"jacobian_{variant}"])
        assert (ranked[0]["i"], ranked[0]["j"]) == (4, 34)
        assert ranked[0][f"jacobian_{variant}"] > 3 * ranked[1][f"jacobian_{variant}"]
    body = json.loads((folder / "metrics.json").read_text())["contacts"]
    assert body["chance"] == pytest.approx(1 / 136)
    for cut, number in (("L", 40), ("L/2", 20), ("L/5", 8)):
        row = body["methods"]["jacobian"][cut]
        assert row["original"] == row["sae"] == pytest.approx(1 / number)
        assert row["zero"] == pytest.approx(1 / 136)  # all couplings are 0: no better than chance
        assert row["recovered"] == 1.0
