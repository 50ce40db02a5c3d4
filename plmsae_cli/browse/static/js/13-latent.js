// The page of one latent. What the run has nothing of is left out.

const BANDS = ["weakest quarter", "second quarter", "third quarter", "strongest quarter"];
const FIRST = 6; // examples of a band that are shown at once

function tile(name, value, remark) {
  return value === "" || value === null || value === undefined ? null : h("div.tile", null, h("span.name", null, name), h("span.value", null, value), remark && h("span.remark", null, remark));
}

function exampleItem(page, example, concept, reach) {
  const protein = page.proteins[example.protein];
  const { buttons, holder } = reach ? {} : structureBlock(protein, example); // side by side there is no room for one
  const more = h("div");
  const toggle = h("button", { type: "button", "aria-expanded": "false", onclick: () => {
    const open = toggle.getAttribute("aria-expanded") === "true";
    toggle.setAttribute("aria-expanded", String(!open));
    toggle.textContent = open ? "Whole" : "Close";
    replace(more, !open && wholeSequence(protein, example, page.max, concept));
  } }, "Whole");
  const tag = example.annotated === true ? "annotated" : example.annotated === false ? "not annotated" : null;
  return h("li.example", { tabindex: -1 },
    h("div.row", null, h("span.who", { title: protein.id }, protein.id), h("span.header", { title: protein.header }, protein.header),
      tag && h("span.muted.wide-only", { title: concept }, tag), h("span.muted", null, `${protein.sequence[example.position - 1] || ""}${example.position} of ${protein.length}`), h("span", null, number(example.activation)), toggle, buttons),
    protein.sequence ? exampleWindow(protein, example, page.max, reach) : null, more, holder);
}

function exampleList(page, examples, concept) {
  const list = h("ol.examples");
  const more = h("button.small", { type: "button" });
  let shown = 0;
  const grow = (to) => {
    append(list, examples.slice(shown, to).map((example) => exampleItem(page, example, concept)));
    shown = Math.min(to, examples.length);
    more.hidden = shown >= examples.length;
    more.textContent = `Show ${examples.length - shown} more`;
  };
  more.addEventListener("click", () => grow(examples.length));
  grow(FIRST);
  return [list, h("p", null, more)];
}

function exampleSections(run, page) {
  const concept = page.concept || (page.concepts[0] || {}).concept;
  const top = page.examples.filter((one) => one.kind === "top");
  const random = [3, 2, 1, 0].map((band) => [band, page.examples.filter((one) => one.kind === "random" && one.band === band)]);
  const all = [...top, ...random.flatMap(([, found]) => found)];
  if (!all.length) return h("section", null, h("h2", null, "Examples"), h("p.lead", null, "It never fired on the residues read."));
  const row = (one) => [page.latent, one.kind, one.band, one.rank, page.proteins[one.protein].id, page.proteins[one.protein].header, one.position, one.activation, one.annotated, page.proteins[one.protein].sequence.slice(Math.max(0, one.position - 11), one.position + 10)];
  const save = () => saveCsv(`${run.run}-latent-${page.latent}-examples`, ["latent", "kind", "band", "rank", "protein", "header", "position", "activation", "annotated", "window"], all.map(row));
  const svg = () => saveText(`${run.run}-latent-${page.latent}-examples.svg`, "image/svg+xml", svgText(examplesSvg(top.slice(0, 20), page.proteins)));
  const bounds = run.bands.map((low, b) => `${number(low * page.max)} to ${number((b < 3 ? run.bands[b + 1] : 1) * page.max)}`);
  return [
    h("section", { id: "examples" },
      h("div.row.between", null, h("h2", null, "Where it fires most"), h("span.row", null, legend(page.max), saveButton("CSV", save), saveButton("SVG", svg))),
      exampleList(page, top, concept)),
    candidateSection(run, page),
    random.filter(([, found]) => found.length).map(([band, found]) =>
      h("section", null, h("h2", null, `Drawn at random: ${BANDS[band]}`),
        h("p.lead.small", null, `Activation ${bounds[band]}; ${count(page.band_counts[band])} firings, ${percent(page.band_counts[band] / page.firing)} of all${run.one_per === "token" ? "" : `; one a ${run.one_per}`}.`), exampleList(page, found, concept))),
  ];
}

