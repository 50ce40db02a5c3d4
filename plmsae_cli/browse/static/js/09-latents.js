// The first page: all latents as points, as a map, as a table.

const scrolled = new Map(); // where the table stood, by address

/** What the address asks for. */
function filtersOf(params) {
  const value = (name) => (params.get(name) === null || params.get(name) === "" ? null : Number(params.get(name)));
  const sort = params.get("sort") || "latent";
  return {
    text: params.get("q") || "", d0: value("d0"), d1: value("d1"), f0: value("f0"), f1: value("f1"),
    pattern: params.get("pattern") || "", cluster: value("cluster"), sort: { key: sort.replace("-", ""), down: sort.startsWith("-") },
  };
}

/** 1 for each latent that passes. A number finds that latent, other words a concept, family, pattern or description. */
function passing(run, filters) {
  const shown = new Uint8Array(run.num_latents);
  const words = filters.text.toLowerCase().split(/\s+/).filter(Boolean);
  const hit = (names) => (run.strings[names] || []).map((name) => words.every((word) => name.toLowerCase().includes(word)));
  const [concepts, families, patterns, descriptions] = ["concepts", "families", "patterns", "descriptions"].map(hit);
  const { density, concept, family, pattern, description, concept_f1: f1, cluster } = run.column;
  const numbered = words.length && words.every((word) => /^\d+$/.test(word)) ? new Set(words.map(Number)) : null;
  const pattern_at = filters.pattern ? (run.strings.patterns || []).indexOf(filters.pattern) : null;
  for (let i = 0; i < shown.length; i++) {
    if (filters.d0 !== null && !(density[i] >= filters.d0)) continue;
    if (filters.d1 !== null && !(density[i] <= filters.d1)) continue;
    if (filters.f0 !== null && !(f1 && f1[i] >= filters.f0)) continue;
    if (filters.f1 !== null && !(f1 && f1[i] <= filters.f1)) continue;
    if (pattern_at !== null && pattern[i] !== pattern_at) continue;
    if (filters.cluster !== null && cluster[i] !== filters.cluster) continue;
    if (words.length && !(numbered ? numbered.has(i) : (concept && concepts[concept[i]]) || (family && families[family[i]]) || (pattern && patterns[pattern[i]]) || (description && descriptions[description[i]]))) continue;
    shown[i] = 1;
  }
  return shown;
}

function ordered(run, shown, sort) {
  const rows = [];
  for (let i = 0; i < shown.length; i++) if (shown[i]) rows.push(i);
  const column = run.column[sort.key];
  if (sort.key === "latent" || !column) {
    if (sort.down) rows.reverse();
    return rows;
  }
  const side = sort.down ? -1 : 1;
  const missing = (v) => Number.isNaN(v) || (run.strings[`${sort.key === "family" ? "familie" : sort.key}s`] || { length: Infinity }).length <= v;
  return rows.sort((a, b) => {
    const [x, y] = [column[a], column[b]];
    const [none_x, none_y] = [missing(x), missing(y)];
    return none_x - none_y || (none_x ? a - b : side * (x - y) || a - b);
  });
}

function scoreCell(value) {
  if (value === undefined || Number.isNaN(value)) return "";
  const bar = h("i");
  bar.style.width = `${Math.round(value * 100)}%`;
  return [share(value), h("span.bar-cell.wide-only", { "aria-hidden": "true" }, bar)];
}

function latentLink(run, latent, text = null) {
  return h("a", { href: address(run.number, "latent", latent) }, text === null ? latent : text);
}

function columnsOf(run) {
  const { concept_f1: f1, family_f1: ff } = run.column;
  return [
    { key: "latent", name: "Latent", num: true, width: 92, text: String, node: (i) => latentLink(run, i) },
    { key: "density", name: "Density", num: true, width: 110, text: (i) => percent(run.column.density[i]) },
    { key: "max", name: "Max", num: true, width: 86, wide: true, text: (i) => number(run.column.max[i]) },
    run.strings.concepts && { key: "concept", name: "Best concept", text: (i) => conceptOf(run, i) || "" },
    f1 && { key: "concept_f1", name: "F1", num: true, width: 122, text: (i) => share(f1[i]), node: (i) => scoreCell(f1[i]) },
    run.strings.families && { key: "family", name: "Family", wide: true, width: 130, text: (i) => familyOf(run, i) || "" },
    ff && { key: "family_f1", name: "F1, family", num: true, wide: true, width: 132, text: (i) => share(ff[i]), node: (i) => scoreCell(ff[i]) },
    run.strings.patterns && { key: "pattern", name: "Pattern", wide: true, width: 96, text: (i) => patternOf(run, i) || "" },
    { key: "letter", name: "Residue", wide: true, width: 92, text: (i) => run.letters[run.column.letter[i]] || "" },
  ].filter(Boolean);
}

