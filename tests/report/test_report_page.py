"""The page of a run: safe, self-contained, complete, and true to its inputs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.errors import UserError
from plmsae_cli.report import build_report
from plmsae_cli.report.prose import verdict
from plmsae_cli.report.reading import read_run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, make: Any) -> Any:
    """The parsed page of a run with every part."""
    return make.Page(build_report(make.write_run(tmp_path_factory.mktemp("runs") / "esm2-8m-l3-topk")))


SECTIONS = ["provenance", "training", "latents", "fidelity", "examples", "times", "reading", "experiment"]


def sections(page: Any) -> list[str]:
    return [attrs["id"] for tag, attrs in page.elements if tag == "section" and "id" in attrs]


def test_order_of_the_sections(page: Any) -> None:
    assert sections(page) == SECTIONS


def test_same_inputs_give_the_same_bytes(run: Path) -> None:
    assert build_report(run) == run / "report" / "index.html"
    first = (run / "report" / "index.html").read_bytes()
    assert build_report(run).read_bytes() == first
    assert [each.name for each in (run / "report").iterdir()] == ["index.html"]


def test_figures_in_the_page_equal_the_inputs(page: Any, make: Any) -> None:
    tiles = re.findall(r'class="name">(.*?)</span> <span class="value">(.*?)</span>', page.source)
    assert tiles == [
        ("FVU", "0.161"),
        ("Loss recovered", "95.8%"),
        ("Loss recovered", "92.8%"),
        ("L0", "32.0"),
        ("Dead latents", "2.1%"),
        ("Trained on", "4.1 million"),
        ("Speed", "61,033"),
        ("Time", "3 min 55 s"),
    ]
    expected = make.fidelity()["loss"]
    for inputs in ("masked", "unmasked"):
        for key in ("ce", "ce_sae", "ce_mean", "ce_zero"):
            assert f"{expected[inputs][key]:.4g}" in page.texts
    assert "[95.1%, 96.3%]" in page.text
    for text in (
        "esm2_t6_8M_UR50D",
        "cath.fasta.gz",
        "a3f0c6d1b25e",
        "9f2c1d7be04a8813",
        "198,877",
        "3f9c2ab471d0",
    ):
        assert text in page.text


def test_verdict_is_one_sentence_in_plain_words(page: Any) -> None:
    verdict = re.search(r'<p class="verdict">(.*?)</p>', page.source)
    assert verdict is not None
    assert verdict.group(1) == (
        "With 32.0 of 2,560 latents active on a residue, the dictionary reconstructs layer 3 closely: it explains"
        " 83.9% of the variance and preserves 95.8% of what the layer contributes to predicting hidden residues;"
        " 2.1% of its latents are dead."
    )


@pytest.mark.parametrize(
    ("fvu", "word"),
    [(0.05, "very closely"), (0.25, "closely"), (0.4, "roughly"), (0.9, "poorly"), (1.3, "poorly")],
)
def test_the_verdict_grades_by_fvu(run: Path, fvu: float, word: str, make: Any) -> None:
    make.write_json(run / "eval" / "metrics.json", make.scores(fvu=fvu))
    assert f"reconstructs layer 3 {word}: it explains" in verdict(read_run(run))


@pytest.mark.parametrize("demo", [True, False])
def test_banner_says_demo_model(tmp_path: Path, demo: bool, make: Any) -> None:
    page = make.Page(build_report(make.write_run(tmp_path / "quickstart", demo=demo)))
    assert ("demo model, not for science" in page.text) is demo


def test_banner_before_evaluation_comes_from_the_dictionary(run: Path, make: Any) -> None:
    shutil.rmtree(run / "eval")
    facts = json.loads((run / "sae" / "sae.json").read_text())
    make.write_json(run / "sae" / "sae.json", {**facts, "weights": {"name": "bundled", "sha256": "0" * 64}})
    assert "demo model, not for science" in make.Page(build_report(run)).text


def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path, make: Any) -> None:
    run = make.write_run(tmp_path / "hostile")
    (run / "resolved.yaml").write_text(
        make.RESOLVED.replace("cath.fasta.gz", "'<b onclick=x>.fasta'"), encoding="utf-8"
    )
    header = make.HOSTILE.replace("{", "{{").replace("}", "}}")
    make.write_latents(run / "eval" / "latents.parquet", header=header)
    make.write_json(run / "status.json", {"stage_seconds": {"<script>x</script>$\\q$": 3.0, "embed": 2.0}})
    page = make.Page(build_report(run))
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "img", "b", "iframe", "object", "link"} & set(tags)
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert any(text.startswith("<script>alert(1)</script>\"'><img") for text in page.texts)
    assert "<b onclick=x>.fasta" in page.text
    assert "<script>x</script>$\\q$" in page.texts  # inside the plot of the stage times
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page.source)


def test_a_megabyte_header_stays_short(run: Path, make: Any) -> None:
    make.write_latents(run / "eval" / "latents.parquet", header="x" * 1_000_000, num_latents=40)
    assert len(build_report(run).read_text(encoding="utf-8")) < 300_000


@pytest.mark.parametrize("kind", ["run", "plm", "empty"])
def test_policy_forbids_everything_but_the_style_sheet(run: Path, tmp_path: Path, kind: str, make: Any) -> None:
    page = make.Page(build_report(run if kind == "run" else make.write_bare(tmp_path / kind, plm=kind == "plm")))
    (policy,) = [
        attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    (style,) = page.raw["style"]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    # What the policy would refuse must not be there, or the page would look broken.
    assert page.attributes("style") == []
    assert page.raw["script"] == []


def test_nothing_is_loaded(page: Any) -> None:
    addresses = page.attributes("src") + page.attributes("href") + page.attributes("xlink:href")
    assert addresses
    assert all(address.startswith("#") for address in addresses)
    assert not re.search(r"url\((?!#)|@import|https?://", page.source)


def test_every_reference_inside_the_page_leads_to_one_place(page: Any) -> None:
    ids = page.ids()
    assert len(ids) == len(set(ids))
    wanted = {address[1:] for address in page.attributes("href")} | set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert wanted <= set(ids)


def test_every_colour_of_the_plots_has_a_light_and_a_dark_form(page: Any) -> None:
    (style,) = page.raw["style"]
    light, dark = style.split("prefers-color-scheme: dark", 1)
    classes = {each for _, attrs in page.elements for each in attrs.get("class", "").split()}
    for name in {each for each in classes if re.fullmatch("[fs]-[a-z]+", each)}:
        colour = name[2:]
        assert f".{name} {{" in style
        assert f"--{colour}: #" in light
        assert f"--{colour}: #" in dark.split("}\n}", 1)[0]
    assert not [value for key in ("fill", "stroke") for value in page.attributes(key) if value.startswith("#")]


def test_absent_parts_leave_no_trace(tmp_path: Path, make: Any) -> None:
    page = make.Page(build_report(make.write_bare(tmp_path / "nothing")))
    assert sections(page) == ["provenance", "experiment"]
    assert "svg" not in [tag for tag, _ in page.elements]
    assert "no results yet" in page.text
    assert not re.search(r"\b(None|nan|n/a)\b", page.text)


@pytest.mark.parametrize(
    ("gone", "section"),
    [
        ("metrics.jsonl", "training"),
        ("status.json", "times"),
        ("eval/latents.parquet", "examples"),
        ("eval/metrics.json", "fidelity"),
    ],
)
def test_each_part_may_be_absent_alone(run: Path, gone: str, section: str, make: Any) -> None:
    (run / gone).unlink()
    assert sections(make.Page(build_report(run))) == [each for each in SECTIONS if each != section]


def test_no_loss_recovered(run: Path, make: Any) -> None:
    body = make.scores()
    del body["fidelity"]["loss"], body["fidelity"]["spliced_identity"]
    make.write_json(run / "eval" / "metrics.json", body)
    page = make.Page(build_report(run))
    shown = page.text.split("The experiment")[0]
    assert "Cross-entropy" not in shown
    assert "ecovered" not in shown


def test_a_protein_language_model(tmp_path: Path, make: Any) -> None:
    page = make.Page(build_report(make.write_bare(tmp_path / "plm", plm=True)))
    assert sections(page) == ["provenance", "training", "reading", "experiment"]
    assert "hesitates between 11.3 amino acids" in page.text
    assert "clusters" in page.texts
    # The model that it trains is not the one that `model.weights` would name.
    assert "bundled" not in page.text.split("The experiment")[0]


def test_constant_l0_is_a_sentence_not_a_plot(run: Path, make: Any) -> None:
    make.write_json(run / "eval" / "metrics.json", make.scores(l0_mean=32.0, l0_deciles=[32] * 11))
    page = make.Page(build_report(run))
    assert "Every residue has exactly 32 active latents." in page.text
    assert "Distribution of the number of active latents a residue" not in page.attributes("aria-label")


def test_a_half_written_last_line_is_forgiven_and_damage_is_not(run: Path) -> None:
    whole = build_report(run).read_bytes()
    path = run / "metrics.jsonl"
    lines = path.read_text()
    path.write_text(lines + '{"step": 2005, "tok')
    assert build_report(run).read_bytes() == whole
    path.write_text('{"step": 5, \n' + lines)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1 is damaged"):
        build_report(run)


@pytest.mark.parametrize(
    ("name", "content"),
    [("eval/metrics.json", "{"), ("eval/latents.parquet", "PAR1"), ("resolved.yaml", "a: [")],
)
def test_damaged_files_are_named(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(name)):
        build_report(run)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no resolved\.yaml"):
        build_report(tmp_path)


def test_infinite_and_absent_values_do_not_stop_the_page(run: Path, make: Any) -> None:
    lines = [
        {
            "step": 1,
            "tokens": 100,
            "loss": float("inf"),
            "reconstruction": 1.0,
            "fvu": float("nan"),
            "l0": 32.0,
        },
        {"step": 2, "tokens": 200, "loss": 0.5, "reconstruction": 0.4, "fvu": 0.4, "l0": 32.0, "dead": 0.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    body = make.scores()
    body["fidelity"]["loss"]["masked"].update(ce_zero=2.6131, recovered_zero=float("nan"))
    make.write_json(run / "eval" / "metrics.json", body)
    page = make.Page(build_report(run))
    assert "n/a" in page.text
    assert "preserves nan" not in page.text


def test_predictions_stand_beside_what_came(run: Path, make: Any) -> None:
    assert "Predicted and measured" not in make.Page(build_report(run)).text
    told = {"train": {"gpus": 4, "gpu_hour": 2.5, "seconds": 100.0, "memory": 20e9}, "eval": {"gpus": 0, "gpu_hour": None},
            "later": {"gpus": 1, "gpu_hour": None, "seconds": 5.0}}  # fmt: skip
    make.write_json(run / "predicted.json", told)
    make.write_json(run / "logs" / "memory-rank-0.json", {"bytes": 25e9})
    page = make.Page(build_report(run))
    body = page.source.split("Predicted and measured")[1].split("<tbody>")[1].split("</tbody>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in body.split("</tr>")[:-1]]
    # 143 s on 4 GPUs at $2.50 are 143 / 3600 * 10 = $0.397.
    assert rows == [
        ["train", "time", "1 min 40 s", "2 min 23 s", "1.43"],
        ["train", "memory a GPU", "20 GB", "25 GB", "1.25"],
        ["train", "dollars", "0.28", "0.40", "1.43"],
    ]