function candidateSection(run, page) {
  if (!page.candidates || !page.candidates.length) return null;
  const concept = page.concept || page.concepts[0].concept;
  return h("section", { id: "candidates" }, h("h2", null, "Fires here, not annotated"),
    h("p.lead.small", null, "Residues outside ", h("b", null, concept), ", the best concept, in proteins that have annotations; strongest first, one a protein. Candidates for a missing annotation, or for what the latent means beside it."),
    exampleList(page, page.candidates.map((i) => page.examples[i]), concept));
}

function neighbourSection(run, page) {
  const table = (title, head, rows) => h("section", null, h("h2", null, title),
    h("table", null, h("thead", null, h("tr", null, head.map((name, i) => h(i ? "th.num" : "th", { scope: "col" }, name)))),
      h("tbody", null, rows.map(([latent, ...values]) => h("tr", null, h("td", null, latentLink(run, latent), conceptOf(run, latent) ? h("span.muted.small", null, ` ${conceptOf(run, latent)}`) : null), values.map((v) => h("td.num", null, v)))))));
  return [
    page.neighbours && table("Decoder neighbours", ["Latent", "Cosine"], page.neighbours.map(([n, c]) => [n, share(c)])),
    page.together && table("Fires together with", ["Latent", "Share", "Jaccard"], page.together.map(([n, a, b]) => [n, share(a), share(b)])),
  ];
}

function letterTicks(letters) {
  return [...letters].map((text, at) => ({ at, text }));
}

/** Amino acids in the order of the values, largest first. */
function byValue(letters, values) {
  const order = [...values.keys()].sort((a, b) => values[b] - values[a]);
  return { letters: order.map((i) => letters[i]).join(""), values: order.map((i) => values[i]), order };
}

function charts(run, page) {
  const name = (what) => `${run.run}-latent-${page.latent}-${what}`;
  const found = [];
  if (page.histogram && page.firing) {
    const ends = [{ at: 0, text: "0", anchor: "start" }, { at: page.histogram.length - 1, text: number(page.max), anchor: "end" }];
    found.push(chartBlock("Activations", `${count(page.firing)} firings by strength`, bars("Histogram of activations", page.histogram, { ticks: ends }), name("activations")));
  }
  if (page.logits) {
    const sorted = byValue(run.letters, page.logits);
    const titles = sorted.values.map((v, i) => `${sorted.letters[i]}: ${number(v)} nats`);
    found.push(chartBlock("What it predicts", "Change of each amino acid's log-probability (nats) when the latent is added at its maximum, later layers bypassed", bars("Logits over amino acids", sorted.values, { ticks: letterTicks(sorted.letters), titles }), name("logits")));
  }
  if (page.letters) {
    const sorted = byValue(run.letters, page.letters);
    const ghost = sorted.order.map((i) => run.letter_shares[i]);
    const titles = sorted.values.map((v, i) => `${sorted.letters[i]}: ${percent(v)} of firings, ${percent(ghost[i])} of residues`);
    found.push(chartBlock("Amino acids", "Share of the firings; grey: of all residues", bars("Amino acids on which it fires", sorted.values, { ticks: letterTicks(sorted.letters), ghost, titles }), name("letters")));
  }
  if (page.deciles) {
    const ticks = [{ at: 0, text: "N-terminus", anchor: "start" }, { at: 9, text: "C-terminus", anchor: "end" }];
    found.push(chartBlock("Position in the protein", `Share of the firings in each tenth. Mean length of the protein ${number(page.mean_length, 3)}, of all residues ${number(run.mean_length, 3)}`, bars("Position in the protein", page.deciles, { ticks, ghost: new Array(10).fill(0.1), titles: page.deciles.map(percent) }), name("positions")));
  }
  return found;
}

