// Shows an exchange: a question, and one or two answers with buttons for feedback.

import { render } from "./markdown.js";

const ICONS = {
  up: "M7 11v9H4v-9zM7 11l4-8c1.5 0 2.5 1 2.3 2.6L12.8 9H19a2 2 0 0 1 2 2.3l-1.2 7A2 2 0 0 1 17.8 20H7",
  down: "M17 13V4h3v9zM17 13l-4 8c-1.5 0-2.5-1-2.3-2.6l.5-3.4H5a2 2 0 0 1-2-2.3l1.2-7A2 2 0 0 1 6.2 4H17",
};

function make(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

function button(label, act, ...children) {
  const node = make("button", { type: "button", onclick: act }, ...(children.length ? children : [label]));
  if (children.length) node.setAttribute("aria-label", label), (node.title = label);
  return node;
}

/** Returns a function that redraws an answer's text, at most once a frame. */
function drawer(answer) {
  let isDue = false;
  return () => {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(() => {
      isDue = false;
      answer.parts.text.replaceChildren(...render(answer.text));
      answer.parts.text.classList.toggle("empty", !answer.text.trim() && !answer.isWriting);
    });
  };
}

/** Adds an exchange to the log. `acts` holds the functions of its buttons. */
export function show(log, exchange, acts, hasFeedback) {
  const answers = make("div", { className: exchange.answers.length > 1 ? "answers two" : "answers" });
  exchange.node = make("section", { className: "exchange" }, make("p", { className: "asked" }, exchange.question), answers);
  exchange.answers.forEach((answer, index) => answers.append(card(exchange, answer, index, acts, hasFeedback)));
  log.append(exchange.node);
}

function card(exchange, answer, index, acts, hasFeedback) {
  const kind = make("span", { className: "kind" }, answer.parent ? `fine-tuned from ${answer.parent}` : "base model");
  const text = make("div", { className: "text" });
  text.dataset.empty = "(empty answer)";
  const error = make("p", { className: "error", hidden: true });
  const took = make("span", { className: "took" });
  const row = make("div", { className: "acts", hidden: true });
  const below = make("div");
  const node = make("article", { className: "answer writing" }, make("h2", {}, answer.model, kind), text, error, row, below);
  node.setAttribute("aria-label", `Answer by ${answer.model}`);
  node.setAttribute("aria-busy", "true");
  answer.parts = { node, text, error, row, took, below, pressed: {} };
  answer.draw = drawer(answer);
  if (hasFeedback) {
    for (const [verdict, label] of [["up", "Good answer"], ["down", "Bad answer"]]) {
      answer.parts.pressed[verdict] = button(label, () => acts.judge(exchange, index, verdict), icon(verdict));
    }
    if (exchange.answers.length > 1) answer.parts.pressed.choice = button("Better", () => acts.choose(exchange, index));
    row.append(...Object.values(answer.parts.pressed));
    row.append(button("Suggest correction", () => correct(exchange, answer, index, acts)));
  }
  row.append(button("Copy", () => acts.copy(answer.text)));
  answer.parts.again = button("Regenerate", () => acts.again(exchange));
  row.append(answer.parts.again, took);
  return node;
}

/** Updates everything of an exchange's answers: text, state, buttons and errors. */
export function refresh(exchange, isLast) {
  exchange.answers.forEach((answer, index) => {
    const { node, error, row, took, pressed, again } = answer.parts;
    node.classList.toggle("writing", answer.isWriting);
    node.classList.toggle("chosen", exchange.choice === index);
    node.setAttribute("aria-busy", String(answer.isWriting));
    error.hidden = !answer.error;
    error.textContent = answer.error;
    row.hidden = answer.isWriting;
    again.hidden = !isLast;
    took.textContent = answer.took;
    for (const [name, node] of Object.entries(pressed)) {
      node.setAttribute("aria-pressed", String(name === "choice" ? exchange.choice === index : answer.verdict === name));
    }
    answer.draw();
  });
}

/** Opens a form in which the user writes what the answer should have been. */
function correct(exchange, answer, index, acts) {
  const { below } = answer.parts;
  if (below.querySelector("form")) return below.querySelector("textarea").focus();
  const area = make("textarea", { value: answer.correction || answer.text });
  const close = () => showCorrection(answer);
  const form = make(
    "form",
    { className: "correct", onsubmit: (event) => (event.preventDefault(), acts.correct(exchange, index, area.value.trim()), close()) },
    make("label", {}, "What the answer should have been", area),
    make("div", { className: "row" }, Object.assign(button("Cancel", close), { className: "quiet" }), make("button", {}, "Save")),
  );
  form.onkeydown = (event) => event.key === "Escape" && (event.stopPropagation(), close());
  below.replaceChildren(form);
  area.focus();
  return undefined;
}

function showCorrection(answer) {
  const shown = answer.correction
    ? [make("p", { className: "corrected" }, make("b", {}, "What the answer should have been"), answer.correction)]
    : [];
  answer.parts.below.replaceChildren(...shown);
  answer.parts.row.querySelector("button")?.focus();
}
