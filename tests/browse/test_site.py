"""What goes into the folder, and the arithmetic behind it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from plmsae_cli.browse.encoder import Encoder
from plmsae_cli.browse.index import cluster_names
from plmsae_cli.browse.layout import Layout, arrange
from plmsae_cli.browse.matching import best_correlation, best_cosine
from plmsae_cli.browse.own import OwnSequences, clean
from plmsae_cli.browse.scripts import column, literal
from plmsae_cli.browse.site import build_site, is_current
from plmsae_cli.cli.app import app
from plmsae_cli.config.errors import UserError
from plmsae_cli.sae.interface import Latents


def body_of(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return json.loads(text[text.index(",") + 1 : -3])


def test_literals_end_no_script() -> None:
    body = {"a": "</script><!--\u2028\u2029&", "b": [1.5, float("nan"), None], "c": "é"}
    text = literal(body)
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == {"a": body["a"], "b": [1.5, None, None], "c": "é"}
    assert base64.b64decode(column([1, 258], "u2")["data"]) == b"\x01\x00\x02\x01"


def test_every_example_is_on_its_page(made: Any) -> None:
    for latent in range(len(made.order)):
        group = body_of(made.site / "data" / "0" / f"group-{latent // 8:05}.js")
        page = group["latents"][latent % 8]
        rows = pq.read_table(made.runs[0] / f"eval/features/examples/group-{latent // 16:05}.parquet").to_pylist()
        mine = [row for row in rows if row["latent"] == latent]
        assert page["latent"] == latent
        assert [(e["kind"], e["band"], e["rank"], e["protein"], e["position"]) for e in page["examples"]] == [
            (row["kind"], row["band"], row["rank"], row["protein"], row["position"]) for row in mine
        ]
        along = {name: np.frombuffer(base64.b64decode(page["along"][name]["data"]), "<u2") for name in ("at", "steps")}
        ends = np.cumsum(page["along"]["number"])
        assert along["at"].tolist() == [position for row in mine for position in row["positions"]]
        acts = np.array([act for row in mine for act in row["activations"]])
        assert ends[-1] == len(acts)
        assert np.abs(along["steps"] / 1000 - acts / page["max"]).max() <= 1.001e-3
        for row in mine:
            assert group["proteins"][str(row["protein"])]["sequence"] == made.proteins[row["protein"]][2]
        outside = [row for row in mine if row["annotated"] is False]
        best = {}
        for row in sorted(outside, key=lambda row: -row["activation"]):
            best.setdefault(row["protein"], row["activation"])
        shown = [mine[i] for i in page["candidates"]]
        assert [row["activation"] for row in shown] == sorted(best.values(), reverse=True)[:20]


def test_the_map_keeps_what_is_alike_together() -> None:
    generator = np.random.default_rng(0)
    centres = np.eye(16)[:4] * 5
    which = np.repeat(np.arange(4), [40, 30, 20, 10])
    rows = (centres[which] + generator.normal(size=(100, 16)) * 0.1).astype(np.float32)
    layout = arrange(rows)
    assert layout.place_N2.min() == 0
    assert layout.place_N2.max() == 1
    groups = [set(layout.cluster_N[which == k].tolist()) for k in range(4)]
    assert all(not a & b for i, a in enumerate(groups) for b in groups[:i])  # no cluster spans two directions
    sizes = np.bincount(layout.cluster_N)
    assert (np.diff(sizes) <= 0).all()
    centred = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    centred = centred - centred.mean(0)
    _, _, vt = np.linalg.svd(centred, full_matrices=False)
    for axis in (0, 1):
        assert abs(np.corrcoef(layout.place_N2[:, axis], centred @ vt[axis])[0, 1]) == pytest.approx(1, abs=1e-5)
    again = arrange(rows)
    assert (again.cluster_N == layout.cluster_N).all()
    assert (again.place_N2 == layout.place_N2).all()


def test_clusters_are_called_by_what_they_have_most_above_chance() -> None:
    where = np.repeat([0, 1, 2], [6, 4, 2])
    concepts = ["any"] * 4 + ["helix"] * 2 + ["any"] * 3 + ["zinc"] + ["helix", None]
    found = {"concept": concepts, "concept_f1": [0.9] * 11 + [None]}
    # Above chance: "any" 4 - 3.5 in the first, 3 - 7/3 in the second; "helix" 2 - 1.5 and 1 - 0.5.
    assert cluster_names(Layout(np.zeros((12, 2), dtype=np.float32), where), found) == ["helix", "any", ""]


def test_counterparts_are_those_of_dense_arithmetic() -> None:
    generator = torch.Generator().manual_seed(1)
    rows, n, m, k = 400, 12, 9, 3

    def code(width: int) -> tuple[Latents, torch.Tensor]:
        index = torch.rand(rows, width, generator=generator).argsort(1)[:, :k]
        acts = torch.rand(rows, k, generator=generator) + 0.1
        return Latents(acts, index), torch.zeros(rows, width).scatter(1, index, acts)

    (x, x_RN), (y, y_RM) = code(n), code(m)
    x.acts_BK[x.indices_BK == 4] = 0  # never fires
    x_RN[:, 4] = 0
    with np.errstate(invalid="ignore"):
        both = np.corrcoef(x_RN.double().T.numpy(), y_RM.double().T.numpy())[:n, n:]
    number, value = best_correlation(x, y, n, m)
    assert number[4] == -1
    assert value[4] == 0
    alive = [i for i in range(n) if i != 4]
    assert number[alive].tolist() == both[alive].argmax(1).tolist()
    assert value[alive].numpy() == pytest.approx(both[alive].max(1), abs=1e-6)
    a, b = torch.randn(n, 5, generator=generator), torch.randn(m, 5, generator=generator)
    cosine = torch.cosine_similarity(a[:, None], b[None], dim=2)
    nearest, at = best_cosine(a, b)
    assert nearest.tolist() == cosine.argmax(1).tolist()
    assert at.tolist() == pytest.approx(cosine.max(1).values.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("text", "found"),
    [("mkv", "MKV"), (">a|b c\nMK\nV*\n>second\nAAA", "MKV"), ("  1 MKV 10\nA", "MKVA")],
)
def test_pasted_text(text: str, found: str) -> None:
    assert clean(text) == found


def test_every_residue_has_its_own_latents(made: Any) -> None:
    """Also where none of them is among the sequence's strongest."""
    text = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQ"
    encoder = Encoder(made.runs[0])
    found = encoder.latents([text])
    answer = OwnSequences(made.runs).read(0, text)
    assert len(answer["residues"]) == len(text)
    for row, here in enumerate(answer["residues"]):
        pairs = zip(found.indices_BK[row].tolist(), found.acts_BK[row].tolist(), strict=True)
        shares = {n: (a, a / float(encoder.maximum_N[n])) for n, a in pairs if a > 0}
        assert [n for n, *_ in here] == sorted(shares, key=lambda n: (-shares[n][1], n))
        for n, *numbers in here:
            assert numbers == pytest.approx(shares[n], rel=1e-6)


