// Compare: two answers side by side, the critic's verdict, how sure it is, and why.

import { announce } from "./announcer.js";
import { postJson } from "./api.js";
import { byId, count, element } from "./element.js";
import { Asking, number, text } from "./field.js";
import { Pictures } from "./pictures.js";
import { prose } from "./prose.js";

/** Starts the mode; `model()` names the model, `learn` is told of failures. */
export function compare(model, learn) {
  const form = byId("compare-form");
  const notices = byId("compare-notices");
  const place = byId("compare-result");
  const pictures = new Pictures(form, notices);
  const ask = async (signal) => {
    place.replaceChildren(element("p", { class: "waiting" }, "The critic is reading"));
    try {
      const body = {
        model: model(),
        question: text(form, "question"),
        responses: [text(form, "first"), text(form, "second")],
        images: pictures.urls,
        both_orders: form.elements.both_orders.checked,
        think: form.elements.think.checked,
        max_tokens: number(form, "max_tokens"),
      };
      const comparison = await postJson("v1/critic/compare", body, signal);
      place.replaceChildren(...judgement(comparison));
      announce(headline(comparison));
    } finally {
      place.querySelector(".waiting")?.remove();
    }
  };
  const asking = new Asking({ form, notices, ask, onFailure: learn });
  return { pictures, stop: () => asking.stop() };
}

const NAMES = { 1: "Answer 1 is better", 2: "Answer 2 is better", tie: "A tie" };

const headline = ({ verdict }) => NAMES[verdict] ?? "The critic names neither";

function judgement(comparison) {
  const { verdict, margin, rationale, raw, usage, swapped, order_flip: flip, finish_reason: finish } = comparison;
  const side = { 1: "first", 2: "second" }[verdict] ?? "neither";
  return [
    element("h2", { class: `verdict ${side}` }, headline(comparison)),
    flip === true ? element("p", { class: "flag" }, "The order decides: the critic prefers another answer when they change places.") : null,
    flip === false ? element("p", { class: "hint" }, "Both orders agree.") : null,
    finish === "length" ? element("p", { class: "flag" }, "The critic ran out of tokens before it ended.") : null,
    marginBar(margin),
    swapped ? orders(comparison) : null,
    rationale ? element("div", { class: "prose rationale" }, element("h3", {}, "Why"), prose(rationale)) : null,
    raw ? element("details", {}, element("summary", {}, "All that the critic wrote"), element("p", { class: "raw", dir: "auto" }, raw)) : null,
    swapped?.raw ? element("details", {}, element("summary", {}, "The same in the other order"), element("p", { class: "raw", dir: "auto" }, swapped.raw)) : null,
    usage ? element("p", { class: "figures" }, `${count(usage.prompt_tokens, "token")} in, ${usage.completion_tokens.toLocaleString("en")} out`) : null,
  ].filter(Boolean);
}

/** How likely the first answer is held to be the better one. */
export const likelihood = (margin) => 1 / (1 + Math.exp(-margin));

/** Log-odds with their sign. */
export const signed = (margin) => (margin < 0 ? "\u2212" : "+") + Math.abs(margin).toFixed(2);

/** The margin as a bar that points to the answer it favours. */
function marginBar(margin) {
  if (margin === null || margin === undefined) return element("p", { class: "hint" }, "The critic gave no margin.");
  const first = likelihood(margin);
  const percent = (share) => `${(100 * share).toFixed(share > 0.995 || share < 0.005 ? 2 : 0)} %`;
  const words = `${percent(first)} for answer 1, ${percent(1 - first)} for answer 2; log-odds ${signed(margin)}`;
  return element("figure", { class: "margin" },
    element("div", { class: "scale", "aria-hidden": "true" },
      element("span", { class: "first", style: { "inline-size": `${100 * first}%` } }),
      element("span", { class: "second", style: { "inline-size": `${100 * (1 - first)}%` } })),
    element("figcaption", {}, words));
}

function orders({ swapped, verdict, margin }) {
  const row = (name, { verdict: said, margin: sure }) => element("tr", {}, element("th", { scope: "row" }, name),
    element("td", {}, said ? NAMES[said] : "None"), element("td", { class: "number" }, sure === null ? "–" : signed(sure)));
  return element("table", {}, element("caption", { class: "unseen" }, "The verdict in each order"),
    element("thead", {}, element("tr", {}, ["Shown", "Verdict", "Margin"].map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, row("Answer 2 first", swapped), row("Both orders", { verdict, margin })));
}
