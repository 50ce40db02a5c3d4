// Everything without a mouse.

const keysOf = { table: null, before: null, after: null };

const KEYS = [
  ["/", "search"], ["?", "these keys"], ["j, k", "next, previous row or example"], ["Enter", "open the row"], ["[ ]", "latent before, next latent (of the last list)"],
  ["g l, g m, g o, g c", "latents, motif, own sequence, compare"], ["s", "to the threshold slider; arrows move it"], ["t", "colours: auto, light, dark"], ["Esc", "leave a field, close this"],
];

function help() {
  const dialog = byId("help");
  replace(dialog, h("h2", { id: "help-title" }, "Keys"), h("dl", null, KEYS.map(([keys, what]) => [h("dt", null, keys.split(", ").map((key, i) => [i > 0 && ", ", h("kbd", null, key)])), h("dd", null, what)])),
    h("form", { method: "dialog" }, h("button", { autofocus: true }, "Close")));
  dialog.querySelector("form").addEventListener("submit", (event) => { event.preventDefault(); dialog.close(); });
  dialog.showModal();
}

function stepExample(by) {
  const all = [...document.querySelectorAll(".example")];
  const now = all.indexOf(document.activeElement.closest(".example"));
  const next = all[now < 0 ? 0 : Math.max(0, Math.min(all.length - 1, now + by))];
  if (next) next.focus();
}

let went = false;
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  const writing = event.target.closest("input:not([type=range]), textarea, select");
  if (writing) {
    if (event.key === "Escape") writing.blur();
    return;
  }
  const route = parseRoute(location.hash);
  if (went) {
    went = false;
    const view = { l: "latents", m: "motif", o: served ? "own" : null, c: runs.length > 1 ? "compare" : null }[event.key];
    if (view) go(address(route.run, view));
    return;
  }
  const table = keysOf.table;
  const actions = {
    "/": () => (byId("filter") || byId("motif") || byId("jump")).focus(), "?": help, t: nextTheme, g: () => { went = true; setTimeout(() => { went = false; }, 1200); },
    j: () => (table ? table.step(1) : stepExample(1)), k: () => (table ? table.step(-1) : stepExample(-1)),
    "[": keysOf.before, "]": keysOf.after, s: () => byId("threshold") && byId("threshold").focus(),
    Enter: table && table.at >= 0 && !event.target.closest("a, button") ? () => table.open(table.rows[table.at]) : null,
  };
  if (!actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
});
