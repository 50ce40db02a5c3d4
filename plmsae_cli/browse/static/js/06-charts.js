// Small charts of a latent's page, as SVG that the style sheet colours.

/** Vertical bars from zero. `ghost`: what to compare with, drawn behind; `ticks`: text below some of the bars. */
function bars(label, values, { ticks = [], ghost = null, height = 96, titles = null, width = 300 } = {}) {
  const lowest = Math.min(0, ...values, ...(ghost || []));
  const highest = Math.max(...values, ...(ghost || []), lowest === 0 ? 1e-12 : 0);
  const top = 14;
  const bottom = lowest < 0 ? height - 12 : height - 2; // the lowest value is written below the bars
  const y = (value) => top + ((highest - value) / (highest - lowest)) * (bottom - top);
  const step = width / values.length;
  const wide = Math.max(1, step * 0.78);
  const drawn = values.map((value, i) => {
    const x = i * step + (step - wide) / 2;
    const base = y(0);
    return s("g", null,
      ghost && s("rect.ghost", { x: x - step * 0.06, y: Math.min(base, y(ghost[i])), width: wide + step * 0.12, height: Math.abs(base - y(ghost[i])), opacity: 0.45 }),
      s(value < 0 ? "rect.neg" : "rect.bar", { x, y: Math.min(base, y(value)), width: ghost ? wide * 0.6 : wide, transform: ghost ? `translate(${wide * 0.2} 0)` : null, height: Math.abs(y(value) - base) }),
      s("title", null, titles ? titles[i] : number(value)));
  });
  const texts = ticks.map(({ at, text, anchor }) => s("text", { x: at * step + step / 2, y: height + 14, "text-anchor": anchor || "middle" }, text));
  return s("svg.chart", { viewBox: `0 0 ${width} ${height + 20}`, role: "img", "aria-label": label },
    s("line.axis", { x1: 0, x2: width, y1: y(0), y2: y(0) }), drawn, texts,
    s("text", { x: 0, y: 9 }, number(highest)), lowest < 0 && s("text", { x: 0, y: height - 1 }, number(lowest).replace("-", "−")));
}

/** A chart under its title, with a button that saves it. */
function chartBlock(title, lead, chart, name) {
  return h("section", null,
    h("div.row.between", null, h("h2", null, title), saveButton("SVG", () => saveSvg(name, chart))),
    lead && h("p.lead.small", null, lead), chart);
}
