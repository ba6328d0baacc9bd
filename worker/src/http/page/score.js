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
      const body = { model: model(), question: text(form, "question"), response: text(form, "response"), images: pictures.urls };
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

const rounded = (value) => (value === null || value === undefined ? "none" : Number(value.toFixed(2)).toString());

function shown({ score: value, range, distribution, rationale, usage }) {
  const largest = Math.max(...(distribution ?? []).map(({ probability }) => probability), 1e-9);
  return [
    element("h2", { class: "verdict" }, `Score ${rounded(value)}`, range ? element("small", {}, ` of ${range.minimum} to ${range.maximum}`) : null),
    distribution?.length ? element("table", { class: "distribution" }, element("caption", { class: "unseen" }, "Probability of each score"),
      element("thead", { class: "unseen" }, element("tr", {}, element("th", { scope: "col" }, "Score"), element("th", { scope: "col" }, "Probability"))),
      element("tbody", {}, distribution.map((entry) => element("tr", {}, element("th", { scope: "row" }, String(entry.value)),
        element("td", {}, element("span", { class: "share", style: { "inline-size": `${(75 * entry.probability) / largest}%` } }), `${(100 * entry.probability).toFixed(1)} %`))))) : null,
    rationale ? element("div", { class: "prose rationale" }, element("h3", {}, "Why"), prose(rationale)) : null,
    usage ? element("p", { class: "figures" }, `${count(usage.prompt_tokens, "token")} in, ${usage.completion_tokens.toLocaleString("en")} out`) : null,
  ].filter(Boolean);
}
