// What the address asks for is shown.

let runs = []; // names of the dictionaries
let served = false; // by plmsae browse, which reads sequences
let listed = []; // latents of the list that was last open, for next and previous
let redraw = null; // when colours change

const VIEWS = { latents: latentsView, latent: latentView, motif: motifView, own: ownView, compare: compareView };

async function header(route) {
  const run = await openRun(route.run);
  const link = (view, name) => h("a", { href: address(route.run, view), "aria-current": route.view === view || (view === "latents" && route.view === "latent") ? "page" : null }, name);
  const jump = h("input", { id: "jump", type: "search", placeholder: "Latent or concept", "aria-label": "Go to a latent or concept", autocomplete: "off" });
  const find = (event) => {
    event.preventDefault();
    const text = jump.value.trim();
    if (/^\d+$/.test(text) && Number(text) < run.num_latents) go(address(route.run, "latent", Number(text)));
    else if (text) go(address(route.run, "latents", null, new URLSearchParams({ q: text, ...(run.column.concept_f1 ? { sort: "-concept_f1" } : {}) })));
  };
  const own = link("own", "Own sequence");
  own.hidden = !served;
  replace(byId("top"), h("div.bar", null,
    runs.length > 1 ? h("select.home", { "aria-label": "Dictionary", onchange: (event) => go(address(Number(event.target.value), "latents")) }, runs.map((name, i) => h("option", { value: i, selected: i === route.run }, name)))
      : h("a.home", { href: address(route.run, "latents") }, run.run),
    h("nav", { "aria-label": "Pages" }, link("latents", "Latents"), run.motif_files > 0 && link("motif", "Motif"), own, runs.length > 1 && link("compare", "Compare")),
    h("form", { role: "search", onsubmit: find }, jump),
    h("button.icon", { type: "button", "aria-label": "Colours: auto, light or dark", title: "Colours (t)", onclick: nextTheme }, "◐"),
    h("button.icon", { type: "button", "aria-label": "Keys", title: "Keys (?)", onclick: help }, "?")));
}

let turn = 0;
async function show() {
  const mine = ++turn;
  const route = parseRoute(location.hash);
  const main = byId("main");
  redraw = null;
  Object.assign(keysOf, { table: null, before: null, after: null });
  document.querySelectorAll(".tip").forEach((tip) => tip.remove());
  try {
    if (route.run >= runs.length || !VIEWS[route.view]) throw new Error(`there is no page ${location.hash}`);
    await header(route);
    const fresh = h("div");
    await VIEWS[route.view](route, fresh);
    if (mine !== turn) return;
    const moved = main.dataset.hash !== undefined && main.dataset.hash !== location.hash;
    main.dataset.hash = location.hash;
    replace(main, fresh);
    if (redraw) redraw();
    if (moved) {
      scrollTo(0, 0);
      main.focus({ preventScroll: true });
    }
  } catch (error) {
    if (mine === turn) replace(main, h("h1", null, "Not to be shown"), h("p.lead", null, error.message), h("p", null, h("a", { href: "#/" }, "All latents")));
  }
}

/** Whether plmsae browse shows these pages, and not some other server. */
async function isServed() {
  if (location.protocol === "file:") return false;
  try {
    return (await fetch("api/ready")).ok;
  } catch {
    return false;
  }
}

async function start() {
  const { run } = parseRoute(location.hash);
  load(`${run}/index`).catch(() => {}); // on its way beside the others; who needs it hears of an error
  const ready = isServed();
  runs = (await load("site")).runs;
  addEventListener("hashchange", show);
  phone.addEventListener("change", show);
  document.addEventListener("themechange", () => { if (redraw) redraw(); });
  await show();
  served = await ready; // the page does not wait for it
  if (served) document.querySelectorAll("#top nav [hidden]").forEach((link) => { link.hidden = false; });
}

start().catch((error) => replace(byId("main"), h("p.lead", null, error.message)));
