// Forms: values as the API takes them, keys that send, buttons that stop.

import { isAbort } from "./api.js";
import { clear, showFailure } from "./notice.js";

/** The number in a field, undefined where it is empty. */
export function number(form, name) {
  const text = form.elements[name].value.trim();
  return text === "" ? undefined : Number(text);
}

/** The text in a field. */
export const text = (form, name) => form.elements[name].value.trim();

/** A form whose fields, except several-line answers, send with Enter, and all with Ctrl or Cmd and Enter. `ask(signal)` asks the
 * server; while it does, the button that stops takes the place of the one that sends, and Escape stops too. */
export class Asking {
  #running = null;

  constructor({ form, notices, ask, onFailure }) {
    Object.assign(this, { form, notices, ask, onFailure });
    this.send = form.querySelector("[data-submit]");
    this.halt = form.querySelector("[data-stop]");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    this.halt.addEventListener("click", () => this.stop());
  }

  /** Whether an answer is awaited. */
  get running() {
    return this.#running !== null;
  }

  /** Asks, unless an answer is awaited. */
  async start() {
    if (this.running) return;
    const controller = new AbortController();
    this.#running = controller;
    clear(this.notices);
    this.#show(true);
    try {
      await this.ask(controller.signal);
    } catch (error) {
      if (!isAbort(error)) {
        this.onFailure?.(error);
        showFailure(this.notices, error, () => this.start());
      }
    } finally {
      this.#running = null;
      this.#show(false);
    }
  }

  /** Gives up the answer that is awaited. */
  stop() {
    this.#running?.abort();
  }

  #show(running) {
    const focused = document.activeElement === (running ? this.send : this.halt);
    this.send.hidden = running;
    this.halt.hidden = !running;
    this.form.setAttribute("aria-busy", String(running));
    if (focused) (running ? this.halt : this.send).focus();
  }
}

/** A text area grows with its text, up to what the style sheet allows. */
export function growing(area) {
  const fit = () => {
    area.style.setProperty("height", "auto");
    area.style.setProperty("height", `${area.scrollHeight + 2}px`);
  };
  area.addEventListener("input", fit);
  return fit;
}
