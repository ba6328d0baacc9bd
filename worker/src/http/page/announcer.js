// Tells screen readers what comes in, in sentences instead of tokens.

import { byId } from "./element.js";

/** No piece sooner after the one before, in milliseconds. */
const PAUSE = 2500;
/** A piece without the end of a sentence waits until it has so many characters. */
const LONG = 240;

/** Says one thing at once. */
export function announce(text) {
  const region = byId("announcer");
  // The same text twice in a row would not be read again.
  region.textContent = region.textContent === text ? `${text}\u00a0` : text;
}

/** Gathers streamed text and says it sentence by sentence. */
export class Reader {
  #waiting = "";
  #last = 0;

  /** Takes a piece of text. */
  add(piece) {
    this.#waiting += piece;
    const now = performance.now();
    if (now - this.#last < PAUSE) return;
    const end = Math.max(...[". ", "! ", "? ", "\n", ".\n"].map((mark) => this.#waiting.lastIndexOf(mark)));
    if (end < 0 && this.#waiting.length < LONG) return;
    const cut = end < 0 ? this.#waiting.length : end + 1;
    this.#say(this.#waiting.slice(0, cut), now);
    this.#waiting = this.#waiting.slice(cut);
  }

  /** Says what is left, and how it ended. */
  end(how) {
    this.#say(`${this.#waiting} ${how}`, performance.now());
    this.#waiting = "";
  }

  #say(text, now) {
    if (text.trim() === "") return;
    this.#last = now;
    announce(text.trim());
  }
}
