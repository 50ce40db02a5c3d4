// What the model predicts when a latent is added, set or taken away, all later layers computed anew.

const EDITS = {
  add: ["Steering", (strength) => `Added to the layer at ${number(strength)} times its maximum`],
  clamp: ["Steering", (strength) => `Set to ${number(strength)} times its maximum`],
  ablate: ["Ablation effects", () => "Set to 0 where it fires"],
};

function steeringSection(run, page) {
  if (page.steering_kl === undefined || !run.steering) return null;
  const { mode, residues, proteins } = run.steering;
  const { effects } = page;
  const [title, how] = EDITS[mode];
  const where = { all: "all residues", active: "residues on which it fires" }[residues] || residues;
  const minus = (value) => number(value).replace(/^-/, "−");
  const signed = (value) => `${value > 0 ? "+" : ""}${minus(value)}`;
  const effect = (letter, value) => `${letter} ${signed(value)}${effects ? `, random ${signed(effects.direction[run.letters.indexOf(letter)])}` : ""}`;
  const rows = [
    ["KL of predictions", number(page.steering_kl)], ["random direction", number(page.steering_kl_direction)],
    ["effect size, q", `${minus(page.steering_size)}, ${number(page.steering_q, 2)}`],
    page.steering_up && ["most above random", effect(page.steering_up, page.steering_up_effect)],
    page.steering_down && ["most below random", effect(page.steering_down, page.steering_down_effect)],
  ].filter(Boolean);
  const chart = effects && byValue(run.letters, effects.effect);
  const drawn = chart && bars(`${title} on amino acids`, chart.values, {
    ticks: letterTicks(chart.letters), ghost: chart.order.map((i) => effects.direction[i]),
    titles: chart.order.map((i) => `${run.letters[i]}: ${number(effects.effect[i])} nats, q ${number(effects.q[i], 2)}; random direction ${number(effects.direction[i])}`),
  });
  return h("section", { id: "steering" },
    h("div.row.between", null, h("h2", null, title), drawn && saveButton("SVG", () => saveSvg(`${run.run}-latent-${page.latent}-steering`, drawn))),
    h("p.lead.small", null, `${how(effects ? effects.strength : 1)}, at ${where} of ${count(proteins)} proteins, all later layers computed anew. Grey: a random direction of equal length.`),
    drawn && h("p.muted.small", null, "Change of each amino acid's log-probability at masked residues, nats"), drawn,
    h("table", null, h("tbody", null, rows.map(([name, value]) => h("tr", null, h("th", { scope: "row" }, name), h("td.num", null, value))))));
}