function describeLatent(run, latent) {
  const concept = conceptOf(run, latent);
  const f1 = run.column.concept_f1;
  return `latent ${latent}: fires on ${percent(run.column.density[latent])}${concept ? `; ${concept}, F1 ${share(f1[latent])}` : ""}`;
}

function subtitle(run) {
  return [
    `${count(run.num_latents)} latents`, run.architecture && `${run.architecture}${run.k ? `, k ${run.k}` : ""}`,
    `layer ${run.layer}${run.num_layers ? ` of ${run.num_layers}` : ""}`, run.model && run.model.name,
    `${count(run.rows)} residues of ${count(run.proteins)} proteins read`,
  ].filter(Boolean).join(" · ");
}

function scatterOf(run, pick, select) {
  const { density, concept_f1: f1 } = run.column;
  const x = density.map((d) => (d > 0 ? Math.log10(d) : NaN));
  const low = Math.floor(x.reduce((least, v) => (v < least ? v : least), -1));
  return new Scatter({
    label: "Density of each latent against its best F1; the table below has the same numbers", points: { x, y: f1 },
    axes: { x: { low, high: 0, log: true, label: "density (share of residues)" }, y: { low: 0, high: 1, label: "best F1 on test" } },
    colours: ["--blue"], describe: (i) => describeLatent(run, i), pick, select,
  });
}

function mapOf(run, pick) {
  const axis = { low: -0.02 * 65535, high: 1.02 * 65535 };
  return new Scatter({
    label: "Map of the decoder: latents that write alike lie together", points: { x: run.column.x, y: run.column.y },
    axes: { x: axis, y: axis }, margin: { left: 2, right: 2, top: 2, bottom: 2 },
    colours: run.clusters.map((_, k) => `--c${k}`), kind: run.column.cluster, describe: (i) => describeLatent(run, i), pick,
  });
}

/** Histogram of log10 density, a bar of its own for latents that never fire. */
function densityHistogram(run, shown) {
  const { density } = run.column;
  let least = 0.1;
  for (let i = 0; i < density.length; i++) if (density[i] > 0 && density[i] < least) least = density[i];
  const low = Math.floor(Math.log10(least));
  const each = 5;
  const total = new Array(-low * each + 1).fill(0);
  const part = new Array(total.length).fill(0);
  for (let i = 0; i < density.length; i++) {
    const bin = density[i] > 0 ? 1 + Math.min(total.length - 2, Math.floor((Math.log10(density[i]) - low) * each)) : 0;
    total[bin]++;
    part[bin] += shown[i];
  }
  const titles = total.map((t, b) => `${b ? `10^${(low + (b - 1) / each).toFixed(1)} to 10^${(low + b / each).toFixed(1)}` : "never"}: ${part[b]} of ${t}`);
  const ticks = [{ at: 0, text: "never", anchor: "start" }];
  for (let e = low; e < 0; e++) ticks.push({ at: 0.5 + (e - low) * each, text: `10${superscript(e)}` });
  const chart = h("div", null, bars(`Histogram of densities: ${count(part.reduce((a, b) => a + b))} of ${count(density.length)} latents shown`, part, { ghost: total, titles, ticks: ticks.filter((t, i) => i === 0 || t.at > 4), height: 62, width: phone.matches ? 305 : 587 }));
  // A decade is as wide as in the scatter above, whose margins are 44 and 10 pixels.
  chart.style.padding = `0 10px 0 max(0px, calc(44px - (100% - 54px) / ${total.length - 1}))`;
  return chart;
}

