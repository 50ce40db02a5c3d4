// Two dictionaries: each latent of one beside its counterpart in the other.

const WAYS = { cosine: ["decoder cosine", "The latent of the other dictionary whose decoder row is nearest."], together: ["co-activation", "The one whose activations on the same residues correlate best (Pearson)."] };

async function matchesOf(run) {
  const body = await load(`${run.number}/matches`);
  const ways = {};
  for (const way of Object.keys(WAYS)) if (body[way]) ways[way] = { latent: decode(body[way].latent), value: decode(body[way].value) };
  return { ways, residues: body.residues };
}

function side(run, page, ways) {
  const top = page.examples.filter((one) => one.kind === "top").slice(0, 6);
  const concept = page.concept || (page.concepts[0] || {}).concept;
  return h("div", null, h("p.eyebrow", null, run.run), h("h2", null, latentLink(run, page.latent, `Latent ${page.latent}`)), ways && h("p.small", null, ways),
    h("p.muted.small", null, `fires on ${percent(page.density)}, maximum ${number(page.max)}${concept ? `; ${concept}${page.concept_f1 !== undefined ? `, F1 ${share(page.concept_f1)}` : ""}` : ""}`),
    h("ol.examples", null, top.map((example) => exampleItem(page, example, concept, NEAR))));
}

async function compareView(route, main) {
  const [run, other] = [await openRun(route.run), await openRun(1 - route.run)];
  const { ways, residues: measured } = await matchesOf(run);
  document.title = `Compare · ${run.run} · plmsae`;
  const swap = h("a.button", { href: address(other.number, "compare") }, `From ${other.run}`);
  if (route.id === null) {
    const order = Object.keys(ways);
    let way = ways[route.params.get("by")] ? route.params.get("by") : order[0];
    const holder = h("div");
    const chart = h("div");
    const buttons = h("span.row");
    const said = h("p.muted.small");
    const draw = () => {
      const match = ways[way];
      const valid = (i) => match.latent[i] < other.num_latents;
      const rows = [...match.value.keys()].sort((a, b) => valid(b) - valid(a) || match.value[b] - match.value[a] || a - b);
      const table = new LongTable({ label: "Latents and their counterparts", sort: { key: "value", down: true }, resort: () => {}, open: (latent) => go(address(run.number, "compare", latent)), columns: [
        { key: "latent", name: run.run, num: true, width: 110, text: String, node: (i) => h("a", { href: address(run.number, "compare", i) }, i) },
        run.strings.concepts && { key: "concept", name: "Best concept", wide: true, text: (i) => conceptOf(run, i) || "" },
        ...order.flatMap((one) => [
          { key: `${one}-latent`, name: other.run, num: true, width: 110, wide: one !== way, text: (i) => (ways[one].latent[i] < other.num_latents ? String(ways[one].latent[i]) : "") },
          { key: one, name: WAYS[one][0], num: true, width: 150, wide: one !== way, text: (i) => (ways[one].latent[i] < other.num_latents ? share(ways[one].value[i]) : "") }]),
        other.strings.concepts && { key: "other", name: "Its best concept", text: (i) => (valid(i) ? conceptOf(other, match.latent[i]) || "" : "") },
      ].filter(Boolean) });
      for (const head of table.table.querySelectorAll("th")) { head.removeAttribute("aria-sort"); head.replaceChildren(head.textContent); }
      replace(holder, table.element);
      table.update(rows);
      keysOf.table = table;
      const bins = new Array(20).fill(0);
      for (const i of rows) if (valid(i)) bins[Math.min(19, Math.max(0, Math.floor(match.value[i] * 20)))]++;
      replace(chart, bars(`Histogram of ${WAYS[way][0]}`, bins, { width: 460, ticks: [{ at: 0, text: "0", anchor: "start" }, { at: 10, text: "0.5" }, { at: 19, text: "1", anchor: "end" }], titles: bins.map((b, i) => `${(i / 20).toFixed(2)} to ${((i + 1) / 20).toFixed(2)}: ${b}`) }));
      said.textContent = `${WAYS[way][1]}${way === "together" ? ` Measured on ${count(measured)} residues.` : ""}`;
      replace(buttons, order.map((one) => h("button", { type: "button", "aria-pressed": one === way ? "true" : "false", onclick: () => { way = one; remember(new URLSearchParams({ by: one })); draw(); } }, WAYS[one][0])));
    };
    const save = () => saveCsv(`${run.run}-against-${other.run}`, ["latent", ...order.flatMap((one) => [`${one}_latent`, one])], [...ways[order[0]].value.keys()].map((i) => [i, ...order.flatMap((one) => (ways[one].latent[i] < other.num_latents ? [ways[one].latent[i], ways[one].value[i]] : [null, null]))]));
    replace(main, h("p.eyebrow", null, "Two dictionaries"), h("h1", null, `${run.run} and ${other.run}`),
      h("p.lead", null, `For each latent of ${run.run} its counterpart in ${other.run}.`), h("div.row.between", null, buttons, h("span.row", null, swap, saveButton("CSV", save))), said, h("div.narrow-chart", null, chart), holder);
    draw();
    return;
  }
  const latent = Number(route.id);
  const page = await openLatent(run, latent);
  const targets = new Map();
  for (const [way, match] of Object.entries(ways)) {
    const to = match.latent[latent];
    if (to < other.num_latents) targets.set(to, [...(targets.get(to) || []), `${WAYS[way][0]} ${share(match.value[latent])}`]);
  }
  const sides = await Promise.all([...targets].map(async ([to, words]) => side(other, await openLatent(other, to), words.join(", "))));
  replace(main, h("p.eyebrow", null, h("a", { href: address(run.number, "compare") }, `${run.run} and ${other.run}`)), h("h1", null, `Latent ${latent} and its counterpart`), h("p.row", null, legend(page.max)),
    h("div.pair", null, side(run, page, null), h("div", null, sides.length ? sides : h("p.lead", null, "None fires where it does."))));
}
