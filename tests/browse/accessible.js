// Complaints about a page, as text: names of controls, contrast of text, landmarks, headings, labels, tab order.
() => {
  const found = [];
  const say = (rule, element) => found.push(`${rule}: ${element.outerHTML.slice(0, 120)}`);
  const seen = (element) => element.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && !element.closest("[aria-hidden=true]");
  const all = (selector) => [...document.querySelectorAll(selector)].filter(seen);

  // WCAG 4.1.2, 1.1.1, 1.3.1
  const named = (element) => {
    const by = (element.getAttribute("aria-labelledby") || "").split(" ").map((id) => document.getElementById(id)).filter(Boolean);
    return [element.getAttribute("aria-label"), ...by.map((one) => one.textContent), ...[...(element.labels || [])].map((one) => one.textContent),
      /^(A|BUTTON|SUMMARY)$/.test(element.tagName) && element.textContent].some((text) => text && text.trim());
  };
  for (const element of all("a[href], button, summary, input, select, textarea, [role=img], [role=region], nav, dialog[open]")) if (!named(element)) say("no name", element);
  for (const element of all("svg, canvas, img")) if (element.getAttribute("role") !== "img" && !element.closest("[role=img]")) say("no role", element);
  for (const element of all("[aria-labelledby], [aria-describedby], label[for]")) {
    for (const id of (element.getAttribute("aria-labelledby") || element.getAttribute("aria-describedby") || element.htmlFor).split(" ")) if (!document.getElementById(id)) say("names nothing", element);
  }
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  for (const id of new Set(ids)) if (ids.filter((one) => one === id).length > 1) found.push(`id twice: ${id}`);

  // WCAG 3.1.1, 2.4.1, 2.4.2, 1.3.1
  if (!document.documentElement.lang) found.push("no language");
  if (!document.title.trim()) found.push("no title");
  for (const [selector, what] of [["main", "main"], ["header", "header"], ["h1", "h1"]]) if (document.querySelectorAll(selector).length !== 1) found.push(`not one ${what}`);
  for (const element of all("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (own && !element.closest("main, header, footer, nav, .skip, #status, noscript")) say("outside of landmarks", element);
  }
  let before = 0;
  for (const element of all("h1, h2, h3, h4")) {
    const level = Number(element.tagName[1]);
    if (level > before + 1) say(`heading after h${before}`, element);
    before = level;
  }
  for (const element of all("table")) {
    if (!element.querySelector("th[scope]")) say("no head cell", element);
    if (element.querySelector("thead th:not([scope])")) say("head cell without scope", element);
  }
  for (const element of all("[tabindex]")) if (element.tabIndex > 0) say("tab order", element);
  for (const element of all("ul, ol")) if ([...element.children].some((child) => child.tagName !== "LI")) say("list of other things", element);
  // What scrolls is reached by the keyboard.
  for (const element of all("main *")) {
    const { overflowX, overflowY } = getComputedStyle(element);
    const scrolls = (/auto|scroll/.test(overflowY) && element.scrollHeight > element.clientHeight + 1) || (/auto|scroll/.test(overflowX) && element.scrollWidth > element.clientWidth + 1);
    if (scrolls && element.tabIndex < 0 && !element.querySelector("a[href], button, input, [tabindex='0']")) say("scrolls without keyboard", element);
  }

  // WCAG 1.4.3: contrast of text with what lies behind it.
  const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
  const linear = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour[3] > 0) layers.push(colour);
      if (colour[3] === 1) break;
    }
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  for (const element of all("body *")) {
    if (![...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim())) continue;
    if (element.matches(":disabled, title, option, .hidden, .skip") || element.closest(".hidden, svg title")) continue;
    const style = getComputedStyle(element);
    const under = behind(element);
    const colour = parse(element.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(over(colour, under)), light(under)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < (large ? 3 : 4.5) - 0.005) say(`contrast ${contrast.toFixed(2)}`, element);
  }
  return [...new Set(found)].slice(0, 8);
}
