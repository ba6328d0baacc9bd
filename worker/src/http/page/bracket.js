// A tournament as a drawing, round by round, and as a table that says the same.

import { signed } from "./compare.js";
import { drawing, element } from "./element.js";

const ROW = 26;
const COLUMN = 84;
const LABEL = 40;
const EDGE = 16;

/** Candidates in the order in which the drawing lists them: those who meet stand side by side. */
function order(candidates, rounds) {
  const groups = new Map(Array.from({ length: candidates }, (_, index) => [index, [index]]));
  for (const { first, second, winner } of rounds.flat()) {
    const [one, other] = [groups.get(first), groups.get(second)];
    if (one === undefined || other === undefined || one === other) continue;
    const both = [...one, ...other];
    const loser = (winner ?? first) === first ? second : first;
    groups.delete(loser);
    groups.set(winner ?? first, both);
  }
  return [...groups.values()].flat();
}

/** The drawing. `rounds`: for each round its matches as `{ first, second, winner, margin, flip }`, `winner` being null while the
 * match goes on. `best`: the candidate that won it all, null until then. */
export function bracket(candidates, rounds, best) {
  const lines = [];
  const labels = [];
  /** Where each candidate that is still in stands. */
  const at = new Map(order(candidates, rounds).map((candidate, row) => [candidate, { x: LABEL, y: EDGE + ROW * row }]));
  for (const [candidate, { y }] of at) labels.push(label(candidate, LABEL - 8, y, "end", candidate === best));
  rounds.forEach((matches, round) => {
    const x = LABEL + COLUMN * (round + 1);
    for (const { first, second, winner, margin, flip } of matches) {
      const y = (at.get(first).y + at.get(second).y) / 2;
      for (const candidate of [second, first].sort((one) => (one === winner ? 1 : -1))) {
        const from = at.get(candidate);
        const bend = x - COLUMN / 2;
        const kind = candidate !== winner ? "out" : best !== null && candidate === best ? "best" : "on";
        lines.push(drawing("path", { class: `way ${kind}`, d: `M${from.x} ${from.y}H${bend}V${y}H${x}` }));
      }
      if (winner === null || winner === undefined) continue;
      at.set(winner, { x, y });
      labels.push(drawing("circle", { class: flip ? "match flip" : "match", cx: x, cy: y, r: 11 }), label(winner, x, y, "middle", winner === best));
      if (margin !== null && margin !== undefined) {
        labels.push(drawing("text", { class: "sure", x: x - COLUMN / 2 + 4, y: y - 5 }, Math.abs(margin).toFixed(1)));
      }
      at.delete(winner === first ? second : first);
    }
  });
  const [width, height] = [LABEL + COLUMN * rounds.length + 2 * EDGE, 2 * EDGE + ROW * (candidates - 1)];
  const summary = best === null ? `${rounds.length} rounds so far.` : `Candidate ${best + 1} wins.`;
  return drawing("svg", { class: "bracket", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-labelledby": "bracket-title bracket-desc" },
    drawing("title", { id: "bracket-title" }, `Bracket of ${candidates} candidates`),
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
  const rows = rounds.flatMap((matches, round) => matches.map(({ first, second, winner, margin, flip }) => element("tr", {},
    element("td", { class: "number" }, String(round + 1)),
    element("td", {}, `Candidate ${first + 1} and candidate ${second + 1}`),
    element("td", {}, winner === null || winner === undefined ? "–" : `Candidate ${winner + 1}`),
    element("td", { class: "number" }, margin === null || margin === undefined ? "–" : signed(margin)),
    element("td", {}, flip === true ? "yes" : flip === false ? "no" : "–"))));
  return element("table", {}, element("caption", {}, "Comparisons. A positive margin favours the candidate that is named first."),
    element("thead", {}, element("tr", {}, ["Round", "Compared", "Better", "Margin", "Order flip"].map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, rows));
}
