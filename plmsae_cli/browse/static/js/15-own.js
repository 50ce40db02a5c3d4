// A sequence of one's own, read by the server that shows these pages.

let lastOwn = null; // kept while one looks at a latent and comes back

async function ownView(route, main) {
  const run = await openRun(route.run);
  const area = h("textarea", { id: "own", spellcheck: "false", autocomplete: "off", placeholder: ">my protein\nMKTAYIAKQR…" });
  const said = h("p.muted.small", { role: "status" });
  const results = h("div");
  const button = h("button.primary", { type: "submit" }, "Show its latents");

  function draw(body) {
    const { sequence, latents, residues: there, active } = body;
    const detail = h("div");
    const items = latents.map((one) => {
      const strongest = one.at[one.activations.indexOf(Math.max(...one.activations))];
      const scale = one.maximum || Math.max(...one.activations);
      const example = { at: one.at, steps: one.activations.map((a) => (a / scale) * 1000), position: strongest, first: 1, last: sequence.length };
      const protein = { id: "your sequence", length: sequence.length, sequence };
      const more = h("div");
      const toggle = h("button", { type: "button", "aria-expanded": "false", onclick: () => {
        const open = toggle.getAttribute("aria-expanded") === "true";
        toggle.setAttribute("aria-expanded", String(!open));
        replace(more, !open && wholeSequence(protein, example, scale, null));
      } }, "Whole");
      return h("li.example", null, h("div.row", null, h("span.who", null, latentLink(run, one.latent, `latent ${one.latent}`)), h("span.header", null, conceptOf(run, one.latent) || familyOf(run, one.latent) || ""),
        h("span.muted", null, `${one.at.length} residues`), h("span", null, `${Math.round(one.share * 100)} % of its maximum at ${sequence[strongest - 1]}${strongest}`), toggle), exampleWindow(protein, example, scale), more);
    });
    const pick = (position) => {
      const here = there[position - 1];
      replace(detail, h("p.small", null, h("b", null, `${sequence[position - 1]}${position}: `), here.length ? here.map(([latent, act, part], i) => [i > 0 && ", ", latentLink(run, latent), h("span.muted", null, ` ${number(act)} (${Math.round(part * 100)} %)`)]) : "no latent"));
    };
    const wide = phone.matches ? 30 : 80;
    const lines = [];
    for (let a = 1; a <= sequence.length; a += wide) {
      const b = Math.min(a + wide - 1, sequence.length);
      lines.push(h("div.seq.ruler", null, ruler(a, b)), h("div.seq.pickable", null, Array.from({ length: b - a + 1 }, (_, i) => h(`b.l${level((there[a + i - 1][0] || [0, 0, 0])[2])}`, { "data-at": a + i, title: `${sequence[a + i - 1]}${a + i}` }, sequence[a + i - 1]))));
    }
    const map = h("div.whole", { tabindex: 0, role: "region", "aria-label": "Your sequence; arrow keys move along it", onclick: (event) => { if (event.target.dataset.at) pick(current = Number(event.target.dataset.at)); } }, lines);
    let current = 1;
    map.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: wide, ArrowUp: -wide }[event.key];
      if (!by) return;
      event.preventDefault();
      current = Math.max(1, Math.min(sequence.length, current + by));
      pick(current);
    });
    said.textContent = `${sequence.length} residues, ${count(active)} active latents; the ${latents.length} strongest of them follow.`;
    const save = () => saveCsv(`${run.run}-own-sequence`, ["latent", "position", "residue", "activation", "maximum"], latents.flatMap((one) => one.at.map((p, i) => [one.latent, p, sequence[p - 1], one.activations[i], one.maximum])));
    replace(results, h("section", null, h("div.row.between", null, h("h2", null, "Residue by residue"), h("span.row", null, legend(1), saveButton("CSV", save))), h("p.lead.small", null, "Each residue by its strongest latent, as a share of that latent's maximum. Choose one for its strongest latents: activation, share of the maximum."), map, detail),
      h("section", null, h("h2", null, "Strongest latents"), h("ol.examples", null, items)));
  }

  async function ask() {
    button.disabled = true;
    said.textContent = "reading it… the first time the model is opened, which takes a moment";
    try {
      const answer = await fetch("api/sequence", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ run: run.number, sequence: area.value }) })
        .catch(() => { throw new Error("the server does not answer; does plmsae browse still run?"); });
      const body = await answer.json();
      if (!answer.ok) throw new Error(body.error);
      lastOwn = { run: run.number, text: area.value, body };
      draw(body);
    } catch (error) {
      replace(results);
      said.textContent = `Not read: ${error.message}`;
    }
    button.disabled = false;
  }

  replace(main, h("p.eyebrow", null, run.run), h("h1", null, "Your sequence"),
    h("p.lead", null, "Amino acids, or one FASTA record. It is read on the machine that serves these pages and goes nowhere else."),
    h("form", { onsubmit: (event) => { event.preventDefault(); ask(); } }, h("label.hidden", { for: "own" }, "Sequence"), area, h("p.row", null, button)), said, results);
  document.title = `Your sequence · ${run.run} · plmsae`;
  if (lastOwn && lastOwn.run === run.number) {
    area.value = lastOwn.text;
    draw(lastOwn.body);
  }
}
