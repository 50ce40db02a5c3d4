"""The pages in a real browser, at the width of a desk and of a phone."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from plmsae_cli import load_sae


def open_site(page: Any, base: str, hash_: str = "#/") -> None:
    page.goto("about:blank")  # a new hash alone would leave the heading of the view before until the new one is drawn
    page.goto(base + hash_)
    page.wait_for_selector("h1")


def concept_rows(run: Path, latent: int) -> list[dict[str, Any]]:
    rows = pq.read_table(run / "eval" / "features" / "concepts.parquet").to_pylist()
    return [row for row in rows if row["latent"] == latent]


def busy(run: Path) -> int:
    """The latent with most firings."""
    firing = pq.read_table(run / "eval" / "features" / "latents.parquet")["firing"].to_pylist()
    return firing.index(max(firing))


def found_in(run: Path) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = pq.read_table(run / "eval" / "latents.parquet").to_pydict()
    return table


def example_rows(run: Path) -> list[dict[str, Any]]:
    files = sorted((run / "eval" / "features" / "examples").glob("group-*"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]


def example_of(made: Any, protein: int) -> int:
    """A latent that shows an example in a protein."""
    return next(
        row["latent"]
        for row in example_rows(made.runs[0])
        if row["protein"] == protein and row["kind"] == "top" and row["rank"] <= 6
    )


def test_opens_from_disk_finds_and_comes_back(page: Any, built: Any) -> None:
    open_site(page, (built.site / "index.html").as_uri())
    table = found_in(built.runs[0])
    latents = len(table["concept"])
    assert page.get_by_text(f"{latents} latents", exact=True).is_visible()
    name = Counter(name for name in table["concept"] if name is not None).most_common(1)[0][0]
    words = name.partition(": ")[2]
    page.fill("#filter", words)
    wanted = [n for n, name in enumerate(table["concept"]) if name and words.lower() in name.lower()]
    assert 0 < len(wanted) < latents
    page.wait_for_selector(f"text={len(wanted)} of {latents} latents")
    assert [int(text) for text in page.locator(".table tbody a").all_inner_texts()[:30]] == wanted[:30]
    page.locator(".table th button", has_text="Density").click()
    density = pq.read_table(built.runs[0] / "eval" / "features" / "latents.parquet")["density"].to_pylist()
    falling = sorted(wanted, key=lambda n: (-density[n], n))
    assert [int(text) for text in page.locator(".table tbody a").all_inner_texts()[:30]] == falling[:30]
    page.locator(".table tbody a").first.click()
    page.wait_for_selector(f"h1:text-is('Latent {falling[0]}')")
    page.go_back()
    page.wait_for_selector(f"text={len(wanted)} of {latents} latents")
    assert page.input_value("#filter") == words
    page.fill("#jump", "7")
    page.press("#jump", "Enter")
    page.wait_for_selector("h1:text-is('Latent 7')")


def wide_gap(values: np.ndarray, share: float) -> float:
    """The middle of the widest gap near a quantile: an edge that no point is close to."""
    sorted_ = np.unique(values)
    middle = round(share * (len(sorted_) - 1))
    near = sorted_[max(0, middle - 3) : middle + 4]
    at = int(np.diff(near).argmax())
    return float(near[at] + near[at + 1]) / 2


def test_a_rectangle_on_the_scatter_filters_until_cleared(page: Any, built: Any) -> None:
    open_site(page, (built.site / "index.html").as_uri())
    density = np.array(pq.read_table(built.runs[0] / "eval" / "features" / "latents.parquet")["density"].to_pylist())
    f1 = np.array(found_in(built.runs[0])["concept_f1"], dtype=float)
    with np.errstate(divide="ignore"):
        x = np.log10(density)
    points = np.isfinite(x) & np.isfinite(f1)
    left, right = wide_gap(x[points], 0.2), wide_gap(x[points], 0.8)
    low, high = wide_gap(f1[points], 0.2), wide_gap(f1[points], 0.8)
    wanted = np.flatnonzero(points & (left < x) & (x < right) & (low < f1) & (f1 < high)).tolist()
    assert 2 < len(wanted) < points.sum() - 2

    canvas = page.locator(".plot canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    least = np.floor(min(-1.0, x[density > 0].min()))

    def place(log_density: float, score: float) -> tuple[float, float]:
        """On the screen: the axes lie within margins of 44, 10, 10 and 40 pixels."""
        across = (log_density - least) / -least
        return (
            box["x"] + 44 + across * (box["width"] - 54),
            box["y"] + 10 + (1 - score) * (box["height"] - 50),
        )

    page.mouse.move(*place(right, low))  # from the corner below on the right
    page.mouse.down()
    page.mouse.move(*place((left + right) / 2, (low + high) / 2))
    page.mouse.move(*place(left, high))
    page.mouse.up()
    page.wait_for_selector(f"text={len(wanted)} of {len(f1)} latents")
    assert [int(text) for text in page.locator(".table tbody a").all_inner_texts()[:30]] == wanted[:30]
    shown = [float(field.input_value()) for field in page.locator(".filters input[type=number]").all()]
    assert shown == pytest.approx([10**left, 10**right, low, high], rel=0.1, abs=0.01)
    page.reload()
    page.wait_for_selector(f"text={len(wanted)} of {len(f1)} latents")  # the address says it
    page.get_by_role("button", name="Clear").click()
    page.wait_for_selector(f"p[role=status]:text-is('{len(f1)} latents')")
    assert [int(text) for text in page.locator(".table tbody a").all_inner_texts()[:30]] == list(range(len(f1)))[:30]
    assert "f0" not in page.url


@pytest.mark.parametrize("wrong", ["#/latent/%", "#/latent/9999", "#/latent/-1", "#/9/latent/1", "#/nothing"])
def test_a_wrong_address_says_so(plain_page: Any, made: Any, wrong: str) -> None:
    open_site(plain_page, (made.site / "index.html").as_uri(), wrong)
    assert plain_page.locator("h1").inner_text() == "Not to be shown"
    plain_page.get_by_role("link", name="All latents").click()
    plain_page.wait_for_selector("#filter")


def test_slider_says_what_python_computes(page: Any, built: Any) -> None:
    found = found_in(built.runs[0])
    f1 = np.array(found["concept_f1"], dtype=float)
    latent = int(np.nanargmax(f1))
    open_site(page, (built.site / "index.html").as_uri(), f"#/latent/{latent}")
    rows = concept_rows(built.runs[0], latent)
    best = next(row for row in rows if row["concept"] == found["concept"][latent])
    # The axis's own figure is one of these; in `interplm_compat` that of the threshold that is best on test.
    thresholds = (0, 15, 50, 60, 80, round(100 * found["concept_threshold"][latent]))
    assert any(built.scores(best, j)[2] == pytest.approx(f1[latent], rel=1e-5) for j in thresholds)
    seen = set()
    for j in (0, 15, 37, 60, 99):
        page.locator("#threshold").fill(str(j))
        for place, row in enumerate(rows):
            cells = page.locator("#concepts tbody tr").nth(place).locator("td")
            shown = [
                float(cells.nth(i).get_attribute(f"data-{name}"))
                for i, name in ((1, "precision"), (2, "recall"), (3, "f1"))
            ]
            assert shown == pytest.approx(built.scores(row, j), abs=1e-12)
            assert cells.nth(1).inner_text() == f"{shown[0]:.2f}"
            seen.add(tuple(shown))
    assert len(seen) >= 5


def test_hostile_header_is_text(page: Any, built: Any) -> None:
    latent = example_of(built, built.hostile)
    open_site(page, (built.site / "index.html").as_uri(), f"#/latent/{latent}")
    shown = page.locator("#examples .header").all_text_contents()
    assert built.proteins[built.hostile][1] in shown
    assert page.locator("main img").count() == 0
    text = b"".join(path.read_bytes() for path in (built.site / "data" / "0").glob("group-*.js"))
    assert b"</script>" not in text
    assert "\u2028".encode() not in text


def test_examples_have_their_colours_and_places(page: Any, built: Any) -> None:
    latent = busy(built.runs[0])
    open_site(page, (built.site / "index.html").as_uri(), f"#/latent/{latent}")
    mine = (row for row in example_rows(built.runs[0]) if row["latent"] == latent)
    top = next(row for row in mine if row["kind"] == "top" and row["rank"] == 1)
    first = page.locator("#examples .example").first
    assert first.locator(".peak").inner_text() == built.proteins[top["protein"]][2][top["position"] - 1]
    assert first.locator(".peak").get_attribute("class") == "l9 peak"
    first.get_by_role("button", name="Whole").click()
    lines = first.locator(".whole .seq:not(.ruler):not(.annotated)").all_text_contents()
    assert "".join(lines) == built.proteins[top["protein"]][2]
    assert first.locator(".whole b").count() == len(top["positions"])
    numbers, letters = first.locator(".whole .ruler").first.text_content(), lines[0]
    assert numbers[9] == "0"
    assert numbers[8] == "1"
    assert letters[9] == built.proteins[top["protein"]][2][9]
    boxes = [first.locator(f".window .seq >> nth={i}").locator("span").bounding_box() for i in (0, 1)]
    assert abs(boxes[0]["x"] - boxes[1]["x"]) < 0.6
    assert abs(boxes[0]["width"] - boxes[1]["width"]) < 0.6


def test_structure_is_drawn(page: Any, built: Any) -> None:
    pytest.importorskip("biotite")
    latent = example_of(built, built.helix)
    open_site(page, (built.site / "index.html").as_uri(), f"#/latent/{latent}")
    page.locator(".example button.structure").first.click()
    drawn, warm = page.evaluate(  # that the canvas is there does not say that anything has been drawn
        """async () => {
          const counts = async (source) => {
            const picture = new Image();
            const shot = new Promise((done) => { picture.onload = done; });
            picture.src = source.toDataURL();
            await shot;
            const copy = document.createElement("canvas");
            [copy.width, copy.height] = [source.width, source.height];
            const pen = copy.getContext("2d");
            pen.drawImage(picture, 0, 0);
            const bytes = pen.getImageData(0, 0, copy.width, copy.height).data;
            let [drawn, warm] = [0, 0];
            for (let i = 0; i < bytes.length; i += 4) {
              if (bytes[i] !== bytes[0] || bytes[i + 1] !== bytes[1] || bytes[i + 2] !== bytes[2]) drawn++;
              if (bytes[i] > bytes[i + 2] + 40) warm++;
            }
            return [drawn, warm];
          };
          for (;;) {
            const source = document.querySelector(".viewer canvas");
            const found = source && source.width && source.height ? await counts(source) : [0, 0];
            if (found[0] > 500) return found;  // the molecule
            await new Promise((done) => setTimeout(done, 50));
          }
        }"""
    )
    assert 10 < warm < drawn  # residues on which it fires, among grey ones


def test_own_sequence_residue_by_residue(page: Any, built: Any, served: str) -> None:
    from plmsae_cli.plm.alphabet import encode, pack
    from plmsae_cli.runtime.models import load_plm

    sequence = built.proteins[max(built.proteins)][2][:70]
    open_site(page, served, "#/own")
    page.fill("#own", f">mine\n{sequence.lower()}\n")
    page.get_by_role("button", name="Show its latents").click()
    page.wait_for_selector("text=Strongest latents")
    packed = pack([encode(sequence)])
    layer = json.loads((built.runs[0] / "sae" / "sae.json").read_text())["layer"]
    x_LD = load_plm("bundled")(packed.tokens_T, packed.documents, layers=[layer]).hidden[layer][1:-1]
    sae = load_sae(built.runs[0])
    acts_LN = sae.encode_dense(x_LD).detach()
    share_N = (acts_LN / sae.maximum_N.clamp(min=1e-9)).amax(0)
    wanted = torch.argsort(-share_N, stable=True)[:5].tolist()
    shown = page.locator(".examples .who").all_inner_texts()
    assert shown[:5] == [f"latent {n}" for n in wanted]
    assert len(shown) == min(40, int((share_N > 0).sum()))
    page.locator(".pickable b").nth(4).click()
    listed = page.locator(".whole + div a").all_inner_texts()
    here = acts_LN[4] / sae.maximum_N.clamp(min=1e-9)
    assert listed[0] == str(int(here.argmax()))
    page.fill("#own", "MK1?")
    page.get_by_role("button", name="Show its latents").click()
    page.wait_for_selector("text=residue 3 is '?'")


def test_two_dictionaries_side_by_side(page: Any, built: Any) -> None:
    latent = busy(built.runs[0])
    rows_N, rows_M = (torch.nn.functional.normalize(load_sae(run).w_dec_ND.detach(), dim=1) for run in built.runs)
    cosine_NM = rows_N @ rows_M.T
    nearest = cosine_NM.argmax(1).tolist()
    open_site(page, (built.site / "index.html").as_uri(), f"#/compare/{latent}")
    assert page.locator(".pair a", has_text="Latent").all_inner_texts() == [
        f"Latent {latent}",
        f"Latent {nearest[latent]}",
    ]
    assert f"decoder cosine {cosine_NM[latent].max():.2f}" in page.locator(".pair").inner_text()
    if built.order is not None:
        assert nearest == torch.argsort(built.order).tolist()
        assert "co-activation 1.00" in page.locator(".pair").inner_text()
    windows = [page.locator(".pair > div").nth(i).locator(".window").all_text_contents() for i in (0, 1)]
    assert windows[0]
    assert windows[1]
    assert built.order is None or windows[0] == windows[1]
    open_site(page, (built.site / "index.html").as_uri(), "#/compare")
    page.wait_for_selector(".table")
    numbers = page.locator(".table tbody tr:not(.space)").first.locator("td").all_inner_texts()
    assert str(nearest[int(numbers[0])]) in numbers


def test_motif_counts_windows(page: Any, built: Any) -> None:
    import re

    open_site(page, (built.site / "index.html").as_uri(), "#/motif?q=" + "L..L")
    page.wait_for_selector("text=with the largest share")
    latent = int(page.locator("tbody a").first.inner_text())
    windows = []
    for row in example_rows(built.runs[0]):
        if row["latent"] == latent and row["kind"] == "top":
            padded = "-" * 10 + built.proteins[row["protein"]][2] + "-" * 10
            windows.append(padded[row["position"] - 1 : row["position"] + 20])
    hits = sum(bool(re.search("L..L", window)) for window in windows)
    assert page.locator("tbody tr").first.locator("td").nth(1).inner_text() == f"{hits} of {len(windows)}"


def test_keys_and_colours(page: Any, made: Any) -> None:
    open_site(page, (made.site / "index.html").as_uri())
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog:not([open])", state="attached")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector("h1:text-is('Latent 1')")
    page.keyboard.press("]")
    page.wait_for_selector("h1:text-is('Latent 2')")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("t")
    page.keyboard.press("t")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    press = "for (const key of 'gm') document.body.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }))"
    page.evaluate(press)  # one soon after the other, however busy the machine is
    page.wait_for_selector("h1:text-is('Motif')")


def test_csv_of_what_is_shown(page: Any, made: Any) -> None:
    open_site(page, (made.site / "index.html").as_uri(), "#/?pattern=point")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as CSV").click()
    rows = list(csv.DictReader(io.StringIO(Path(saved.value.path()).read_text())))
    density = pq.read_table(made.runs[0] / "eval/features/latents.parquet")["density"].to_pylist()
    assert [int(row["latent"]) for row in rows] == [n for n in range(len(made.order)) if n % 2]
    assert [float(row["density"]) for row in rows] == pytest.approx(
        [density[n] for n in range(len(made.order)) if n % 2], rel=1e-6
    )


def test_every_part_of_the_form_is_shown(page: Any, tmp_path: Path) -> None:
    """The example of docs/features.md: a latent that never fired, one in a tree, candidates, headers that are markup."""
    from plmsae_cli.browse.site import build_site

    path = Path(__file__).parents[1] / "evaluation" / "features_example.py"
    spec = importlib.util.spec_from_file_location("features_example", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.write_example(tmp_path / "run" / "eval" / "features", num_latents=60, proteins=20, latents_per_group=16)
    base = build_site([tmp_path / "run"], tmp_path / "site").as_uri()
    open_site(page, base, "#/latent/0")
    assert page.get_by_text("It never fired on the residues read.").is_visible()
    open_site(page, base, "#/latent/59")
    table = pq.read_table(tmp_path / "run/eval/features/latents.parquet").to_pylist()[59]
    tree = page.locator(".tree a").all_inner_texts()
    assert tree[0] == f"latent {table['parent']}"
    rows = pq.read_table(tmp_path / "run/eval/features/examples/group-00003.parquet").to_pylist()
    outside = {row["protein"] for row in rows if row["latent"] == 59 and row["annotated"] is False}
    assert outside
    assert page.locator("#candidates .example").count() == min(6, len(outside))
    assert page.locator("section", has=page.locator("h2", has_text="Decoder neighbours")).locator(
        "a"
    ).all_inner_texts() == [str(n) for n in table["neighbours"]]
    open_site(page, base, "#/latent/60")
    assert page.get_by_text("there is no latent 60").is_visible()


def test_what_happens_without_a_latent(page: Any, made: Any) -> None:
    """The section of an ablation has each amino acid's effect, largest first; latents that were not edited have none."""
    rows = pq.read_table(made.runs[0] / "eval/steering/effects.parquet").to_pylist()
    effect = {row["readout"]: row["effect"] for row in rows if row["strength"] == 1.0 and row["readout"] != "KL"}
    open_site(page, (made.site / "index.html").as_uri(), f"#/latent/{rows[0]['latent']}")
    section = page.locator("#steering")
    assert section.locator("h2").inner_text() == "Ablation effects"
    assert "residues on which it fires of 9 proteins" in section.inner_text()
    titles = section.locator("svg title").all_text_contents()
    assert [text[0] for text in titles] == sorted(effect, key=lambda letter: -effect[letter])
    assert [float(text[3:].split()[0]) for text in titles] == pytest.approx(
        sorted(effect.values(), reverse=True), abs=1e-3
    )
    with page.expect_download() as saved:
        section.get_by_role("button", name="Save as SVG").click()
    drawn = ElementTree.fromstring(Path(saved.value.path()).read_text())
    assert sum(element.tag.endswith("rect") for element in drawn.iter()) == 40
    open_site(page, (made.site / "index.html").as_uri(), f"#/latent/{rows[0]['latent'] + 1}")
    assert page.locator("#steering").count() == 0


