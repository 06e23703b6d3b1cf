// Calls to the server.

const KEY = "gemma_tune.key";
let key = "";
try {
  key = sessionStorage.getItem(KEY) || "";
} catch { /* Storage is blocked: the key is kept in memory only. */ }

export function keep(newKey) {
  key = newKey.trim();
  try {
    sessionStorage.setItem(KEY, key);
  } catch { /* Storage is blocked, as above. */ }
}

export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = body ? { method: "POST", body: JSON.stringify(body), headers: { ...headers, "Content-Type": "application/json" } } : { headers };
  let response;
  try {
    response = await fetch(path, { ...options, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server can't be reached.");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new ServerError(response.status, said?.error?.message || `The server returned status ${response.status}.`);
}

/** Returns the models, the defaults of requests, and whether feedback is stored. */
export async function settings() {
  return (await ask("page-settings")).json();
}

/** Sends the feedback on an exchange. */
export async function tell(exchange) {
  return (await ask("feedback", exchange)).json();
}

/** Calls `on` with each delta of an answer, {text, finish, version}, and returns the numbers of tokens. */
export async function answer(request, signal, on) {
  const body = { ...request, stream: true, stream_options: { include_usage: true } };
  const response = await ask("v1/chat/completions", body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", usage = null;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return usage;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ") || event === "data: [DONE]") continue;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new ServerError(0, chunk.error.message);
      usage = chunk.usage || usage;
      const choice = chunk.choices[0];
      if (choice) on({ text: choice.delta.content || "", finish: choice.finish_reason, version: chunk.system_fingerprint });
    }
  }
}
