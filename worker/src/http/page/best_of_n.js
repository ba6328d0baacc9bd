// Best of N: candidates come in, meet round by round, and one remains.

import { announce } from "./announcer.js";
import { postEvents } from "./api.js";
import { bracket, matchTable } from "./bracket.js";
import { byId, count, element } from "./element.js";
import { Asking, number, text } from "./field.js";
import { Pictures } from "./pictures.js";
import { prose } from "./prose.js";

/** Selectors whose comparisons are drawn as a bracket; the others are told by their table. */
const DRAWN = new Set(["knockout", "sequential"]);

/** Starts the mode; `model()` names the model, `learn` is told of failures. */
export function bestOfN(model, learn) {
  const form = byId("best-form");
  const notices = byId("best-notices");
  const pictures = new Pictures(form, notices);
  const ask = async (signal) => {
    const body = {
      model: model(),
      question: text(form, "question"),
      images: pictures.urls,
      n: number(form, "n"),
      selector: text(form, "selector"),
      both_orders: form.elements.both_orders.checked,
      temperature: number(form, "temperature"),
      max_tokens: number(form, "max_tokens"),
      seed: number(form, "seed"),
      stream: true,
    };
    const tournament = new Tournament(byId("best-result"), body.n, body.selector);
    announce(`Writing ${count(body.n, "candidate")}`);
    try {
      for await (const { event, data } of postEvents("v1/critic/best-of-n", body, signal)) tournament.take(event, data);
    } finally {
      tournament.rest();
    }
  };
  const asking = new Asking({ form, notices, ask, onFailure: learn });
  return { pictures, stop: () => asking.stop() };
}

/** What is known of one selection, and its view. */
class Tournament {
  #rounds = [];
  #written = 0;
  #report = null;
  #frame = null;

  constructor(place, n, selector) {
    Object.assign(this, { n, selector });
    this.texts = Array.from({ length: n }, () => null);
    this.state = element("p", { class: "waiting", role: "status" });
    this.progress = element("progress", { max: n, value: 0, "aria-label": "Candidates written" });
    this.winner = element("div");
    this.drawing = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Bracket" });
    this.table = element("details", {}, element("summary", {}, "All comparisons as a table"));
    this.candidates = element("details", {}, element("summary", {}, "All candidates"));
    this.table.addEventListener("toggle", () => this.#draw());
    this.candidates.addEventListener("toggle", () => this.#draw());
    place.replaceChildren(this.state, this.progress, this.winner, this.drawing, this.table, this.candidates);
    this.#draw();
  }

  /** Takes one event of the stream. */
  take(event, data) {
    if (event === "candidate") {
      this.texts[data.index] = data.text;
      this.#written += 1;
    } else if (event === "round") {
      this.#rounds[data.round] = data.comparisons.map(({ first, second, winner, margin, order_flip: flip }) => ({ first, second, winner, margin, flip }));
      announce(`Round ${data.round + 1}: ${count(data.comparisons.length, "comparison")}`);
    } else if (event === "result") {
      this.#report = data;
      announce(`Candidate ${data.winner + 1} wins: ${data.text}`);
    }
    this.#frame ??= requestAnimationFrame(() => this.#draw());
  }

  /** Nothing more comes. */
  rest() {
    cancelAnimationFrame(this.#frame);
    this.#draw();
    this.progress.hidden = true;
    this.state.classList.remove("waiting");
    if (this.#report === null) this.state.textContent = `Ended early: ${this.#done()}`;
  }

  #done() {
    const rounds = this.#rounds.filter(Boolean);
    const written = `${this.#written} of ${count(this.n, "candidate")} written`;
    return rounds.length === 0 ? written : `${written}, ${count(rounds.flat().length, "comparison")} in ${count(rounds.length, "round")}`;
  }

  #draw() {
    this.#frame = null;
    const rounds = this.#rounds.filter(Boolean);
    const best = this.#report?.winner ?? null;
    this.state.textContent = this.#done();
    this.progress.value = this.#written;
    this.drawing.hidden = !DRAWN.has(this.selector) || this.n < 2;
    if (!this.drawing.hidden) this.drawing.replaceChildren(bracket(this.n, rounds, best));
    this.table.hidden = rounds.length === 0;
    if (this.table.open) this.table.replaceChildren(this.table.firstChild, element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Comparisons" }, matchTable(rounds)));
    if (this.candidates.open) this.candidates.replaceChildren(this.candidates.firstChild, this.#list(best));
    if (this.#report) this.winner.replaceChildren(...this.#won());
  }

  #list(best) {
    return element("ol", { class: "candidates" }, this.texts.map((written, index) => element("li", { class: index === best ? "best" : null },
      written === null ? element("p", { class: "hint" }, "Not written yet.") : element("div", { class: "prose" }, prose(written)))));
  }

  #won() {
    const { winner, text: written, usage, comparisons, order_flips: flips } = this.#report;
    const figures = [
      comparisons === undefined ? null : count(comparisons, "comparison"),
      flips === undefined ? null : count(flips, "order flip"),
      usage ? `${count(usage.prompt_tokens, "token")} in, ${usage.completion_tokens.toLocaleString("en")} out` : null,
    ];
    return [
      element("h2", { class: "verdict" }, `Candidate ${winner + 1} wins`),
      element("div", { class: "prose chosen" }, prose(written)),
      element("p", { class: "figures" }, figures.filter(Boolean).join(" · ")),
    ];
  }
}
