// The address after # says what is shown: #/latent/737, #/1/latent/12 (second dictionary), #/?q=helix&sort=-f1.

const phone = matchMedia("(max-width: 640px)"); // as in the style sheet

/** The text of a part of an address; as it stands where it is not written as one. */
function plainText(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

function parseRoute(hash) {
  const [path, query] = hash.replace(/^#\/?/, "").split("?");
  const parts = path.split("/").filter(Boolean);
  const run = /^\d+$/.test(parts[0] || "") ? Number(parts.shift()) : 0;
  return { run, view: parts[0] || "latents", id: parts[1] === undefined ? null : plainText(parts[1]), params: new URLSearchParams(query || "") };
}

function address(run, view, id = null, params = null) {
  const path = [run ? String(run) : null, view === "latents" ? null : view, id === null ? null : encodeURIComponent(id)].filter((part) => part !== null);
  const query = params && String(params);
  return `#/${path.join("/")}${query ? `?${query}` : ""}`;
}

function go(target) {
  if (location.hash === target) show();
  else location.hash = target;
}

/** Changes what the address says of the view that is open, without a step back for each letter typed. */
function remember(params) {
  const route = parseRoute(location.hash);
  history.replaceState(history.state, "", address(route.run, route.view, route.id, params));
}
