// A protein's structure in three dimensions, its residues coloured by activation. 3Dmol is loaded when the first is asked for.

const ACCESSION = /\b(?:[OPQ][0-9][A-Z0-9]{3}[0-9]|[A-NR-Z][0-9](?:[A-Z][A-Z0-9]{2}[0-9]){1,2})\b/;

let viewerCode = null;
function loadViewer() {
  viewerCode = viewerCode || new Promise((resolve, reject) => {
    const element = document.createElement("script");
    element.src = "vendor/3Dmol-min.js";
    element.addEventListener("load", () => resolve(window.$3Dmol));
    element.addEventListener("error", () => reject(new Error("vendor/3Dmol-min.js cannot be read")));
    document.head.append(element);
  });
  return viewerCode;
}

/** UniProt accession in an id or header, null if none. */
function accessionOf(protein) {
  const found = ACCESSION.exec(protein.id) || ACCESSION.exec(protein.header || "");
  return found ? found[0] : null;
}

async function drawStructure(holder, text, example) {
  const code = await loadViewer();
  const box = h("div.viewer", { role: "img", "aria-label": "Structure, residues coloured by activation; drag to turn it" });
  replace(holder, box);
  const viewer = code.createViewer(box, { backgroundColor: cssColour("--page"), antialias: true });
  viewer.addModel(text, "pdb");
  const part = shares(example);
  const colours = Array.from({ length: LEVELS }, (_, l) => cssColour(`--a${l}`));
  colours[0] = cssColour("--stone"); // paper on paper would not be seen
  viewer.setStyle({}, { cartoon: { colorfunc: (atom) => colours[level(part(atom.resi))] } });
  const strongest = example.at.filter((p) => part(p) >= 0.5);
  if (strongest.length && strongest.length <= 40) viewer.addStyle({ resi: strongest }, { stick: { radius: 0.16, colorfunc: (atom) => colours[level(part(atom.resi))] } });
  const atoms = viewer.selectedAtoms({});
  const extent = (axis) => atoms.reduce((most, atom) => Math.max(most, atom[axis]), -Infinity) - atoms.reduce((least, atom) => Math.min(least, atom[axis]), Infinity);
  if (extent("z") > Math.max(extent("x"), extent("y"))) viewer.rotate(90, "y"); // its length is not hidden behind itself
  viewer.zoomTo();
  viewer.zoom(1.05);
  viewer.render();
  return viewer;
}

/** Buttons for the structures that there are of an example's protein, and the place where one appears. */
function structureBlock(protein, example) {
  const holder = h("div");
  const say = (text) => replace(holder, h("p.small.muted", { role: "status" }, text));
  const draw = async (fetchText) => {
    say("loading the structure…");
    try {
      await drawStructure(holder, await fetchText(), example);
    } catch (error) {
      say(`No structure: ${error.message}`);
    }
  };
  const buttons = [];
  if (protein.structure) buttons.push(h("button.structure", { type: "button", onclick: () => draw(() => load(protein.structure)) }, "Structure"));
  const accession = accessionOf(protein);
  if (accession && navigator.onLine) {
    buttons.push(h("button", { type: "button", title: `Asks alphafold.ebi.ac.uk for ${accession}`, onclick: () => draw(() => alphafold(accession)) }, "AlphaFold (online)"));
  }
  return { buttons, holder };
}

async function alphafold(accession) {
  const answer = await fetch(`https://alphafold.ebi.ac.uk/api/prediction/${encodeURIComponent(accession)}`);
  if (!answer.ok) throw new Error(`AlphaFold DB has none of ${accession}`);
  const address = new URL((await answer.json())[0].pdbUrl);
  if (address.origin !== "https://alphafold.ebi.ac.uk") throw new Error("AlphaFold DB names another server");
  const file = await fetch(address);
  if (!file.ok) throw new Error("AlphaFold DB does not answer");
  return file.text();
}