@pytest.mark.parametrize("case", ["there", "absent", "elsewhere"])
def test_alphafold_is_asked_when_the_button_is_pressed(plain_page: Any, made: Any, case: str) -> None:
    page = plain_page
    asked: list[str] = []
    site = "https://alphafold.ebi.ac.uk"
    file = f"{site if case != 'elsewhere' else 'https://example.org'}/files/AF-P12345.pdb"

    def answer(route: Any) -> None:
        asked.append(route.request.url)
        allow = {"Access-Control-Allow-Origin": "*"}
        if route.request.url == file:
            route.fulfill(body=(made.site.parent / "P12345.pdb").read_text().replace(" B", " A"), headers=allow)
        else:
            route.fulfill(status=404 if case == "absent" else 200, json=[{"pdbUrl": file}], headers=allow)

    page.add_init_script("Object.defineProperty(navigator, 'onLine', { get: () => true })")
    page.route("https://**/*", answer)
    open_site(page, (made.site / "index.html").as_uri(), f"#/latent/{example_of(made, 1)}")
    example = page.locator("#examples .example", has_text="P12345").first
    button = example.get_by_role("button", name="AlphaFold (online)")
    assert asked == []
    button.click()
    if case == "there":
        page.wait_for_selector(".viewer canvas")
        assert asked == [f"{site}/api/prediction/P12345", file]
    else:
        words = {"absent": "AlphaFold DB has none of P12345", "elsewhere": "AlphaFold DB names another server"}
        page.wait_for_selector(f"text=No structure: {words[case]}")
        assert len(asked) == 1


