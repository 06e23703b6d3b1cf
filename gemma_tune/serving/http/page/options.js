// The settings dialog: sampling and system prompt, kept in this browser.

const KEPT = "gemma_tune.settings";
const NAMES = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const field = (name) => document.getElementById(name);
let defaults = {};

function remember() {
  const values = Object.fromEntries(["system", ...NAMES].map((name) => [name, field(name).value]));
  try {
    localStorage.setItem(KEPT, JSON.stringify(values));
  } catch { /* Storage is blocked: the settings last until the page is closed. */ }
}

function recall() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) || {};
  } catch {
    return {};
  }
}

/** Fills the fields with what was set here before, or else with the server's defaults. */
export function prepare(serverDefaults, longest) {
  defaults = serverDefaults;
  const kept = recall();
  field("longest").textContent = `per answer (conversation: ${longest.toLocaleString("en")})`;
  field("max_tokens").max = longest;
  field("system").value = kept.system || "";
  for (const name of NAMES) {
    const value = kept[name] ?? "";
    field(name).value = value === "" && defaults[name] !== undefined ? defaults[name] : value;
    field(name).onchange = remember;
  }
  field("system").onchange = remember;
  field("reset").onclick = () => {
    for (const name of NAMES) field(name).value = defaults[name] ?? "";
    remember();
  };
}

/** Returns the sampling settings for a request. A field without a valid number is left to the server's default. */
export function sampling() {
  const set = NAMES.filter((name) => field(name).value !== "" && field(name).checkValidity());
  return Object.fromEntries(set.map((name) => [name, Number(field(name).value)]));
}

/** Returns the system prompt as a list of one message, or of none. */
export function system() {
  const content = field("system").value.trim();
  return content ? [{ role: "system", content }] : [];
}