@pytest.mark.parametrize(
    ("text", "words"), [("", "no sequence"), ("MK<", "residue 3 is '<'"), ("A" * 2049, "too many")]
)
def test_pasted_text_that_is_none(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        clean(text)


def test_a_site_knows_its_runs(made: Any, tmp_path: Path) -> None:
    structures = [str(made.site.parent / "P12345.pdb")]
    assert is_current(made.site, made.runs, structures)
    assert not is_current(made.site, made.runs[:1], structures)
    assert not is_current(made.site, made.runs, [])
    run = tmp_path / "run"
    shutil.copytree(made.runs[0], run)
    build_site([run], tmp_path / "site")
    assert is_current(tmp_path / "site", [run], [])
    index = run / "eval" / "features" / "index.json"
    index.write_text(index.read_text() + " ")
    assert not is_current(tmp_path / "site", [run], [])
    before = {path.name: path.read_bytes() for path in (tmp_path / "site" / "data" / "0").iterdir()}
    build_site([run], tmp_path / "site")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "site" / "data" / "0").iterdir()}


def test_absent_parts_are_left_out(made: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made.runs[0], run)
    shutil.rmtree(run / "sae")
    (run / "eval" / "latents.parquet").unlink()
    for name in ("concepts.parquet", "examples/annotations.parquet"):
        (run / "eval" / "features" / name).unlink()
    build_site([run], tmp_path / "site")
    index = body_of(tmp_path / "site" / "data" / "0" / "index.js")
    assert set(index["columns"]) == {"density", "max", "letter"}
    assert index["strings"] == {}
    assert "clusters" not in index
    page = body_of(tmp_path / "site" / "data" / "0" / "group-00000.js")["latents"][3]
    assert page["concepts"] == []
    assert "family" not in page
    assert "concept" not in page


