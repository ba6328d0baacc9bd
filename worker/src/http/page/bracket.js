// A tournament as a drawing, round by round, and as a table that says the same.

import { signed } from "./compare.js";
import { drawing, element } from "./element.js";

const ROW = 26;
const COLUMN = 84;
const LABEL = 40;
const EDGE = 16;

/** Entrants in the order in which the drawing lists them: those who meet stand side by side. */
function order(entrants, rounds) {
  const groups = new Map(entrants.map((entrant) => [entrant, [entrant]]));
  for (const { first, second, winner } of rounds.flatMap(({ comparisons }) => comparisons)) {
    const loser = winner === first ? second : first;
    const [one, other] = [groups.get(first) ?? [], groups.get(second) ?? []];
    groups.delete(loser);
    groups.set(winner, [...one, ...other]);
  }
  return [...groups.values()].flat();
}

/** The drawing. `entrants`: candidates that compete; `rounds`: as the server tells them; `best`: who is chosen, null until then. */
export function bracket(entrants, rounds, best) {
  const lines = [];
  const labels = [];
  /** Where each candidate that is still in stands. */
  const at = new Map(order(entrants, rounds).map((candidate, row) => [candidate, { x: LABEL, y: EDGE + ROW * row }]));
  for (const [candidate, { y }] of at) labels.push(label(candidate, LABEL - 8, y, "end", candidate === best));
  rounds.forEach(({ comparisons }, round) => {
    const x = LABEL + COLUMN * (round + 1);
    for (const { first, second, winner, margin, order_flip: flip, by_lot: byLot } of comparisons) {
      const [one, other] = [at.get(first), at.get(second)];
      if (one === undefined || other === undefined) continue;
      const y = (one.y + other.y) / 2;
      for (const candidate of [first, second]) {
        const from = at.get(candidate);
        const kind = candidate !== winner ? "out" : candidate === best ? "best" : "on";
        lines.push(drawing("path", { class: `way ${kind}`, d: `M${from.x} ${from.y}H${x - COLUMN / 2}V${y}H${x}` }));
      }
      at.delete(first);
      at.delete(second);
      at.set(winner, { x, y });
      labels.push(drawing("circle", { class: flip || byLot ? "match doubt" : "match", cx: x, cy: y, r: 11 }), label(winner, x, y, "middle", winner === best));
      const sure = byLot ? "lot" : margin === null ? null : Math.abs(margin).toFixed(1);
      if (sure !== null) labels.push(drawing("text", { class: "sure", x: x - COLUMN / 2 + 4, y: y - 5 }, sure));
    }
  });
  const [width, height] = [LABEL + COLUMN * rounds.length + 2 * EDGE, 2 * EDGE + ROW * (entrants.length - 1)];
  const summary = best === null ? `${rounds.length} rounds so far.` : `Candidate ${best + 1} is chosen after ${rounds.length} rounds.`;
  return drawing("svg", { class: "bracket", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-labelledby": "bracket-title", "aria-describedby": "bracket-desc" },
    drawing("title", { id: "bracket-title" }, `Bracket of ${entrants.length} candidates`),
    drawing("desc", { id: "bracket-desc" }, `${summary} The table after this drawing lists every comparison.`),
    lines.sort((one, other) => rank(one) - rank(other)), labels);
}

/** What is drawn later lies on top. */
const rank = (line) => ["out", "on", "best"].findIndex((kind) => line.classList.contains(kind));

function label(candidate, x, y, anchor, best) {
  return drawing("text", { class: best ? "name best" : "name", x, y: y + 4, "text-anchor": anchor }, String(candidate + 1));
}

/** The same as a table. */
export function matchTable(rounds) {
  const rows = rounds.flatMap(({ round, comparisons }) => comparisons.map(({ first, second, winner, margin, order_flip: flip, by_lot: byLot, rationale }) => element("tr", {},
    element("td", { class: "number" }, String(round + 1)),
    element("td", {}, `Candidate ${first + 1} and candidate ${second + 1}`),
    element("td", {}, `Candidate ${winner + 1}${byLot ? ", by lot" : ""}`),
    element("td", { class: "number" }, margin === null ? "–" : signed(margin)),
    element("td", {}, flip === true ? "yes" : flip === false ? "no" : "–"),
    element("td", { class: "why", dir: "auto" }, rationale ?? "–"))));
  return element("table", {}, element("caption", {}, "Comparisons. A positive margin favours the candidate that is named first."),
    element("thead", {}, element("tr", {}, ["Round", "Compared", "Better", "Margin", "Order flip", "Why"].map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, rows));
}
