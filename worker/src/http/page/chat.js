// Chat: a conversation with the policy, streamed, with one answer or several a turn.

import { announce, Reader } from "./announcer.js";
import { isAbort, postEvents } from "./api.js";
import { byId, count, element } from "./element.js";
import { growing, number, text as textOf } from "./field.js";
import { clear, showFailure } from "./notice.js";
import { Pictures, thumbnail } from "./pictures.js";
import { prose } from "./prose.js";

const SETTINGS = "flotilla.settings";
/** Longer text is shown plain until it is whole: it is laid out anew at each frame. */
const LONG = 20_000;
/** So close to the end of the page, in pixels, the view follows what is written. */
const NEAR = 120;

/** Starts the mode; `model()` names the model, `learn` is told of failures. The result takes pictures, and stops the answer
 * that is awaited. */
export function chat(model, learn) {
  const conversation = new Conversation(model, learn);
  settings();
  return conversation;
}

class Conversation {
  /** Turns as `{ role, text, pictures, shown }`; the text of an assistant's turn is that of the answer that was chosen. */
  #turns = [];
  #running = null;

  constructor(model, learn) {
    this.model = model;
    this.learn = learn;
    this.form = byId("composer");
    this.message = byId("message");
    this.notices = byId("chat-notices");
    this.transcript = byId("transcript");
    this.pictures = new Pictures(this.form, this.notices);
    this.fit = growing(this.message);
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.message.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    byId("chat-stop").addEventListener("click", () => this.stop());
    byId("chat-clear").addEventListener("click", () => this.#clear());
  }

  /** Gives up the answer that is awaited; what has come stays. */
  stop() {
    this.#running?.abort();
  }

  #clear() {
    this.stop();
    this.#turns = [];
    this.transcript.replaceChildren();
    clear(this.notices);
    byId("chat-empty").hidden = false;
    this.message.focus();
    announce("New chat");
  }

  #send() {
    const said = this.message.value.trim();
    if (this.#running || (said === "" && this.pictures.items.length === 0)) return;
    const turn = { role: "user", text: said, pictures: this.pictures.take() };
    this.message.value = "";
    this.fit();
    byId("chat-empty").hidden = true;
    turn.shown = element("li", { class: "turn user" },
      element("h2", { class: "unseen" }, "You"),
      turn.pictures.length > 0 ? element("div", { class: "thumbnails" }, turn.pictures.map(thumbnail)) : null,
      said === "" ? null : element("p", { class: "said", dir: "auto" }, said));
    this.#turns.push(turn);
    this.transcript.append(turn.shown);
    this.#answer();
  }

