// Residues coloured by activation, under a ruler of positions.

const NEAR = 20; // residues on either side that a phone has room for
const FAR = 44; // and a desk

/** Numbers over every tenth residue of [first, last], the last digit over its residue; none beyond the protein's end. */
function ruler(first, last, end = last) {
  let text = "";
  for (let p = first; p <= last; p++) {
    if (p > 0 && p <= end && p % 10 === 0) {
      const mark = String(p);
      if (text.length + 1 >= mark.length) text = text.slice(0, text.length + 1 - mark.length) + mark;
      else text += " ";
    } else text += " ";
  }
  return text;
}

/** Letters of [first, last] as nodes; runs of silent ones are one text. `share(position)`: 0 to 1; `marked`: annotated ranges. */
function residues(sequence, first, last, part, { peak = null, note = null } = {}) {
  const nodes = [];
  let plain = "";
  for (let p = first; p <= last; p++) {
    const letter = sequence[p - 1] || " ";
    const value = part(p);
    if (value <= 0 && p !== peak) {
      plain += letter;
      continue;
    }
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(h(`b.l${level(value)}${p === peak ? ".peak" : ""}`, note ? { title: note(p, value) } : null, letter));
  }
  if (plain) nodes.push(plain);
  return nodes;
}

/** Share of the latent's maximum at each position of an example. */
function shares(example) {
  const found = new Map(example.at.map((p, i) => [p, example.steps[i] / 1000]));
  return (p) => found.get(p) || 0;
}

/** The stretch around an example's residue, as wide as its place has room for. */
function exampleWindow(protein, example, maximum, reach = phone.matches ? NEAR : FAR) {
  const sequence = protein.sequence;
  const [first, last] = [example.position - reach, example.position + reach];
  const [from, to] = [Math.max(1, first), Math.min(sequence.length, last)];
  const note = (p, value) => `${sequence[p - 1]}${p}: ${number(value * maximum)}`;
  return h("div.window", { role: "img", "aria-label": spoken(sequence, example) },
    h("div.seq.ruler", { "aria-hidden": "true" }, h("span", null, ruler(first, last, sequence.length))),
    h("div.seq", { "aria-hidden": "true" }, h("span", null, " ".repeat(from - first), residues(sequence, from, to, shares(example), { peak: example.position, note }), " ".repeat(last - to))));
}

function spoken(sequence, example) {
  const around = sequence.slice(Math.max(0, example.position - 6), example.position + 5);
  return `${around}, strongest on ${sequence[example.position - 1]} at ${example.position}`;
}

/** All residues that are known of, 60 a line (30 on a phone), annotated ranges of the concept underlined. */
function wholeSequence(protein, example, maximum, concept) {
  const wide = phone.matches ? 30 : innerWidth <= 1000 ? 60 : 80;
  const part = shares(example);
  const sequence = protein.sequence;
  const note = (p, value) => `${sequence[p - 1]}${p}: ${number(value * maximum)}`;
  const ranges = (protein.ranges || []).filter(([name]) => name === concept);
  const lines = [];
  const begin = Math.floor((example.first - 1) / wide) * wide + 1;
  for (let a = begin; a <= example.last; a += wide) {
    const b = Math.min(a + wide - 1, example.last);
    const from = Math.max(a, example.first);
    lines.push(h("div.seq.ruler", null, ruler(a, b)), h("div.seq", null, " ".repeat(from - a), residues(sequence, from, b, part, { peak: example.position, note })));
    if (ranges.length) {
      let under = "";
      for (let p = a; p <= b; p++) under += ranges.some(([, start, stop]) => start <= p && p <= stop) ? "▔" : " ";
      lines.push(h("div.seq.annotated", { "aria-hidden": "true" }, under));
    }
  }
  const partly = example.first > 1 || example.last < protein.length;
  return h("div.whole", { tabindex: 0, role: "region", "aria-label": `Residues ${example.first} to ${example.last} of ${protein.id}` }, lines,
    ranges.length > 0 && h("p.small.muted", null, `▔ annotated: ${concept}, ${ranges.map(([, a, b]) => (a === b ? a : `${a}–${b}`)).join(", ")}`),
    partly && h("p.small.muted", null, `Residues ${example.first} to ${example.last} of ${protein.length} are kept.`));
}

/** Examples as an SVG: what is on the screen, letters and colours. */
function examplesSvg(examples, proteins) {
  const step = 8;
  const line = 34;
  const parts = [];
  examples.forEach((example, row) => {
    const protein = proteins[example.protein];
    const part = shares(example);
    const y = row * line + 12;
    parts.push(s("text", { x: 0, y, "font-size": 10, "font-family": "sans-serif", fill: "#60646c" }, `${protein.id} ${example.position}  ${number(example.activation)}`));
    for (let p = Math.max(1, example.position - FAR); p <= Math.min(protein.length, example.position + FAR); p++) {
      const x = (p - example.position + FAR) * step;
      const l = level(part(p));
      if (l) parts.push(s("rect", { x, y: y + 4, width: step, height: 14, fill: cssColour(`--a${l}`) }));
      parts.push(s("text", { x: x + step / 2, y: y + 15, "font-size": 11, "font-family": "monospace", "text-anchor": "middle", fill: l ? (cssColour((isDark() ? l <= 5 : l >= 7) ? "--a-light" : "--a-dark")) : "#60646c", "font-weight": p === example.position ? "bold" : "normal" }, protein.sequence[p - 1]));
    }
  });
  return s("svg", { viewBox: `0 0 ${(2 * FAR + 1) * step} ${examples.length * line + 4}` }, parts);
}
