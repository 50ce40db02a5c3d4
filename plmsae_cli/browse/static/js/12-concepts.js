// A latent's concepts, with precision and recall at the threshold of a slider.

/** Precision, recall and F1 above threshold number j, from counts by level (level l: above l of the thresholds). */
function scoresAt(concept, j) {
  const above = (counts) => counts.slice(j + 1).reduce((a, b) => a + b, 0);
  const hits = above(concept.inside);
  const fired = hits + above(concept.outside);
  const total = concept.found.reduce((a, b) => a + b, 0);
  const precision = fired ? hits / fired : 0;
  const recall = total ? above(concept.found) / total : 0;
  return { precision, recall, f1: precision + recall ? (2 * precision * recall) / (precision + recall) : 0, hits, fired };
}

/** Precision and recall over the thresholds above which it fires at all, with a mark at the one that is set. */
function curveChart(concept, thresholds, j) {
  const [width, height] = [280, 130];
  const all = thresholds.map((_, i) => scoresAt(concept, i)).filter((one, i) => i === 0 || one.fired);
  const across = (i) => (i / (thresholds.length - 1)) * width;
  const path = (key) => all.map((one, i) => `${i ? "L" : "M"}${across(i).toFixed(1)} ${(10 + (1 - one[key]) * height).toFixed(1)}`).join("");
  return s("svg.chart.curve", { viewBox: `0 0 ${width + 62} ${height + 32}`, role: "img", "aria-label": `Precision and recall for ${concept.concept} by threshold` },
    [0, 0.5, 1].map((v) => s("line.axis", { x1: 0, x2: width, y1: 10 + (1 - v) * height, y2: 10 + (1 - v) * height })),
    s("line.here-line", { x1: across(j), x2: across(j), y1: 6, y2: height + 10 }),
    [["precision", "line-a"], ["recall", "line-b"], ["f1", "line-c"]].map(([key, kind]) => s(`path.${kind}`, { d: path(key), fill: "none" })),
    endLabels(all[all.length - 1], across(all.length - 1), height),
    s("text", { x: 0, y: height + 26 }, "threshold 0"), s("text", { x: width, y: height + 26, "text-anchor": "end" }, `${thresholds[thresholds.length - 1]} of max`));
}

/** Names at the ends of the lines, moved apart where they would lie on one another. */
function endLabels(last, x, height) {
  const names = [["precision", "line-a"], ["recall", "line-b"], ["F1", "line-c"]];
  const placed = names.map(([name, kind]) => ({ name, kind, y: 14 + (1 - last[name.toLowerCase()]) * height })).sort((a, b) => a.y - b.y);
  for (let i = 1; i < placed.length; i++) placed[i].y = Math.max(placed[i].y, placed[i - 1].y + 13);
  for (let i = 0; i < placed.length; i++) placed[i].y = Math.min(placed[i].y, height + 7 - 13 * (placed.length - 1 - i));
  return placed.map(({ name, kind, y }) => s(`text.${kind}-text`, { x: x + 6, y }, name));
}

function conceptSection(run, page) {
  if (!page.concepts.length || !run.thresholds) return null;
  const thresholds = run.thresholds;
  const chosen = thresholds.reduce((best, t, i) => (Math.abs(t - page.concepts[0].threshold) < Math.abs(thresholds[best] - page.concepts[0].threshold) ? i : best), 0);
  const body = h("tbody");
  const chart = h("div");
  const said = h("output", { for: "threshold", class: "small" });
  let selected = 0;
  const slider = h("input", { id: "threshold", type: "range", min: 0, max: thresholds.length - 1, step: 1, value: chosen, oninput: () => draw() });
  const draw = () => {
    const j = Number(slider.value);
    const text = `${share(thresholds[j])} of the maximum, activation ${number(thresholds[j] * page.max)}`;
    said.textContent = text;
    slider.setAttribute("aria-valuetext", text);
    replace(body, page.concepts.map((concept, i) => {
      const now = scoresAt(concept, j);
      return h(`tr${i === selected ? ".at" : ""}`, null,
        h("td", null, h("button.plain", { type: "button", "aria-pressed": i === selected ? "true" : "false", onclick: () => { selected = i; draw(); } }, concept.concept)),
        h("td.num", { "data-precision": now.precision, title: `${count(now.hits)} of ${count(now.fired)} residues on which it fires` }, share(now.precision)), h("td.num", { "data-recall": now.recall }, share(now.recall)),
        h("td.num", { "data-f1": now.f1 }, scoreCell(now.f1)), h("td.num.wide-only", null, share(concept.threshold)));
    }));
    replace(chart, curveChart(page.concepts[selected], thresholds, j));
  };
  const save = () => {
    const j = Number(slider.value);
    saveCsv(`${run.run}-latent-${page.latent}-concepts`, ["latent", "concept", "kind", "threshold", "precision", "recall", "f1", "chosen_threshold"],
      page.concepts.map((concept) => { const now = scoresAt(concept, j); return [page.latent, concept.concept, concept.kind, thresholds[j], now.precision, now.recall, now.f1, concept.threshold]; }));
  };
  draw();
  return h("section", { id: "concepts" },
    h("div.row.between", null, h("h2", null, "Concepts"), h("span.row", null, saveButton("CSV", save), saveButton("SVG", () => saveSvg(`${run.run}-latent-${page.latent}-curve`, chart.firstElementChild)))),
    h("p.lead.small", null, "Precision by residue, recall by instance (by residue for point-like kinds), on the test half. The chosen threshold was fixed on the other half."),
    h("div.slider", null, h("label.hidden", { for: "threshold" }, "Threshold"), slider, said),
    h("div.concepts", null,
      h("div.scroll", { tabindex: 0, role: "region", "aria-label": "Concepts of this latent" }, h("table", null, h("thead", null, h("tr", null, h("th", { scope: "col" }, "Concept"), h("th.num", { scope: "col" }, "Precision"), h("th.num", { scope: "col" }, "Recall"), h("th.num", { scope: "col" }, "F1"), h("th.num.wide-only", { scope: "col" }, "Chosen at"))), body)),
      chart));
}
