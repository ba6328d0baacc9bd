// Requests to this server, streams of events, and failures that say what to do. Addresses are relative, so that the page
// works behind a proxy with a path of its own.

const KEY = "flotilla.key";
/** A failed answer is read up to so many characters. */
const LONGEST_REASON = 2000;

/** The API key of this tab, "" without one. */
export const key = () => sessionStorage.getItem(KEY) ?? "";

/** Keeps a key for this tab; "" forgets it. */
export function keepKey(value) {
  if (value === "") sessionStorage.removeItem(KEY);
  else sessionStorage.setItem(KEY, value);
}

/** A request that was not answered as asked. */
export class Failure extends Error {
  /** `status`: of HTTP, 0 where no answer came. `retryAfter`: seconds, null if the server named none. */
  constructor(message, { status = 0, code = null, param = null, retryAfter = null, requestId = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter, requestId });
  }
}

/** True if the user stopped it. */
export const isAbort = (error) => error?.name === "AbortError";

/** The JSON at `path`. */
export async function getJson(path, signal) {
  return read(await send(path, { signal }));
}

/** The JSON that answers `body`. */
export async function postJson(path, body, signal) {
  return read(await send(path, posted(body, signal)));
}

/** The events that answer `body`: `{ event, data }` with `data` parsed. Fails unless the stream ends with `[DONE]`. */
export async function* postEvents(path, body, signal) {
  const response = await send(path, posted(body, signal));
  const requestId = response.headers.get("x-request-id");
  for await (const { event, data } of events(response.body)) {
    if (data === "[DONE]") return;
    const parsed = parse(data);
    if (parsed?.error) throw failure(parsed.error, { status: response.status, requestId });
    yield { event, data: parsed };
  }
  throw new Failure("The connection ended before the answer did.", { code: "stream_cut", requestId });
}

function posted(body, signal) {
  return { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" }, signal };
}

async function send(path, options) {
  const headers = { ...options.headers };
  if (key() !== "") headers.authorization = `Bearer ${key()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new Failure("The server cannot be reached.", { code: "unreachable" });
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function read(response) {
  try {
    return await response.json();
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new Failure("The connection ended before the answer did.", { code: "answer_cut" });
  }
}

async function refusal(response) {
  const text = await response.text().catch(() => "");
  const told = parse(text)?.error ?? { message: text.slice(0, LONGEST_REASON).trim() };
  const after = Number.parseFloat(response.headers.get("retry-after") ?? "");
  return failure(told, {
    status: response.status,
    retryAfter: Number.isFinite(after) ? Math.max(0, after) : null,
    requestId: response.headers.get("x-request-id"),
  });
}

function failure(told, { status, retryAfter = null, requestId }) {
  const message = told.message || `The server answered with status ${status}.`;
  return new Failure(message, { status, code: told.code ?? null, param: told.param ?? null, retryAfter, requestId });
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** Server-sent events of a body, as the HTML standard reads them. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = "message";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        if (isAbort(error)) throw error;
        throw new Failure("The connection broke before the answer ended.", { code: "stream_cut" });
      });
      if (done) return;
      // A carriage return at the end may be half of a line break.
      const text = rest + value;
      const whole = text.endsWith("\r") ? text.slice(0, -1) : text;
      const lines = whole.split(/\r\n|\n|\r/);
      rest = lines.pop() + text.slice(whole.length);
      for (const line of lines) {
        if (line === "") {
          if (data.length > 0) yield { event, data: data.join("\n") };
          event = "message";
          data = [];
          continue;
        }
        const [, field, content] = /^([^:]*)(?:: ?(.*))?$/s.exec(line);
        if (field === "data") data.push(content ?? "");
        if (field === "event") event = content ?? "message";
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
