// A stand-in for the worker while the page is written: the page's files as they are on disk, and an API that says what a
// good model might. Nothing of it is a test of the worker.
//
//   node mock_server.mjs PORT [PURPOSE]

import { createReadStream, existsSync } from "node:fs";
import { createServer } from "node:http";
import { fileURLToPath } from "node:url";

const PAGE = new URL("../../worker/src/http/page/", import.meta.url);
const TYPES = { html: "text/html; charset=utf-8", css: "text/css; charset=utf-8", js: "text/javascript; charset=utf-8", svg: "image/svg+xml" };
/** As in page/mod.rs. */
const POLICY =
  "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; " +
  "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

const ANSWER = `<think>The chart has four bars. The tallest is the third one; its label reads *Q3*, and the axis says 42.</think>
The third quarter sold most, **42 units**:

1. Q1 sold 18
2. Q2 sold 31
3. Q3 sold 42
4. Q4 sold 27

Taken together that is \`18 + 31 + 42 + 27 = 118\`.

\`\`\`python
total = sum([18, 31, 42, 27])
\`\`\`

The answer is \\boxed{42}`;

const RATIONALE = "Answer 1 names the tallest bar and reads its value off the axis. Answer 2 reads the bar beside it: 31 is the second quarter.";

const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** Starts the stand-in on a free port of loopback, or on `port`. */
export function startMock({ port = 0, purpose = "Both", pace = 15, key = null } = {}) {
  const server = createServer((request, response) => {
    answer(request, response, { purpose, pace, key }).catch((error) => response.destroy(error));
  });
  return new Promise((resolve) => {
    server.listen(port, "127.0.0.1", () => {
      resolve({ address: `http://127.0.0.1:${server.address().port}`, stop: () => server.close() });
    });
  });
}

async function answer(request, response, { purpose, pace, key }) {
  const path = new URL(request.url, "http://localhost").pathname;
  if (path === "/" || path.startsWith("/page/")) return file(path === "/" ? "index.html" : path.slice("/page/".length), response);
  const presented = request.headers.authorization;
  if (key !== null && presented !== `Bearer ${key}`) return refuse(response, 401, "unauthorized", presented ? "the bearer token is wrong" : "a bearer token is needed");
  let text = "";
  for await (const chunk of request) text += chunk;
  const body = text === "" ? {} : JSON.parse(text);
  const handler = { "/v1/models": models, "/v1/chat/completions": chat, "/v1/critic/compare": compare, "/v1/critic/score": score, "/v1/critic/best-of-n": bestOfN }[path];
  if (!handler) return refuse(response, 404, "not_found", `there is no ${path}`);
  return handler(body, response, { purpose, pace });
}

function file(name, response) {
  const location = new URL(name, PAGE);
  if (!/^[\w.]+$/.test(name) || !existsSync(location)) return refuse(response, 404, "not_found", `there is no ${name}`);
  response.writeHead(200, { "content-type": TYPES[name.split(".").at(-1)], "content-security-policy": POLICY, "cache-control": "no-store" });
  createReadStream(location).pipe(response);
}

function json(response, value, status = 200, headers = {}) {
  response.writeHead(status, { "content-type": "application/json", "x-request-id": "req-7f3a", ...headers });
  response.end(JSON.stringify(value));
}

function refuse(response, status, code, message, headers) {
  json(response, { error: { message, type: "invalid_request_error", param: null, code } }, status, headers);
}

function models(_, response, { purpose }) {
  json(response, { object: "list", data: [{ id: "critic-r1-demo", object: "model", created: 0, owned_by: "flotilla", max_model_len: 4096, purpose }] });
}

async function chat(body, response, { pace }) {
  const last = body.messages.at(-1).content;
  const said = typeof last === "string" ? last : (last.find(({ type }) => type === "text")?.text ?? "");
  if (said.includes("429")) return refuse(response, 429, "overloaded", "256 requests wait already, the limit is 256", { "retry-after": "3" });
  if (said.includes("500")) return refuse(response, 500, "model_failure", "the model failed: out of memory");
  response.writeHead(200, { "content-type": "text/event-stream" });
  const n = body.n ?? 1;
  const pieces = (said.includes("hostile") ? '<img src=x onerror="alert(1)"> <script>alert(2)</script> [x](javascript:alert(3))' : ANSWER).match(/\s*\S+|\s+/g);
  const send = (choices, usage = null) => response.write(`data: ${JSON.stringify({ id: "c", object: "chat.completion.chunk", choices, usage })}\n\n`);
  for (const piece of pieces) {
    for (let index = 0; index < n; index += 1) send([{ index, delta: { content: piece }, finish_reason: null }]);
    await sleep(pace);
    if (said.includes("cut") && piece.includes("Q2")) return response.destroy();
  }
  for (let index = 0; index < n; index += 1) send([{ index, delta: { content: "" }, finish_reason: "stop" }]);
  send([], { prompt_tokens: 318, completion_tokens: 96 * n, total_tokens: 414 });
  response.end("data: [DONE]\n\n");
}