function treeSection(run, page) {
  if (!run.prefixes || (page.parent === undefined && !page.children)) return null;
  const which = run.prefixes.findIndex((end) => page.latent < end) + 1;
  const children = (page.children || []).slice(0, 12);
  const here = h("li", null, h("span.here", null, `latent ${page.latent}`), h("span.muted.small", null, ` in prefix ${which} of ${run.prefixes.length}`),
    children.length > 0 && h("ul.tree", null, children.map((n) => h("li", null, latentLink(run, n, `latent ${n}`), h("span.muted.small", null, ` ${conceptOf(run, n) || ""}`)))),
    (page.children || []).length > 12 && h("p.muted.small", null, `and ${page.children.length - 12} more`));
  const tree = page.parent === undefined ? h("ul.tree", null, here)
    : h("ul.tree", null, h("li", null, latentLink(run, page.parent, `latent ${page.parent}`), h("span.muted.small", null, ` fires on ${percent(page.parent_share)} of these residues too; ${conceptOf(run, page.parent) || ""}`), h("ul.tree", null, here)));
  return h("section", null, h("h2", null, "In the Matryoshka"), tree);
}

function familySection(page) {
  if (!page.family) return null;
  return h("section", null, h("h2", null, "Family"), h("p.lead.small", null, `${page.family}: F1 ${share(page.family_f1)}, precision ${share(page.family_precision)}, recall ${share(page.family_recall)} on test proteins whose largest activation is at least ${number((page.family_threshold || 0) * page.max)}`));
}

async function latentView(route, main) {
  const run = await openRun(route.run);
  const latent = Number(route.id);
  if (!Number.isInteger(latent) || latent < 0 || latent >= run.num_latents) throw new Error(`there is no latent ${route.id}: they are 0 to ${count(run.num_latents - 1)}`);
  const page = await openLatent(run, latent);
  const around = listed.includes(latent) ? listed : null;
  const at = around ? around.indexOf(latent) : latent;
  const [before, after] = around ? [around[at - 1], around[at + 1]] : [latent - 1, latent + 1 < run.num_latents ? latent + 1 : undefined];
  const step = (to, text, name) => (to === undefined || to < 0 ? h("button", { type: "button", disabled: true, "aria-label": name }, text) : h("a.button", { href: address(run.number, "latent", to), "aria-label": name }, text));
  keysOf.before = before === undefined || before < 0 ? null : () => go(address(run.number, "latent", before));
  keysOf.after = after === undefined ? null : () => go(address(run.number, "latent", after));
  const best = page.concepts[0];
  const title = page.description || page.concept || (best && best.concept) || page.family || null;
  const main_part = [conceptSection(run, page), exampleSections(run, page)];
  const aside = [charts(run, page), familySection(page), neighbourSection(run, page), treeSection(run, page), steeringSection(run, page)];
  replace(main,
    h("div.row.between", null, h("div", null, h("p.eyebrow", null, h("a", { href: address(run.number, "latents") }, run.run), ` · layer ${run.layer}`), h("h1", null, `Latent ${latent}`)),
      h("span.row", null, step(before, "←", "Latent before"), step(after, "→", "Next latent"), runs.length > 1 && h("a.button", { href: address(run.number, "compare", latent) }, "Compare"))),
    title && h("p.verdict", null, title, page.description && page.description_pearson !== undefined && h("span.muted.small", null, ` (a description; predicted against true activation r ${share(page.description_pearson)})`)),
    h("div.tiles", null, tile("Density", percent(page.density), `${count(page.firing)} residues of ${count(run.rows)}`), tile("Maximum", number(page.max), page.mean_active !== undefined && `mean where it fires ${number(page.mean_active)}`),
      page.concept_f1 !== undefined && tile("F1, best concept", share(page.concept_f1), `at ${share(page.concept_threshold)} of the maximum, on test`),
      tile("Pattern", page.pattern, page.pattern && "of its runs along the sequence"),
      page.probe_targets && tile("Best single latent", page.probe_targets.length === 1 ? page.probe_targets[0] : `${page.probe_targets.length} probes`, page.probe_targets.length > 1 && page.probe_targets.join(", "))),
    h("div.columns", null, h("div", null, main_part), h("aside", { "aria-label": "About this latent" }, aside)));
  document.title = `Latent ${latent} · ${run.run} · plmsae`;
}
