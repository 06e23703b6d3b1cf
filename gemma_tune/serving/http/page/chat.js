// The conversation: questions, answers, and the user's feedback on them.

import * as server from "./server.js";
import * as options from "./options.js";
import { refresh, show } from "./view.js";

const $ = (id) => document.getElementById(id);
const exchanges = [];
let models = [], hasFeedback = false, running = null, isWaiting = false;

const say = (text) => ($("status").textContent = text);
const last = () => exchanges[exchanges.length - 1];

function chosenModels() {
  const names = [$("model").value, $("other").value].filter(Boolean);
  return [...new Set(names)].map((name) => models.find((model) => model.id === name));
}

/** Returns the conversation up to an exchange's question. Of two answers, it continues with the preferred or first one. */
function messagesFor(exchange) {
  const before = exchanges.slice(0, exchanges.indexOf(exchange)).flatMap((earlier) => {
    const answer = earlier.answers[earlier.choice ?? 0];
    return [{ role: "user", content: earlier.question }, { role: "assistant", content: answer.text }];
  });
  return [...exchange.system, ...before, { role: "user", content: exchange.question }];
}

function newExchange(question) {
  const answers = chosenModels().map((model) => ({
    model: model.id, parent: model.parent, version: model.version, text: "", error: "", took: "", verdict: null,
    correction: null, isWriting: true,
  }));
  const id = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, question, answers, choice: null, system: options.system(), sampling: options.sampling() };
}

async function ask(question, replaced = null) {
  if (running || !models.length) return;
  if (replaced) {
    exchanges.splice(exchanges.indexOf(replaced), 1);
    replaced.node.remove();
  }
  const exchange = newExchange(question);
  exchanges.push(exchange);
  $("welcome").hidden = true;
  document.body.classList.toggle("beside", exchanges.some((each) => each.answers.length > 1));
  show($("log"), exchange, acts, hasFeedback);
  exchanges.forEach((each) => refresh(each, each === exchange));
  scrollDown(true);
  await answerAll(exchange);
}

async function answerAll(exchange) {
  running = new AbortController();
  $("log").setAttribute("aria-busy", "true");
  setBusy(true);
  say("Generating…");
  await Promise.all(exchange.answers.map((answer) => answerOne(exchange, answer, running.signal)));
  const wasStopped = running.signal.aborted;
  running = null;
  setBusy(false);
  $("log").setAttribute("aria-busy", "false");
  say(wasStopped ? "Stopped." : exchange.answers.some((answer) => answer.error) ? "The request failed." : "Done.");
  if (document.activeElement === document.body) $("question").focus();
}

async function answerOne(exchange, answer, signal) {
  const started = performance.now();
  try {
    const request = { model: answer.model, messages: messagesFor(exchange), ...exchange.sampling };
    const usage = await server.answer(request, signal, (piece) => {
      answer.text += piece.text;
      answer.version = piece.version;
      answer.finish = piece.finish || answer.finish;
      answer.draw();
      scrollDown();
    });
    const seconds = (performance.now() - started) / 1000;
    const tokens = usage ? `${usage.completion_tokens} tokens, ` : "";
    answer.took = `${tokens}${seconds.toFixed(1)} s${answer.finish === "length" ? ", stopped at the maximum length" : ""}`;
  } catch (error) {
    if (error.name === "AbortError") answer.took = "stopped";
    else if (error.status === 401) (answer.error = error.message), askForKey();
    else answer.error = error.message || "Something went wrong.";
  }
  answer.isWriting = false;
  refresh(exchange, exchange === last());
  scrollDown();
}

async function store(exchange) {
  const said = {
    id: exchange.id, messages: messagesFor(exchange), choice: exchange.choice, sampling: exchange.sampling,
    answers: exchange.answers.map(({ model, version, text, verdict, correction }) => ({ model, version, text, verdict, correction })),
  };
  try {
    const { stored } = await server.tell(said);
    say(stored ? "Feedback saved. Thank you." : "Feedback removed.");
  } catch (error) {
    say(`The feedback was not saved: ${error.message}`);
  }
}

const acts = {
  judge(exchange, index, verdict) {
    const answer = exchange.answers[index];
    answer.verdict = answer.verdict === verdict ? null : verdict;
    refresh(exchange, exchange === last());
    store(exchange);
  },
  choose(exchange, index) {
    exchange.choice = exchange.choice === index ? null : index;
    refresh(exchange, exchange === last());
    store(exchange);
  },
  correct(exchange, index, text) {
    exchange.answers[index].correction = text || null;
    store(exchange);
  },
  async copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      say("Copied.");
    } catch {
      say("The browser doesn't allow copying here.");
    }
  },
  again: (exchange) => ask(exchange.question, exchange),
};

function setBusy(isBusy) {
  $("send").hidden = isBusy;
  $("stop").hidden = !isBusy;
  $("new").disabled = isBusy;
}

function scrollDown(always = false) {
  const main = $("main");
  if (always || main.scrollHeight - main.scrollTop - main.clientHeight < 160) main.scrollTop = main.scrollHeight;
}

function fit() {
  $("question").style.height = "auto";
  $("question").style.height = `${$("question").scrollHeight + 2}px`;
}

function askForKey() {
  if (!$("ask-key").open) $("ask-key").showModal();
}

function fillModels() {
  const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });
  const chosen = $("model").value;
  $("model").replaceChildren(...models.map((model) => option(model.id, model.id)));
  if (chosen) $("model").value = chosen;
  $("other").replaceChildren(option("", "no second model"), ...models.map((model) => option(model.id, model.id)));
  $("other").parentElement.hidden = models.length < 2;
}

async function start() {
  try {
    const known = await server.settings();
    models = known.models;
    hasFeedback = known.feedback;
    fillModels();
    options.prepare(known.defaults, models[0].max_model_len);
    $("about").textContent = models.length > 1 ? "Choose a second model to compare their answers side by side." : "";
    say("");
    $("question").focus();
    if (isWaiting) $("composer").requestSubmit();
  } catch (error) {
    if (error.status === 401) askForKey();
    say(error.message);
  }
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || running) return;
  isWaiting = !models.length; // `start` sends it.
  if (isWaiting) return;
  $("question").value = "";
  fit();
  ask(question);
};
$("question").oninput = fit;
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
};
document.addEventListener("keydown", (event) => event.key === "Escape" && !document.querySelector("dialog[open]") && running?.abort());
$("stop").onclick = () => (running?.abort(), $("question").focus());
$("new").onclick = () => {
  exchanges.splice(0).forEach((exchange) => exchange.node.remove());
  $("welcome").hidden = false;
  document.body.classList.remove("beside");
  say("");
  $("question").focus();
};
$("open-settings").onclick = () => $("settings").showModal();
$("ask-key").onclose = () => {
  server.keep($("key").value);
  $("key").value = "";
  start();
};
start();