  async #answer() {
    const controller = new AbortController();
    this.#running = controller;
    clear(this.notices);
    this.#show(true);
    const body = request(this.model(), this.#turns);
    const answer = new Answer(this.transcript, body.n ?? 1);
    announce("Answering");
    follow(true);
    try {
      for await (const { data } of postEvents("v1/chat/completions", body, controller.signal)) answer.take(data);
      this.#keep(answer, answer.end());
    } catch (error) {
      if (answer.began) this.#keep(answer, answer.end(isAbort(error) ? "stopped" : "broken off"));
      else if (answer.isShown) this.#withdraw(answer);
      if (isAbort(error)) {
        announce("Stopped");
      } else {
        this.learn(error);
        showFailure(this.notices, error, () => (answer.began ? this.#again(answer) : this.#send()));
      }
    } finally {
      if (this.#running === controller) {
        this.#running = null;
        this.#show(false);
      }
      follow();
    }
  }

  /** Appends the answer to the conversation, and follows the user's choice among several. */
  #keep(answer, samples) {
    if (!answer.isShown) return;
    const turn = { role: "assistant", text: samples[0].text, pictures: [] };
    this.#turns.push(turn);
    answer.offer((chosen) => { turn.text = samples[chosen].text; }, () => this.#again(answer));
  }

  /** Puts a question without an answer back where it was written: nothing is lost, and it can be changed. */
  #withdraw(answer) {
    answer.remove();
    const turn = this.#turns.pop();
    turn.shown.remove();
    byId("chat-empty").hidden = this.#turns.length > 0;
    if (this.message.value === "") this.message.value = turn.text;
    this.fit();
    this.pictures.putBack(turn.pictures);
  }

  /** Asks the last question again. */
  #again(answer) {
    if (this.#running || this.#turns.length === 0) return;
    answer.remove();
    if (this.#turns.at(-1).role === "assistant") this.#turns.pop();
    this.#answer();
  }

  #show(running) {
    const [send, stop] = [byId("chat-send"), byId("chat-stop")];
    const focused = document.activeElement === (running ? send : stop);
    send.hidden = running;
    stop.hidden = !running;
    for (const again of this.transcript.querySelectorAll("[data-again]")) again.disabled = running;
    if (focused) (running ? stop : this.message).focus();
  }
}

/** The body of a request for the next turn. */
function request(model, turns) {
  const form = byId("settings-form");
  const system = textOf(form, "system");
  const messages = turns.map(({ role, text, pictures }) => {
    if (pictures.length === 0) return { role, content: text };
    const parts = pictures.map(({ url }) => ({ type: "image_url", image_url: { url } }));
    return { role, content: text === "" ? parts : [...parts, { type: "text", text }] };
  });
  return {
    model,
    messages: system === "" ? messages : [{ role: "system", content: system }, ...messages],
    temperature: number(form, "temperature"),
    top_p: number(form, "top_p"),
    max_tokens: number(form, "max_tokens"),
    seed: number(form, "seed"),
    n: number(form, "n"),
    stream: true,
    stream_options: { include_usage: true },
  };
}

/** The answers of one turn while they come in. */
class Answer {
  /** Whether anything has come. */
  began = false;
  #usage = null;
  #first = null;
  #frame = null;
  #start = performance.now();
  #reader = new Reader();

  constructor(transcript, n) {
    this.samples = Array.from({ length: n }, (_, index) => {
      const body = element("div", { class: "prose" }, element("p", { class: "waiting" }, element("span", { class: "unseen" }, "Waiting for the first token")));
      const foot = element("p", { class: "foot" });
      const head = element("div", { class: "head" });
      const card = element("article", { class: "sample", "aria-label": n > 1 ? `Answer ${index + 1} of ${n}` : null }, head, body, foot);
      return { text: "", finish: null, changed: false, body, foot, head, card };
    });
    this.figures = element("p", { class: "figures" });
    this.actions = element("div", { class: "actions" });
    this.turn = element("li", { class: "turn assistant" }, element("h2", { class: "unseen" }, "Model"),
      element("div", { class: n > 1 ? "samples several" : "samples" }, this.samples.map(({ card }) => card)), this.figures, this.actions);
    transcript.append(this.turn);
  }

  get isShown() {
    return this.turn.isConnected;
  }

  /** Takes one chunk of the stream. */
  take(chunk) {
    if (chunk.usage) this.#usage = chunk.usage;
    for (const { index, delta, finish_reason: finish } of chunk.choices ?? []) {
      const sample = this.samples[index];
      if (sample === undefined) continue;
      const piece = delta?.content ?? "";
      if (piece !== "") this.#first ??= performance.now();
      this.began ||= piece !== "" || finish !== null;
      sample.text += piece;
      sample.finish = finish ?? sample.finish;
      sample.changed = true;
      if (index === 0) this.#reader.add(piece);
    }
    this.#frame ??= requestAnimationFrame(() => this.#draw());
  }

