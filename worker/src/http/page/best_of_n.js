// Best of N: candidates come in, meet round by round, and one is chosen.

import { announce } from "./announcer.js";
import { postEvents } from "./api.js";
import { bracket, matchTable } from "./bracket.js";
import { signed } from "./compare.js";
import { byId, count, element } from "./element.js";
import { Asking, number, text } from "./field.js";
import { Pictures } from "./pictures.js";
import { prose } from "./prose.js";

/** Selectors whose comparisons are drawn as a bracket; the others are told by tables. */
const DRAWN = new Set(["knockout", "sequential"]);
const NAMES = { knockout: "Knockout", round_robin: "Round robin", sequential: "Sequential", majority: "Majority", pointwise: "Pointwise" };

/** Starts the mode; `model()` names the model, `learn` is told of failures. */
export function bestOfN(model, learn) {
  const form = byId("best-form");
  const notices = byId("best-notices");
  const pictures = new Pictures(form, notices);
  const ask = async (signal) => {
    const criticTokens = number(form, "critic_max_tokens");
    const body = {
      model: model(),
      question: text(form, "question"),
      images: pictures.urls,
      n: number(form, "n"),
      selector: text(form, "selector"),
      report: form.elements.all.checked ? "all" : undefined,
      both_orders: form.elements.both_orders.checked,
      temperature: number(form, "temperature"),
      max_tokens: number(form, "max_tokens"),
      seed: number(form, "seed"),
      critic: { think: form.elements.think.checked, max_tokens: criticTokens },
      stream: true,
    };
    const contest = new Contest(byId("best-result"), body.n, body.selector);
    announce(`Writing ${count(body.n, "candidate")}`);
    try {
      for await (const { event, data } of postEvents("v1/critic/best-of-n", body, signal)) contest.take(event, data);
    } finally {
      contest.rest();
    }
  };
  const asking = new Asking({ form, notices, ask, onFailure: learn });
  return { pictures, stop: () => asking.stop() };
}

/** What is known of one selection, and its view. */
class Contest {
  #rounds = [];
  #result = null;
  #frame = null;

