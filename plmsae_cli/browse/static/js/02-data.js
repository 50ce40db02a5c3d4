// Data come as classic scripts that call plmsae.put: from disk a page may load nothing else.

const waiting = new Map();
const cache = new Map();
const KEPT = 24; // groups of latents held in memory

window.plmsae = Object.freeze({
  put(name, value) {
    const entry = waiting.get(name);
    if (entry) entry.resolve(value);
  },
});

/** What `data/<name>.js` holds; each file is loaded once. */
function load(name) {
  if (cache.has(name)) return cache.get(name);
  const promise = new Promise((resolve, reject) => {
    const element = document.createElement("script");
    waiting.set(name, { resolve });
    element.src = `data/${name}.js`;
    element.addEventListener("load", () => element.remove());
    element.addEventListener("error", () => {
      element.remove();
      cache.delete(name);
      reject(new Error(`data/${name}.js cannot be read: is the folder complete?`));
    });
    document.head.append(element);
  });
  cache.set(name, promise);
  const groups = [...cache.keys()].filter((key) => key.includes("/group-"));
  if (groups.length > KEPT) cache.delete(groups[0]);
  return promise;
}

const ARRAYS = { f4: Float32Array, u1: Uint8Array, u2: Uint16Array, u4: Uint32Array };

/** A column of numbers from base64. */
function decode(column) {
  if (Uint8Array.fromBase64) return new ARRAYS[column.type](Uint8Array.fromBase64(column.data).buffer);
  const text = atob(column.data); // browsers before 2025
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new ARRAYS[column.type](bytes.buffer);
}

const opened = new Map();

/** The index of one dictionary, its columns decoded. */
async function openRun(number) {
  if (!opened.has(number)) {
    const run = await load(`${number}/index`);
    run.number = number;
    run.column = {};
    for (const [name, column] of Object.entries(run.columns)) run.column[name] = decode(column);
    delete run.columns;
    opened.set(number, run);
  }
  return opened.get(number);
}

const padded = (value) => String(value).padStart(5, "0");

/** The page of one latent, with the proteins its examples point to. */
async function openLatent(run, latent) {
  const group = Math.floor(latent / run.group);
  const body = await load(`${run.number}/group-${padded(group)}`);
  const page = body.latents[latent - group * run.group];
  const [at, steps] = [page.along.at, page.along.steps].map((column) => Array.from(decode(column)));
  let from = 0;
  const examples = page.examples.map((example, i) => {
    const to = from + page.along.number[i];
    const own = { ...example, at: at.slice(from, to), steps: steps.slice(from, to) };
    from = to;
    return own;
  });
  return { ...page, examples, proteins: body.proteins };
}

/** Names of a dictionary's column of numbers; null for none. */
function named(run, column, names, latent) {
  const values = run.column[column];
  if (!values) return null;
  const value = values[latent];
  return value < run.strings[names].length ? run.strings[names][value] : null;
}
const conceptOf = (run, latent) => named(run, "concept", "concepts", latent);
const familyOf = (run, latent) => named(run, "family", "families", latent);
const patternOf = (run, latent) => named(run, "pattern", "patterns", latent);