  /** Shows the rest; `cut` says why the stream did not come to its end. Gives the samples. */
  end(cut) {
    for (const sample of this.samples) {
      sample.changed = true;
      sample.whole = true;
      const how = sample.finish ?? cut;
      if (how && how !== "stop") sample.foot.textContent = how === "length" ? "cut at the largest number of tokens" : how;
    }
    this.#draw();
    this.#reader.end(cut ? `Answer ${cut}` : `End of the answer${this.samples.length > 1 ? ` 1 of ${this.samples.length}` : ""}`);
    const now = performance.now();
    const seconds = (now - this.#start) / 1000;
    this.figures.textContent = [
      this.#usage ? `${count(this.#usage.prompt_tokens, "token")} in, ${this.#usage.completion_tokens.toLocaleString("en")} out` : null,
      this.#first ? `first after ${duration(this.#first - this.#start)}` : null,
      this.#usage && seconds > 0 ? `${(this.#usage.completion_tokens / seconds).toFixed(1)} tokens/s` : null,
    ].filter(Boolean).join(" · ");
    return this.samples;
  }

  /** Offers a choice among several answers, copying, and asking again. */
  offer(choose, again) {
    const several = this.samples.length > 1;
    const group = `choice-${Math.random().toString(36).slice(2)}`;
    this.samples.forEach((sample, index) => {
      if (several) {
        const radio = element("input", { type: "radio", name: group, checked: index === 0, on: { change: () => choose(index) } });
        sample.head.append(element("label", { class: "check" }, radio, ` Answer ${index + 1}`, element("span", { class: "unseen" }, ": go on with this one")));
      }
      const copy = element("button", { type: "button", class: "quiet", "aria-label": several ? `Copy answer ${index + 1}` : "Copy the answer" }, "Copy");
      copy.addEventListener("click", async () => {
        const copied = await navigator.clipboard?.writeText(sample.text).then(() => true, () => false);
        copy.textContent = copied ? "Copied" : "Not allowed";
        announce(copy.textContent);
        setTimeout(() => { copy.textContent = "Copy"; }, 2000);
      });
      (several ? sample.head : this.actions).append(copy);
    });
    this.actions.append(element("button", { type: "button", class: "quiet", "data-again": true, on: { click: again } }, "Ask again"));
    for (const older of this.turn.parentElement.querySelectorAll("[data-again]")) {
      if (!this.turn.contains(older)) older.remove();
    }
  }

  remove() {
    cancelAnimationFrame(this.#frame);
    this.turn.remove();
  }

  #draw() {
    this.#frame = null;
    for (const sample of this.samples.filter(({ changed }) => changed)) {
      sample.changed = false;
      if (sample.text === "" && !sample.whole) continue;
      const plain = sample.text.length > LONG && !sample.whole;
      if (sample.text.trim() === "") sample.body.replaceChildren(element("p", { class: "hint" }, "No text."));
      else this.#write(sample.body, plain ? [element("p", { class: "said" }, sample.text)] : prose(sample.text));
    }
    follow();
  }

  /** Puts nodes in the place of older ones; a thought that the user opened or closed stays so until it ends. */
  #write(body, nodes) {
    const thought = (all) => [...all].find((node) => node.matches?.(".thought"));
    const [older, newer] = [thought(body.children), thought(nodes)];
    if (older && newer && older.firstChild.textContent === newer.firstChild.textContent) newer.open = older.open;
    body.replaceChildren(...nodes);
  }
}

const duration = (milliseconds) => (milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`);

/** Keeps the end of the page in view, unless the user has scrolled away from it; `always` goes there. */
function follow(always = false) {
  const page = document.documentElement;
  if (always) following = true;
  if (following) page.scrollTop = page.scrollHeight;
}
let following = true;
addEventListener("scroll", () => {
  const page = document.documentElement;
  following = page.scrollHeight - page.scrollTop - page.clientHeight < NEAR;
}, { passive: true });

/** Settings are kept for the tab; on narrow screens a button shows them. */
function settings() {
  const form = byId("settings-form");
  const fields = [...form.elements].filter(({ name }) => name);
  const kept = JSON.parse(sessionStorage.getItem(SETTINGS) ?? "{}");
  for (const field of fields) field.value = kept[field.name] ?? "";
  const keep = () => sessionStorage.setItem(SETTINGS, JSON.stringify(Object.fromEntries(fields.map(({ name, value }) => [name, value]))));
  form.addEventListener("input", keep);
  form.addEventListener("reset", () => setTimeout(keep));
  form.addEventListener("submit", (event) => event.preventDefault());
  const [button, panel] = [byId("settings-button"), byId("settings")];
  button.addEventListener("click", () => {
    const open = panel.toggleAttribute("data-open");
    button.setAttribute("aria-expanded", String(open));
    if (open) panel.querySelector("textarea").focus();
  });
}
