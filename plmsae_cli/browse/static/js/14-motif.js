// A motif: a regular expression over the windows of each latent's strongest examples.

async function motifView(route, main) {
  const run = await openRun(route.run);
  const results = h("div");
  const said = h("p.muted.small", { role: "status" });
  const input = h("input", { id: "motif", type: "search", value: route.params.get("q") || "", placeholder: "C..C.{12,15}H..H", autocomplete: "off", spellcheck: "false" });
  let turn = 0;

  async function search() {
    const mine = ++turn;
    const text = input.value.trim();
    remember(text ? new URLSearchParams({ q: text }) : null);
    replace(results);
    said.textContent = "";
    if (!text) return;
    let pattern;
    try {
      pattern = new RegExp(text, "i");
    } catch (error) {
      said.textContent = `This is no regular expression: ${error.message.split(": ").pop()}`;
      return;
    }
    const found = [];
    let latent = 0;
    for (let file = 0; file < run.motif_files; file++) {
      const latents = await load(`${run.number}/motif-${padded(file)}`);
      if (mine !== turn) return;
      for (const windows of latents) {
        let hits = 0;
        let first = null;
        for (const window of windows) {
          const match = pattern.exec(window);
          if (match && match[0]) {
            hits++;
            first = first || [window, match.index, match[0].length];
          }
        }
        if (hits) found.push({ latent, hits, of: windows.length, first });
        latent++;
      }
      said.textContent = `${Math.round(((file + 1) / run.motif_files) * 100)} % searched`;
      await new Promise((resolve) => setTimeout(resolve));
    }
    found.sort((a, b) => b.hits / b.of - a.hits / a.of || b.of - a.of || a.latent - b.latent);
    said.textContent = `${count(found.length)} latents; shown are the ${count(Math.min(found.length, 200))} with the largest share of windows.`;
    listed = found.map((one) => one.latent);
    replace(results, found.length > 0 && h("div.scroll", { tabindex: 0, role: "region", "aria-label": "Latents with the motif" }, h("table", null,
      h("thead", null, h("tr", null, ["Latent", "Windows", "First match", "Best concept"].map((name, i) => h(`th${i === 3 ? ".wide-only" : ""}`, { scope: "col" }, name)))),
      h("tbody", null, found.slice(0, 200).map(({ latent, hits, of, first: [window, start, length] }) => h("tr", null, h("td", null, latentLink(run, latent)), h("td", null, `${hits} of ${of}`),
        h("td.seq", null, window.slice(0, start), h("b.l3", null, window.slice(start, start + length)), window.slice(start + length)), h("td.wide-only", null, conceptOf(run, latent) || "")))))));
  }

  replace(main, h("p.eyebrow", null, run.run), h("h1", null, "Motif"),
    h("p.lead", null, "A regular expression over one-letter codes, looked for in the 21 residues around each of the 20 strongest examples of every latent; - stands beyond the ends of a protein. Latents are ordered by the share of their windows that have it."),
    h("form.row", { onsubmit: (event) => { event.preventDefault(); search(); } }, h("label.hidden", { for: "motif" }, "Motif"), input, h("button.primary", { type: "submit" }, "Search")), said, results);
  document.title = `Motif · ${run.run} · plmsae`;
  if (input.value) search();
}