async function compare(body, response, { pace }) {
  await sleep(20 * pace);
  const flip = body.question.includes("flip");
  const swapped = { verdict: flip ? "2" : "1", margin: flip ? -0.62 : 1.73, rationale: RATIONALE, raw: `<think>${RATIONALE}</think> \\boxed{1}` };
  json(response, {
    id: "cmp-1", object: "critic.comparison", model: "critic-r1-demo", verdict: "1", winner: 0, rationale: RATIONALE, raw: swapped.raw, finish_reason: "stop",
    margin: body.both_orders ? (2.41 + swapped.margin) / 2 : 2.41,
    ...(body.both_orders ? { order_flip: flip, swapped } : {}),
    usage: { prompt_tokens: 801, completion_tokens: 88, total_tokens: 889 },
  });
}

async function score(_, response, { pace }) {
  await sleep(20 * pace);
  const probabilities = [0.01, 0.02, 0.03, 0.05, 0.06, 0.1, 0.18, 0.3, 0.2, 0.05];
  json(response, {
    id: "score-1", object: "critic.score", model: "critic-r1-demo", score: 7.31, mode: 8, entropy: 1.9, mass: 0.97, range: { minimum: 1, maximum: 10, step: 1 },
    distribution: probabilities.map((probability, index) => ({ value: index + 1, label: String(index + 1), probability })),
    rationale: null, raw: "", finish_reason: null, usage: { prompt_tokens: 402, completion_tokens: 0, total_tokens: 402 },
  });
}

async function bestOfN(body, response, { pace }) {
  response.writeHead(200, { "content-type": "text/event-stream" });
  const send = (event, data) => response.write(`event: ${event}\ndata: ${JSON.stringify(data)}\n\n`);
  const candidate = (index) => {
    const answer = String([42, 31, 42, 27][index % 4]);
    return { index, text: `<think>Reading ${index + 1}: the tallest bar.</think> The answer is \\boxed{${answer}}`, answer, finish_reason: "stop", completion_tokens: 38 };
  };
  const candidates = Array.from({ length: body.n }, (_, index) => candidate(index));
  for (const each of candidates) {
    await sleep(2 * pace);
    send("candidate", each);
  }
  let alive = candidates.map(({ index }) => index);
  const rounds = [];
  while (alive.length > 1) {
    await sleep(12 * pace);
    const pairs = [];
    for (let at = 0; at + 1 < alive.length; at += 2) {
      const [first, second] = [alive[at], alive[at + 1]];
      const margin = Math.sin(first * 12.9898 + second * 78.233 + rounds.length) * 3;
      pairs.push({ first, second, winner: margin > 0 ? first : second, by_lot: false, verdict: margin > 0 ? "1" : "2", margin, order_flip: body.both_orders ? Math.abs(margin) < 0.4 : null, rationale: "It reads the axis." });
    }
    const bye = alive.length % 2 === 1 ? alive.at(-1) : null;
    alive = [...pairs.map(({ winner }) => winner), ...(bye === null ? [] : [bye])];
    rounds.push({ round: rounds.length, comparisons: pairs, bye });
    send("round", { ...rounds.at(-1), selector: body.selector });
  }
  const all = rounds.flatMap(({ comparisons: pairs }) => pairs);
  const comparisons = all.length;
  const counts = { comparisons, opinions: comparisons, flips: all.filter((pair) => pair.order_flip).length, ties: 0, by_lot: 0, unparsed: 0, prompt_tokens: 801 * comparisons, completion_tokens: 88 * comparisons };
  const reports = [{ selector: body.selector, winner: alive[0], counts, rounds }];
  if (body.report === "all") {
    const votes = [{ candidate: 0, answer: "42", count: body.n / 2 }, { candidate: 1, answer: "31", count: body.n / 4 }, { candidate: 3, answer: "27", count: body.n / 4 }];
    reports.push({ selector: "majority", winner: 0, counts: { ...counts, comparisons: 0, flips: 0, prompt_tokens: 0, completion_tokens: 0 }, rounds: [], votes });
  }
  send("result", {
    id: "bon-1", object: "critic.best_of_n", model: "critic-r1-demo", n: body.n, distinct: body.n, seed: body.seed ?? 1838, selector: body.selector, winner: alive[0], text: candidates[alive[0]].text, answer: candidates[alive[0]].answer, finish_reason: "stop", comparisons, order_flips: counts.flips, candidates,
    reports, shortened: 0, prefill_tokens: 1912, usage: { prompt_tokens: 318 * body.n + counts.prompt_tokens, completion_tokens: 38 * body.n + counts.completion_tokens, total_tokens: 0 },
  });
  response.end("data: [DONE]\n\n");
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const [, , port = "8010", purpose = "Both"] = process.argv;
  const { address } = await startMock({ port: Number(port), purpose });
  process.stdout.write(`${address}\n`);
}
