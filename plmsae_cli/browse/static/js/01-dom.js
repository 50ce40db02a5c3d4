// Elements are built from text nodes alone: names and headers come from files that nobody vouches for.

const SVG = "http://www.w3.org/2000/svg";

/** An element: h("a.small", {href: "#/", onclick: f}, child, "text", [more], null). */
function h(tag, attributes, ...children) {
  const [name, ...classes] = tag.split(".");
  return fill(document.createElement(name), classes, attributes, children);
}

/** The same for SVG. */
function s(tag, attributes, ...children) {
  const [name, ...classes] = tag.split(".");
  return fill(document.createElementNS(SVG, name), classes, attributes, children);
}

function fill(element, classes, attributes, children) {
  if (classes.length) element.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "value") element.value = value;
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

function replace(element, ...children) {
  element.replaceChildren();
  return append(element, children);
}

const byId = (id) => document.getElementById(id);

/** Says it to those who listen to the page rather than look at it. */
function announce(text) {
  byId("status").textContent = text;
}

const count = (value) => String(value).replace(/\B(?=(\d{3})+$)/g, ",");

/** Three significant digits, without a tail of zeros. */
function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(digits - 1).replace("e-", "e−").replace("e+", "e");
  return String(Number(value.toPrecision(digits)));
}

/** Two decimals, as precision, recall and F1 are given. */
const share = (value) => (value === null || value === undefined || Number.isNaN(value) ? "" : value.toFixed(2));

function percent(value) {
  if (value === 0) return "0 %";
  return value < 1e-4 ? `${(value * 100).toExponential(1).replace("e-", "e−")} %` : `${Number((value * 100).toPrecision(2))} %`;
}
