// Starts the page: which model is served, which modes it has, which mode is shown, which key is used.

import { getJson, keepKey, key } from "./api.js";
import { bestOfN } from "./best_of_n.js";
import { chat } from "./chat.js";
import { compare } from "./compare.js";
import { byId } from "./element.js";
import { clear, showFailure } from "./notice.js";
import { acceptDrops } from "./pictures.js";
import { score } from "./score.js";

/** Modes of each purpose; a server that does not tell its purpose is asked, and says what it does not do. */
const MODES = {
  Policy: ["chat"],
  Critic: ["compare", "score"],
  Both: ["chat", "compare", "best-of-n", "score"],
};
/** While the model is being loaded the server is asked again after so many milliseconds. */
const PATIENCE = 1500;

const served = { name: undefined, offered: MODES.Both };
const modes = {
  chat: chat(() => served.name, learn),
  compare: compare(() => served.name, learn),
  "best-of-n": bestOfN(() => served.name, learn),
  score: score(() => served.name, learn),
};
let shown = null;

/** Shows the mode that the address names, or the first that is offered. */
function show() {
  const asked = location.hash.slice(1);
  const mode = served.offered.includes(asked) ? asked : served.offered[0];
  for (const link of byId("modes").children) {
    link.hidden = !served.offered.includes(link.dataset.mode);
    if (link.dataset.mode === mode) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  for (const name of Object.keys(modes)) byId(`mode-${name}`).hidden = name !== mode;
  const title = byId("modes").querySelector(`[data-mode="${mode}"]`).textContent;
  document.title = `${title} · ${served.name ?? "Flotilla"}`;
  if (shown !== null && shown !== mode) byId(`mode-${mode}`).querySelector("textarea").focus();
  shown = mode;
}

/** Looks at a failure of a mode: a key that is missing. */
function learn(failure) {
  if (failure.status === 401) askForKey();
}

function say(text, state) {
  byId("served").textContent = text;
  byId("served-dot").dataset.state = state;
}

async function meet() {
  try {
    const [model] = (await getJson("v1/models")).data;
    served.name = model.id;
    served.offered = MODES[model.purpose] ?? MODES.Both;
    say(model.id, "ready");
    clear(byId("page-notices"));
    show();
  } catch (failure) {
    if (failure.status === 503) {
      say(failure.code === "loading" ? "loading the model" : failure.message, "waiting");
      setTimeout(meet, PATIENCE);
    } else if (failure.status === 401) {
      say("needs an API key", "waiting");
      if (key() !== "") showFailure(byId("page-notices"), failure);
      askForKey();
    } else {
      say("not reached", "failed");
      showFailure(byId("page-notices"), failure, meet);
    }
  }
}

function askForKey() {
  byId("key-button").hidden = false;
  openKey(true);
  byId("key").focus();
}

function openKey(open) {
  byId("key-form").hidden = !open;
  byId("key-button").setAttribute("aria-expanded", String(open));
}

byId("key-button").addEventListener("click", () => {
  openKey(byId("key-form").hidden);
  if (!byId("key-form").hidden) byId("key").focus();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey(byId("key").value.trim());
  byId("key").value = "";
  openKey(false);
  byId("key-button").focus();
  meet();
});
byId("key-forget").addEventListener("click", () => {
  keepKey("");
  byId("key").value = "";
  meet();
});

addEventListener("hashchange", show);
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (!byId("key-form").hidden && byId("key-form").contains(document.activeElement)) {
    openKey(false);
    byId("key-button").focus();
  } else {
    modes[shown]?.stop();
  }
});
acceptDrops(() => modes[shown]?.pictures);
byId("key-button").hidden = key() === "";
show();
meet();