def test_other_folders_are_left_alone(made: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other things"):
        build_site(made.runs[:1], tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_the_verb(made: Any, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    runner = CliRunner()
    done = runner.invoke(app, ["browse", str(made.runs[0]), "--build", str(tmp_path / "site")])
    assert done.exit_code == 0
    assert done.stdout.strip() == str(tmp_path / "site" / "index.html")
    assert (tmp_path / "site" / "vendor" / "LICENSES.txt").is_file()
    (tmp_path / "resolved.yaml").touch()
    wrong = runner.invoke(app, ["browse", str(tmp_path), "--build", str(tmp_path / "other")])
    assert wrong.exit_code == 2
    assert "has no features to show" in wrong.stderr
    assert "features: {}" in wrong.stderr
    absent = runner.invoke(app, ["browse", str(tmp_path / "absent")])
    assert absent.exit_code == 2
    assert "is not a run" in absent.stderr
    twice = runner.invoke(app, ["browse", str(made.runs[0]), str(made.runs[0])])
    assert twice.exit_code == 2
    none = runner.invoke(
        app, ["browse", str(made.runs[0]), "--structures", str(tmp_path / "site"), "--build", str(tmp_path / "third")]
    )
    assert none.exit_code == 2
    assert "no structure in" in none.stderr


def test_a_port_in_use_leaves_the_pages_alone(made: Any, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    run = tmp_path / "run"
    shutil.copytree(made.runs[0], run)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(app, ["browse", str(run), "--no-open", "--port", port])
    assert done.exit_code == 2
    assert "cannot listen on" in done.stderr
    assert not (run / "browse").exists()


def test_letters_stand_out_from_their_colours() -> None:
    """WCAG's contrast of 4.5 at every step of the scale, and steps of steadily rising or falling lightness."""
    from importlib.resources import files

    style = (files("plmsae_cli.browse") / "static" / "style.css").read_text()
    light, dark = (re.search(rf"{name} {{(.*?)}}", style, re.DOTALL) for name in (r"^:root", r":root\.dark"))
    for theme, found in (("light", light), ("dark", dark)):
        assert found is not None
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", found[1]))
        steps = [_luminance(colours[f"a{level}"]) for level in range(10)]
        assert steps == sorted(steps, reverse=theme == "light")
        for level in range(1, 10):
            bright = level <= 5 if theme == "dark" else level >= 7
            letter = _luminance(colours["a-light" if bright else "a-dark"])
            low, high = sorted((steps[level], letter))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (theme, level)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_folder_of_somebody_else_is_left_alone(made: Any, tmp_path: Path) -> None:
    """Neither file that a site has makes a folder one."""
    for name in ("site.json", "data/site.js"):
        folder = tmp_path / name.replace("/", "-")
        (folder / "data").mkdir(parents=True)
        (folder / name).write_text("{}")
        (folder / "data" / "precious.csv").write_text("1")
        assert not is_current(folder, made.runs[:1], [])
        with pytest.raises(UserError, match="holds other things"):
            build_site(made.runs[:1], folder)
        assert (folder / "data" / "precious.csv").is_file()
