// Score: one answer, a number in a range, and how likely the critic held each number.

import { announce } from "./announcer.js";
import { postJson } from "./api.js";
import { byId, count, element } from "./element.js";
import { Asking, text } from "./field.js";
import { Pictures } from "./pictures.js";
import { prose } from "./prose.js";

/** Starts the mode; `model()` names the model, `learn` is told of failures. */
export function score(model, learn) {
  const form = byId("score-form");
  const notices = byId("score-notices");
  const place = byId("score-result");
  const pictures = new Pictures(form, notices);
  const ask = async (signal) => {
    place.replaceChildren(element("p", { class: "waiting" }, "The critic is reading"));
    try {
      const body = { model: model(), question: text(form, "question"), response: text(form, "response"), images: pictures.urls, think: form.elements.think.checked };
      const scored = await postJson("v1/critic/score", body, signal);
      place.replaceChildren(...shown(scored));
      announce(`Score ${rounded(scored.score)}`);
    } finally {
      place.querySelector(".waiting")?.remove();
    }
  };
  const asking = new Asking({ form, notices, ask, onFailure: learn });
  return { pictures, stop: () => asking.stop() };
}

const rounded = (value) => Number(value.toFixed(2)).toString();

/** With less of its probability on scores the critic has hardly been asked for one. */
const LITTLE = 0.5;

function shown({ score: value, range, distribution, mass, rationale, usage }) {
  const largest = Math.max(...distribution.map(({ probability }) => probability), 1e-9);
  const rows = distribution.map(({ label, probability }) => element("tr", {}, element("th", { scope: "row" }, label),
    element("td", {}, element("span", { class: "share", style: { "inline-size": `${(75 * probability) / largest}%` } }), `${(100 * probability).toFixed(1)} %`)));
  return [
    element("h2", { class: "verdict" }, `Score ${rounded(value)}`, element("small", {}, ` of ${range.minimum} to ${range.maximum}`)),
    mass < LITTLE ? element("p", { class: "flag" }, `The critic holds ${(100 * mass).toFixed(1)} % likely that a score comes next: it may not know this task.`) : null,
    element("table", { class: "distribution" }, element("caption", { class: "unseen" }, "Probability of each score"),
      element("thead", { class: "unseen" }, element("tr", {}, element("th", { scope: "col" }, "Score"), element("th", { scope: "col" }, "Probability"))),
      element("tbody", {}, rows)),
    rationale ? element("div", { class: "prose rationale" }, element("h3", {}, "Why"), prose(rationale)) : null,
    element("p", { class: "figures" }, `${count(usage.prompt_tokens, "token")} in, ${usage.completion_tokens.toLocaleString("en")} out`),
  ].filter(Boolean);
}
