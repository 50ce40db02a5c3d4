// What is shown, as a file.

function saveText(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** A cell of CSV. A text that a spreadsheet would take for a formula gets an apostrophe. */
function cell(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "";
  let text = String(value);
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function saveCsv(name, columns, rows) {
  saveText(`${name}.csv`, "text/csv", [columns, ...rows].map((row) => row.map(cell).join(",")).join("\n") + "\n");
}

const PAINTED = ["fill", "stroke", "stroke-width", "font-size", "font-family", "font-weight", "opacity"];

/** An SVG of the page as a file that looks the same elsewhere: what the style sheet says is written into it. */
function saveSvg(name, svg) {
  const copy = svg.cloneNode(true);
  const from = [svg, ...svg.querySelectorAll("*")];
  [copy, ...copy.querySelectorAll("*")].forEach((element, i) => {
    const style = getComputedStyle(from[i]);
    for (const key of PAINTED) if (from[i].isConnected) element.setAttribute(key, style.getPropertyValue(key));
    element.removeAttribute("class");
  });
  copy.setAttribute("xmlns", SVG);
  const box = svg.viewBox.baseVal;
  copy.setAttribute("width", box.width);
  copy.setAttribute("height", box.height);
  saveText(`${name}.svg`, "image/svg+xml", new XMLSerializer().serializeToString(copy));
}

function saveButton(label, action) {
  return h("button.save", { title: `Save as ${label}`, "aria-label": `Save as ${label}`, type: "button", onclick: action }, label);
}
