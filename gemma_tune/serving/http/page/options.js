// Sampling and system prompt: fields of the settings dialog, kept in this browser.

const KEPT = "gemma_tune.settings";
const NAMES = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const field = (name) => document.getElementById(name);
let defaults = {};

function remember() {
  const values = Object.fromEntries(["system", ...NAMES].map((name) => [name, field(name).value]));
  try {
    localStorage.setItem(KEPT, JSON.stringify(values));
  } catch { /* Not kept, then. */ }
}

function recall() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) || {};
  } catch {
    return {};
  }
}

/** Fills the fields: what was set here before, else the server's. */
export function prepare(serverDefaults, longest) {
  defaults = serverDefaults;
  const kept = recall();
  field("longest").textContent = `of ${longest.toLocaleString("en")} for question and answer`;
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

/** Returns what a request says of sampling. A field that holds no valid number counts as the server has it. */
export function sampling() {
  const set = NAMES.filter((name) => field(name).value !== "" && field(name).checkValidity());
  return Object.fromEntries(set.map((name) => [name, Number(field(name).value)]));
}

/** Returns the system prompt as messages: one or none. */
export function system() {
  const content = field("system").value.trim();
  return content ? [{ role: "system", content }] : [];
}