async function latentsView(route, main) {
  const run = await openRun(route.run);
  const params = route.params;
  const filters = filtersOf(params);
  const open = (latent) => {
    scrolled.set(location.hash, table.element.scrollTop);
    listed = rows;
    go(address(run.number, "latent", latent));
  };
  let rows = [];
  let table = null;
  let shown = null;
  const has_f1 = Boolean(run.column.concept_f1);
  const change = (changes) => {
    for (const [key, value] of Object.entries(changes)) {
      if (value === null || value === "") params.delete(key);
      else params.set(key, value);
    }
    remember(params);
    refresh();
  };
  const pick = (latent) => open(latent);
  const scatter = has_f1 && scatterOf(run, pick, ({ x, y }) => {
    const box = { d0: (10 ** x[0]).toPrecision(3), d1: (10 ** x[1]).toPrecision(3), f0: Math.max(0, y[0]).toFixed(2), f1: Math.min(1, y[1]).toFixed(2) };
    for (const [key, value] of Object.entries(box)) inputs[key].value = value;
    change(box);
  });
  const map = run.column.x && mapOf(run, pick);
  const field = (key, name, attributes, kind = "narrow") => {
    inputs[key] = h(`input.${kind}`, { ...attributes, value: params.get(key) || "", oninput: () => change({ [key]: inputs[key].value }) });
    return h(`label${kind === "wide" ? ".wide" : ""}`, null, name, inputs[key]);
  };
  const inputs = {};
  const range = { type: "number", step: "any", min: 0, max: 1, placeholder: "any" };
  const found = h("p.muted.small", { role: "status" });
  const histogram = h("div.margin", { title: "Latents by density; grey: all, blue: those that pass the filters" });
  const chips = h("div.clusters", { role: "group", "aria-label": "Clusters" });
  const picker = run.strings.patterns && h("select", { onchange: (event) => change({ pattern: event.target.value }) },
    h("option", { value: "" }, "any"), run.strings.patterns.map((name) => h("option", { value: name, selected: name === filters.pattern }, name)));
  const holder = h("div");

  function makeTable(sort) {
    table = new LongTable({
      label: "Latents", columns: columnsOf(run), sort, open,
      resort: (key) => {
        const was = filtersOf(params).sort;
        const down = was.key === key ? !was.down : key !== "latent" && key !== "concept" && key !== "family" && key !== "pattern" && key !== "letter";
        change({ sort: `${down ? "-" : ""}${key}` });
      },
    });
    table.key = `${sort.down}${sort.key}`;
    replace(holder, table.element);
  }

  function refresh() {
    const now = filtersOf(params);
    shown = passing(run, now);
    rows = ordered(run, shown, now.sort);
    if (!table || table.key !== `${now.sort.down}${now.sort.key}`) makeTable(now.sort);
    table.update(rows);
    keysOf.table = table;
    if (scatter) scatter.update(shown);
    if (map) map.update(shown);
    replace(histogram, densityHistogram(run, shown));
    replace(chips, (run.clusters || []).map((name, k) =>
      h("button", { type: "button", "aria-pressed": now.cluster === k ? "true" : "false", title: `cluster ${k + 1}: ${name || "no concept in common"}`, onclick: () => change({ cluster: now.cluster === k ? null : k }) }, h(`span.swatch.k${k}`, { "aria-hidden": "true" }), h("span", null, `${k + 1} ${name}`))));
    const all = rows.length === run.num_latents;
    replace(found, all ? `${count(rows.length)} latents` : `${count(rows.length)} of ${count(run.num_latents)} latents`,
      !rows.length && ": none passes. A motif is looked for under “Motif”.");
  }

  const clear = () => {
    for (const key of [...params.keys()]) params.delete(key);
    remember(params);
    show();
  };
  const save = () => {
    saveCsv(`${run.run}-latents`, ["latent", "density", "max", "concept", "concept_f1", "family", "family_f1", "pattern", "letter", "cluster"],
      rows.map((i) => [i, run.column.density[i], run.column.max[i], conceptOf(run, i), (run.column.concept_f1 || [])[i], familyOf(run, i), (run.column.family_f1 || [])[i], patternOf(run, i), run.letters[run.column.letter[i]], run.column.cluster ? run.column.cluster[i] + 1 : null]));
    announce(`${count(rows.length)} latents saved`);
  };
  replace(main,
    h("p.eyebrow", null, subtitle(run)), h("h1", null, run.run),
    run.demo && h("p.warn", null, "The language model is the bundled demonstration model: what its latents find means little."),
    h("div.plots", null,
      h("div.plot", null, h("div.row.between", null, h("h2", null, has_f1 ? "Density and best F1" : "Density"), scatter && saveButton("SVG", () => saveText(`${run.run}-scatter.svg`, "image/svg+xml", svgText(scatter.svg())))),
        scatter && [h("p.muted.small.wide-only", null, "Each latent is a point. Drag a rectangle to filter, click to open."), scatter.canvas], histogram),
      h("div.plot", null,
        map && [h("div.row.between", null, h("h2", null, "Decoder map"), saveButton("SVG", () => saveText(`${run.run}-map.svg`, "image/svg+xml", svgText(map.svg())))),
          h("p.muted.small.wide-only", null, "Two principal components of the decoder rows; clusters by k-means."), map.canvas, chips]),
    ),
    h("form.filters", { role: "search", onsubmit: (event) => event.preventDefault() },
      field("q", "Latent, concept, family or pattern", { type: "search", placeholder: "737, helix, PF00069 …", autocomplete: "off", id: "filter" }, "wide"),
      field("d0", "Density from", range), field("d1", "to", range),
      has_f1 && [field("f0", "F1 from", range), field("f1", "to", range)],
      picker && h("label", null, "Pattern", picker),
      h("span.tail.row", null, h("button", { type: "button", onclick: clear }, "Clear"), saveButton("CSV", save))),
    found, holder);
  refresh();
  const top = scrolled.get(location.hash);
  if (top) table.element.scrollTop = top;
  document.title = `${run.run} · plmsae`;
  redraw = () => { if (scatter) scatter.draw(); if (map) map.draw(); };
}

function svgText(svg) {
  svg.setAttribute("xmlns", SVG);
  return new XMLSerializer().serializeToString(svg);
}
