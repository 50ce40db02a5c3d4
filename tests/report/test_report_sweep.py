"""The page of a sweep."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.errors import UserError
from plmsae_cli.report import build_sweep_report
from plmsae_cli.report.parallel import place


def rows(page: Any) -> list[list[str]]:
    """Text of the cells of each trial."""
    body = page.source.split("<tbody>")[1].split("</tbody>")[0]
    strip = lambda cell: re.sub("<[^>]+>", "", cell).strip()  # noqa: E731
    return [[strip(cell) for cell in re.findall(r"<td.*?>(.*?)</td>", row, re.S)] for row in body.split("</tr>")[:-1]]


def test_table_equals_the_trials(sweep: Path, make: Any) -> None:
    trials = json.loads((sweep / "sweep.json").read_text())["trials"]
    page = make.Page(build_sweep_report(sweep))
    shown = rows(page)
    assert len(shown) == len(trials) == 9
    for cells, trial in zip(shown, trials, strict=True):
        values, metrics = trial["values"], trial["metrics"]
        assert cells[1:3] == [str(values["train.sae.k"]), str(values["train.sae.num_latents"])]
        assert cells[3] == (f"{metrics['fvu']:.3f}" if metrics else "–")
        assert cells[-1] == trial["state"]
    sorted_by = re.findall(r'data-sort="([^"]*)"', page.source)
    assert len(sorted_by) == 9 * 6
    assert [float(each) for each in sorted_by[2::6] if each] == [t["metrics"]["fvu"] for t in trials if t["metrics"]]


def test_frontier_is_marked(sweep: Path, make: Any) -> None:
    # FVU falls with k and with width, so on each k the widest finished trial is best.
    marked = [cells[1:3] for cells in rows(make.Page(build_sweep_report(sweep))) if cells[0].startswith("●")]
    assert sorted(marked) == [["16", "5120"], ["32", "5120"], ["64", "2560"]]


def test_links_lead_to_pages_that_exist(sweep: Path, make: Any) -> None:
    path = build_sweep_report(sweep)
    (link,) = [attrs["href"] for tag, attrs in make.Page(path).elements if tag == "a"]
    assert (path.parent / link).resolve().read_text() == "a trial's page"


@pytest.mark.parametrize("name", ["../../../etc", "javascript:alert(1)", "a/b", ""])
def test_a_hostile_hash_leads_nowhere(sweep: Path, name: str, make: Any) -> None:
    body = json.loads((sweep / "sweep.json").read_text())
    body["trials"][0]["hash"] = name
    body["trials"][1]["values"]["train.sae.k"] = "<img src=x>"
    make.write_json(sweep / "sweep.json", body)
    page = make.Page(build_sweep_report(sweep))
    assert not [1 for tag, _ in page.elements if tag in ("a", "img")]
    assert "<img src=x>" in page.texts


def test_policy_allows_the_one_script(sweep: Path, make: Any) -> None:
    page = make.Page(build_sweep_report(sweep))
    (policy,) = [attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    (script,) = page.raw["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert policy.endswith(f"; script-src 'sha256-{digest}'")
    assert page.attributes("style") == []
    assert page.attributes("src") == []


def test_verdict_counts(sweep: Path, make: Any) -> None:
    text = make.Page(build_sweep_report(sweep)).text
    assert "8 of 9 trials are done, 1 failed; 3 lie on the frontier" in text
    lowest = min(t["metrics"]["fvu"] for t in json.loads((sweep / "sweep.json").read_text())["trials"] if t["metrics"])
    assert f"The lowest FVU is {lowest:.3f}, with 64 active latents" in text


def test_before_any_trial_is_scored(sweep: Path, make: Any) -> None:
    body = json.loads((sweep / "sweep.json").read_text())
    for trial in body["trials"]:
        trial.update(state="pending", metrics={})
    make.write_json(sweep / "sweep.json", body)
    page = make.Page(build_sweep_report(sweep))
    assert "0 of 9 trials are done; none has been scored yet." in page.text
    assert "svg" not in [tag for tag, _ in page.elements]


def test_fields_of_one_last_name_keep_their_paths(sweep: Path, make: Any) -> None:
    body = json.loads((sweep / "sweep.json").read_text())
    body["grid"] = {"train.seed": [0], "shuffle.seed": [0, 1], "train.sae.architecture": ["topk"]}
    for number, trial in enumerate(body["trials"]):
        trial["values"] = {"train.seed": 0, "shuffle.seed": number % 2, "train.sae.architecture": "topk"}
    make.write_json(sweep / "sweep.json", body)
    buttons = re.findall(r"<button[^>]*>(.*?)</button>", make.Page(build_sweep_report(sweep)).source)
    assert buttons[:3] == ["train.seed", "shuffle.seed", "architecture"]


def test_a_run_that_is_no_sweep(run: Path) -> None:
    with pytest.raises(UserError, match=r"no sweep\.json"):
        build_sweep_report(run)


def test_lines_across_the_fields_in_closed_form() -> None:
    assert place([10, 20, 30]) == ([0, 0.5, 1], [(0, "10"), (0.5, "20"), (1, "30")])
    heights, labels = place([1e-4, 1e-3, 1e-2])  # more than a factor of 20: by the logarithm
    assert heights == pytest.approx([0, 0.5, 1])
    assert [text for _, text in labels] == ["0.000100", "0.00100", "0.0100"]
    assert place(["topk", None, "topk"]) == ([0, 1, 0], [(0, "topk"), (1, "null")])
    assert place([5, 5])[0] == [0, 0]


def test_every_scored_trial_is_a_line_and_the_frontier_is_in_colour(sweep: Path, make: Any) -> None:
    source = make.Page(build_sweep_report(sweep)).source
    picture = source.split('<section id="fields">')[1].split("</section>")[0]
    # 8 scored trials of 2 fields: lines are paths of four points; 3 lie on the frontier.
    lines = re.findall(r'<path[^>]*d="M[^"]*L[^"]*L[^"]*L[^"]*"[^>]*class="([^"]*)"', picture)
    lines += re.findall(r'<path[^>]*class="([^"]*)"[^>]*d="M[^"]*L[^"]*L[^"]*L[^"]*"', picture)
    assert (sum("s-stone" in each for each in lines), sum("s-blue" in each for each in lines)) == (5, 3)


def test_a_search_says_what_it_was_after(sweep: Path, make: Any) -> None:
    body = json.loads((sweep / "sweep.json").read_text())
    body["search"] = {"metric": "fvu", "direction": "minimize", "trials": 9}
    for number, trial in enumerate(body["trials"]):
        trial["objective"] = None if number == 3 else 0.5 + number / 10
    body["trials"][3]["state"] = "pruned"
    make.write_json(sweep / "sweep.json", body)
    page = make.Page(build_sweep_report(sweep))
    assert f"Optuna chose the trials to minimize fvu; the best is {body['trials'][0]['hash']}, 0.500." in page.text
    assert "1 pruned" in page.text
    assert [cells[-2] for cells in rows(page)][:5] == ["0.500", "0.600", "0.700", "–", "0.900"]