  constructor(place, n, selector) {
    Object.assign(this, { n, selector });
    this.texts = Array.from({ length: n }, () => null);
    this.state = element("p", { class: "waiting", role: "status" });
    this.progress = element("progress", { max: n, value: 0, "aria-label": "Candidates written" });
    this.chosen = element("div", { class: "result" });
    this.drawing = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Bracket" });
    this.table = element("details", {}, element("summary", {}, "All comparisons as a table"));
    this.candidates = element("details", {}, element("summary", {}, "All candidates"));
    for (const folded of [this.table, this.candidates]) folded.addEventListener("toggle", () => this.#draw());
    place.replaceChildren(this.state, this.progress, this.chosen, this.drawing, this.table, this.candidates);
    this.#draw();
  }

  /** Takes one event of the stream. */
  take(event, data) {
    if (event === "candidate") {
      this.texts[data.index] = data.text;
    } else if (event === "round" && data.selector === this.selector) {
      this.#rounds.push(data);
      announce(`Round ${data.round + 1}: ${count(data.comparisons.length, "comparison")}`);
    } else if (event === "result") {
      this.#result = data;
      this.#rounds = data.reports[0].rounds;
      announce(`Candidate ${data.winner + 1} is chosen: ${data.answer}`);
    }
    this.#frame ??= requestAnimationFrame(() => this.#draw());
  }

  /** Nothing more comes. */
  rest() {
    cancelAnimationFrame(this.#frame);
    this.#draw();
    this.progress.hidden = true;
    this.state.classList.remove("waiting");
    if (this.#result === null) this.state.textContent = `Ended early: ${this.#done()}`;
  }

  #done() {
    const written = this.texts.filter((each) => each !== null).length;
    const pairs = this.#rounds.flatMap((round) => round.comparisons);
    const first = `${written} of ${count(this.n, "candidate")} written`;
    return pairs.length === 0 ? first : `${first}, ${count(pairs.length, "comparison")} in ${count(this.#rounds.length, "round")}`;
  }

  /** Candidates that compete: of equal texts the first. */
  #entrants() {
    if (this.#result?.candidates) return this.#result.candidates.filter(({ same_as: same }) => same === undefined).map(({ index }) => index);
    const trimmed = this.texts.map((each) => each?.trim());
    return trimmed.flatMap((each, index) => (each === undefined || trimmed.indexOf(each) === index ? [index] : []));
  }

  #draw() {
    this.#frame = null;
    const best = this.#result?.winner ?? null;
    this.state.textContent = this.#done();
    this.progress.value = this.texts.filter((each) => each !== null).length;
    const entrants = this.#entrants();
    this.drawing.hidden = !DRAWN.has(this.selector) || entrants.length < 2;
    if (!this.drawing.hidden) this.drawing.replaceChildren(bracket(entrants, this.#rounds, best));
    this.table.hidden = this.#rounds.length === 0;
    if (this.table.open) this.table.replaceChildren(this.table.firstChild, scrolling("Comparisons", matchTable(this.#rounds)));
    if (this.candidates.open) this.candidates.replaceChildren(this.candidates.firstChild, this.#list(best));
    if (this.#result) this.chosen.replaceChildren(...chosen(this.#result));
  }

  #list(best) {
    const told = this.#result?.candidates ?? [];
    return element("ol", { class: "candidates" }, this.texts.map((written, index) => element("li", { class: index === best ? "best" : null },
      written === null ? element("p", { class: "hint" }, "Not written yet.")
        : told[index]?.same_as !== undefined ? element("p", { class: "hint" }, `The same as candidate ${told[index].same_as + 1}.`)
          : element("div", { class: "prose" }, prose(written)))));
  }
}

const scrolling = (name, content) => element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name }, content);

/** The chosen candidate, why, and what it took. */
function chosen({ winner, text: written, n, distinct, seed, reports, left_out: leftOut, prefill_tokens: computed, usage }) {
  const { counts } = reports[0];
  const figures = [
    distinct < n ? `${distinct} of ${n} candidates differ` : null,
    counts.comparisons > 0 ? count(counts.comparisons, "comparison") : null,
    counts.flips > 0 ? count(counts.flips, "order flip") : null,
    counts.by_lot > 0 ? `${counts.by_lot} by lot` : null,
    `${count(usage.prompt_tokens, "token")} in (${computed.toLocaleString("en")} computed, the rest shared), ${usage.completion_tokens.toLocaleString("en")} out`,
    `seed ${seed}`,
  ];
  return [
    element("h2", { class: "verdict" }, `Candidate ${winner + 1} is chosen`),
    element("div", { class: "prose chosen" }, prose(written)),
    element("p", { class: "figures" }, figures.filter(Boolean).join(" · ")),
    grounds(reports[0]),
    reports.length > 1 ? table("Every selector on the same candidates", ["Selector", "Candidate", "Comparisons", "Flips", "Tokens in", "Tokens out"],
      reports.map((report) => [NAMES[report.selector], report.winner + 1, report.counts.comparisons, report.counts.flips, report.counts.prompt_tokens, report.counts.completion_tokens])) : null,
    leftOut?.length ? element("p", { class: "hint" }, leftOut.map(({ reason }) => reason).join(" ")) : null,
  ].filter(Boolean);
}

/** Votes, scores or standings: what decided where no bracket is drawn. */
function grounds({ votes, scores, standings }) {
  if (votes?.length) {
    return table("Votes", ["Answer", "First candidate", "Votes"], votes.toSorted((one, other) => other.count - one.count).map(({ answer, candidate, count: number }) => [answer, candidate + 1, number]));
  }
  if (scores?.length) {
    return table("Scores", ["Candidate", "Expected score", "Most likely"], scores.toSorted((one, other) => other.score - one.score).map(({ candidate, score, mode }) => [candidate + 1, score.toFixed(2), mode ?? "–"]));
  }
  if (standings?.length) return table("Standings", ["Candidate", "Wins", "Sum of margins"], standings.map(({ candidate, wins, margin }) => [candidate + 1, wins, signed(margin)]));
  return null;
}

function table(caption, heads, rows) {
  const body = rows.map(([first, ...rest]) => element("tr", {}, element("th", { scope: "row", dir: "auto" }, String(first)), rest.map((cell) => element("td", { class: "number" }, cell.toLocaleString("en")))));
  return scrolling(caption, element("table", {}, element("caption", {}, caption), element("thead", {}, element("tr", {}, heads.map((head) => element("th", { scope: "col" }, head)))), element("tbody", {}, body)));
}