def test_own_sequences_that_are_none(plain_page: Any, served: str) -> None:
    page = plain_page
    open_site(page, served, "#/own")
    for text, words in (
        ("", "there is no sequence"),
        (">only a header", "there is no sequence"),
        ("MKV<b>", "residue 4 is '<'"),
        ("A" * 2049, "2,049 residues are too many"),
        ("A" * 70_000, "at most 64 kB"),
    ):
        page.fill("#own", text)
        page.get_by_role("button", name="Show its latents").click()
        page.wait_for_selector(f"text=Not read: >> text={words}")
    page.route("**/api/sequence", lambda route: route.abort())
    page.get_by_role("button", name="Show its latents").click()
    page.wait_for_selector("text=the server does not answer")
    assert page.locator(".examples").count() == 0


def views(made: Any) -> list[str]:
    """Every kind of page that opens from disk."""
    latent = busy(made.runs[0])
    steered = pq.read_table(made.runs[0] / "eval/steering/effects.parquet")["latent"][0].as_py()
    return ["#/", f"#/latent/{latent}", f"#/latent/{steered}", "#/motif?q=LL", "#/compare", f"#/compare/{latent}"]


def test_nothing_moves_while_a_page_loads(page: Any, made: Any) -> None:
    page.add_init_script(
        """window.shifted = 0;
        new PerformanceObserver((list) => {
          for (const entry of list.getEntries()) window.shifted += entry.value;
        }).observe({ type: "layout-shift", buffered: true });"""
    )
    for hash_ in views(made):
        open_site(page, (made.site / "index.html").as_uri(), hash_)
        page.wait_for_timeout(150)
        assert page.evaluate("window.shifted") < 0.02, hash_


