// One scale for activations, of rising darkness in one hue, so that it reads the same with any colour vision.

const LEVELS = 10;

/** Step 0 to 9 of an activation's share of the latent's maximum; 0 is inactive alone. */
function level(part) {
  return part > 0 ? Math.min(LEVELS - 1, 1 + Math.floor(Math.min(part, 1) * (LEVELS - 1.0001))) : 0;
}

function cssColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function legend(maximum) {
  const steps = Array.from({ length: LEVELS }, (_, l) => h(`i.l${l}`, { title: l === 0 ? "0" : `${number(((l - 1) / (LEVELS - 1)) * maximum)} to ${number((l / (LEVELS - 1)) * maximum)}` }));
  return h("span.legend", { role: "img", "aria-label": `Colour scale of activations, from 0 to ${number(maximum)}` }, "activation 0", h("span.scale", { "aria-hidden": "true" }, steps), number(maximum));
}

const THEMES = ["auto", "light", "dark"];

function kept(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null; // from disk some browsers keep nothing
  }
}

function keep(key, value) {
  try {
    localStorage.setItem(key, value);
  } catch {
    // as above
  }
}

let theme = THEMES.includes(kept("plmsae-theme")) ? kept("plmsae-theme") : "auto";
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => theme === "dark" || (theme === "auto" && systemDark.matches);

function applyTheme() {
  document.documentElement.classList.toggle("dark", isDark());
  document.documentElement.classList.toggle("light", !isDark());
}

function nextTheme() {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  keep("plmsae-theme", theme);
  applyTheme();
  announce(`colours: ${theme}`);
  document.dispatchEvent(new Event("themechange"));
}

applyTheme();
systemDark.addEventListener("change", () => {
  applyTheme();
  document.dispatchEvent(new Event("themechange"));
});
