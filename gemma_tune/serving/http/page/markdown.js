// Renders a model's Markdown as nodes. All text is inserted as textContent and no HTML is ever parsed, so whatever a
// model writes is shown, not run.

const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(?=\S)([\s\S]*?\S)\*\*|\*(?=[^\s*])([^*]*?[^\s*])\*(?!\*)|\[([^\]\n]+)\]\((https?:\/\/[^\s()]+)\)/g;

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

function link(text, address) {
  const node = element("a", ...inline(text));
  node.href = address;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  node.title = address;
  return node;
}

function inline(text) {
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(INLINE)) {
    if (found.index > end) nodes.push(text.slice(end, found.index));
    const [whole, , code, bold, slanted, label, address] = found;
    if (code !== undefined) nodes.push(element("code", code));
    else if (bold !== undefined) nodes.push(element("strong", ...inline(bold)));
    else if (slanted !== undefined) nodes.push(element("em", ...inline(slanted)));
    else nodes.push(link(label, address));
    end = found.index + whole.length;
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

function lines(texts) {
  return texts.flatMap((text, index) => (index ? [document.createElement("br"), ...inline(text)] : inline(text)));
}

const FENCE = /^\s*(```+|~~~+)\s*([\w+#.-]*)\s*$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const BULLET = /^\s{0,8}[-*+]\s+(.*)$/;
const NUMBER = /^\s{0,8}(\d{1,9})[.)]\s+(.*)$/;
const QUOTE = /^>\s?(.*)$/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;

function isPlain(line) {
  return line.trim() && ![FENCE, HEADING, BULLET, NUMBER, QUOTE, RULE].some((pattern) => pattern.test(line));
}

/** Returns the nodes of a Markdown text: paragraphs, headings, lists, quotes, code, emphasis and links. */
export function render(text) {
  const rows = text.replace(/\r\n?/g, "\n").split("\n");
  const nodes = [];
  let at = 0;
  const taken = (pattern) => {
    const found = [];
    for (let match; at < rows.length && (match = pattern.exec(rows[at])); at++) found.push(match);
    return found;
  };
  while (at < rows.length) {
    const row = rows[at];
    const fence = FENCE.exec(row);
    if (fence) {
      const code = [];
      for (at++; at < rows.length && !rows[at].trim().startsWith(fence[1]); at++) code.push(rows[at]);
      at++;
      nodes.push(element("pre", element("code", code.join("\n"))));
    } else if (!row.trim()) {
      at++;
    } else if (RULE.test(row)) {
      nodes.push(element("hr"));
      at++;
    } else if (HEADING.test(row)) {
      const [, marks, title] = HEADING.exec(row);
      nodes.push(element(`h${Math.min(marks.length + 2, 5)}`, ...inline(title)));
      at++;
    } else if (BULLET.test(row)) {
      nodes.push(element("ul", ...taken(BULLET).map((match) => element("li", ...inline(match[1])))));
    } else if (NUMBER.test(row)) {
      const found = taken(NUMBER);
      const list = element("ol", ...found.map((match) => element("li", ...inline(match[2]))));
      list.start = Number(found[0][1]);
      nodes.push(list);
    } else if (QUOTE.test(row)) {
      nodes.push(element("blockquote", ...lines(taken(QUOTE).map((match) => match[1]))));
    } else {
      const paragraph = [];
      for (; at < rows.length && isPlain(rows[at]); at++) paragraph.push(rows[at]);
      nodes.push(element("p", ...lines(paragraph)));
    }
  }
  return nodes;
}