def every_view(page: Any, made: Any, settle: int) -> Iterator[str]:
    """Each kind of page open, in light and in dark, after so many milliseconds; its name."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for hash_ in views(made):
            open_site(page, (made.site / "index.html").as_uri(), hash_)
            page.wait_for_timeout(settle)
            yield f"{scheme} {hash_}"


def test_names_contrast_and_order(page: Any, made: Any) -> None:
    """What Lighthouse looks at, by rules of WCAG 2.1: names of controls, contrast of text, landmarks, headings, tab order."""
    rules = Path(__file__).with_name("accessible.js").read_text(encoding="utf-8")
    for view in every_view(page, made, 50):
        assert page.evaluate(rules) == [], view
    reached = []
    page.evaluate("document.activeElement.blur()")
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)"))
        outlined = "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
        assert page.evaluate(outlined), "where the keyboard is cannot be seen"
    assert reached == sorted(set(reached))


def test_accessible(page: Any, made: Any) -> None:
    """axe-core's rules of WCAG 2.1 A and AA, on every kind of page, in light and in dark."""
    axe = os.environ.get("PLMSAE_AXE", "")
    if not Path(axe).is_file():
        pytest.skip("axe-core is not here: npm install axe-core, and PLMSAE_AXE=node_modules/axe-core/axe.min.js")
    for view in every_view(page, made, 100):
        page.evaluate(Path(axe).read_text(encoding="utf-8"))
        found = page.evaluate("axe.run({preload: false, runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})")
        bad = [(one["id"], [node["html"][:150] for node in one["nodes"]][:3]) for one in found["violations"]]
        assert bad == [], f"{view}"
