// What a model wrote, as elements: paragraphs, headings, lists, quotes, code, bold, italic, thoughts and boxes. Built node
// by node from text; nothing a model writes becomes markup or a link.

import { element } from "./element.js";

/** The elements of a text. */
export function prose(text) {
  const { before, thought, open, after } = thoughts(text);
  return [
    ...blocks(before),
    thought === null ? null : element("details", { class: "thought", open }, element("summary", {}, open ? "Thinking" : "Thought"), blocks(thought)),
    ...blocks(after),
  ].filter((node) => node !== null);
}

/** What stands between the think tags; `open` while the end has not come. */
function thoughts(text) {
  const start = text.indexOf("<think>");
  if (start < 0) return { before: text, thought: null, open: false, after: "" };
  const inside = text.slice(start + "<think>".length);
  const end = inside.indexOf("</think>");
  return {
    before: text.slice(0, start),
    thought: end < 0 ? inside : inside.slice(0, end),
    open: end < 0,
    after: end < 0 ? "" : inside.slice(end + "</think>".length),
  };
}

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)\s*$/;
const HEADING = /^(#{1,6})\s+(.+)$/;
const ITEM = /^(\s*)(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/;
const QUOTE = /^>\s?(.*)$/;

function blocks(text) {
  const lines = text.split("\n");
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (line.trim() === "") {
      at += 1;
    } else if (fence) {
      const close = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      const end = lines.findIndex((other, index) => index > at && close.test(other));
      const stop = end < 0 ? lines.length : end;
      const code = element("code", {}, lines.slice(at + 1, stop).join("\n"));
      nodes.push(element("pre", { tabindex: "0", role: "group", "aria-label": fence[2] ? `Code: ${fence[2]}` : "Code" }, code));
      at = stop + 1;
    } else if (heading) {
      nodes.push(element("p", { class: "heading", dir: "auto" }, inline(heading[2])));
      at += 1;
    } else if (ITEM.test(line)) {
      const stop = lines.findIndex((other, index) => index > at && !ITEM.test(other) && !/^\s+\S/.test(other));
      const end = stop < 0 ? lines.length : stop;
      nodes.push(list(lines.slice(at, end)));
      at = end;
    } else if (QUOTE.test(line)) {
      const from = at;
      while (at < lines.length && QUOTE.test(lines[at])) at += 1;
      const quoted = lines.slice(from, at).map((other) => QUOTE.exec(other)[1]);
      nodes.push(element("blockquote", { dir: "auto" }, inline(quoted.join("\n"))));
    } else {
      const from = at;
      const begins = (other) => other.trim() === "" || FENCE.test(other) || HEADING.test(other) || ITEM.test(other) || QUOTE.test(other);
      do at += 1;
      while (at < lines.length && !begins(lines[at]));
      nodes.push(element("p", { dir: "auto" }, inline(lines.slice(from, at).join("\n"))));
    }
  }
  return nodes;
}

/** One list; items that are indented more than the first are lists within the item before them. */
function list(lines) {
  const depth = ITEM.exec(lines[0])[1].length;
  const ordered = ITEM.exec(lines[0])[3];
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= depth) items.push({ text: [item[4]], within: [] });
    else if (item || items.at(-1).within.length > 0) items.at(-1).within.push(line);
    else items.at(-1).text.push(line.trim());
  }
  const nodes = items.map(({ text, within }) => element("li", { dir: "auto" }, inline(text.join("\n")), within.length > 0 ? list(within) : null));
  return ordered ? element("ol", { start: ordered }, nodes) : element("ul", {}, nodes);
}

/** Marks of spans with what makes an element of their content. */
const SPANS = [
  ["**", "**", (content) => element("strong", {}, inline(content))],
  ["__", "__", (content) => element("strong", {}, inline(content))],
  ["*", "*", (content) => element("em", {}, inline(content))],
  ["\\boxed{", "}", (content) => element("span", { class: "boxed" }, content)],
];

/** Text with code, bold, italic and boxes. */
function inline(text) {
  const nodes = [];
  let plain = "";
  let at = 0;
  while (at < text.length) {
    const span = code(text, at) ?? marked(text, at);
    if (span === null) {
      plain += text[at];
      at += 1;
      continue;
    }
    if (plain !== "") nodes.push(plain);
    plain = "";
    nodes.push(span.node);
    at = span.end;
  }
  if (plain !== "") nodes.push(plain);
  return nodes;
}

function code(text, at) {
  if (text[at] !== "`") return null;
  const ticks = /^`+/.exec(text.slice(at, at + 9))[0];
  const end = text.indexOf(ticks, at + ticks.length);
  if (end < 0 || end === at + ticks.length) return null;
  return { node: element("code", {}, text.slice(at + ticks.length, end).trim()), end: end + ticks.length };
}

function marked(text, at) {
  for (const [open, close, make] of SPANS) {
    if (!text.startsWith(open, at)) continue;
    const from = at + open.length;
    const end = text.indexOf(close, from);
    const content = end < 0 ? "" : text.slice(from, end);
    const tight = content !== "" && content.trim() === content;
    const inWord = open === "__" && /\w/.test(text[at - 1] ?? " ");
    if (tight && !inWord) return { node: make(content), end: end + close.length };
  }
  return null;
}
