// Notices: what went wrong and what can be done about it.

import { element } from "./element.js";

/** What each status asks of the user, where the server's message does not say it. */
const ADVICE = {
  401: "Enter an API key above.",
  413: "Send fewer or smaller pictures.",
};

/** Puts a notice into `place` that goes away when it is closed. */
export function tell(place, message) {
  const note = element("div", { class: "notice", role: "status" }, element("p", {}, message), closer(() => note.remove()));
  place.append(note);
  return note;
}

/** Shows a failure in `place`, in the place of older ones. `again`, if given, is offered as a button, and only after the time
 * that the server asked for. */
export function showFailure(place, failure, again) {
  clear(place);
  const details = [failure.status > 0 ? `status ${failure.status}` : null, failure.code, failure.param ? `field ${failure.param}` : null,
    failure.requestId ? `request ${failure.requestId}` : null];
  const note = element("div", { class: "notice failure", role: "alert" },
    element("p", {}, failure.message, ADVICE[failure.status] ? ` ${ADVICE[failure.status]}` : ""),
    element("p", { class: "hint" }, details.filter(Boolean).join(" · ")),
    again ? retry(failure.retryAfter, () => { note.remove(); again(); }) : null,
    closer(() => note.remove()));
  place.append(note);
}

/** Removes the notices of `place`. */
export function clear(place) {
  place.replaceChildren();
}

function closer(close) {
  return element("button", { type: "button", class: "quiet close", "aria-label": "Close this notice", on: { click: close } }, "×");
}

function retry(seconds, again) {
  const button = element("button", { type: "button", on: { click: again } }, "Try again");
  if (seconds === null || seconds <= 0) return button;
  const until = performance.now() + seconds * 1000;
  const tick = () => {
    const left = Math.ceil((until - performance.now()) / 1000);
    button.disabled = left > 0;
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left > 0 && (button.isConnected || left === Math.ceil(seconds))) setTimeout(tick, 250);
  };
  tick();
  return button;
}
