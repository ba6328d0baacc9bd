// The critic's modes on the real worker.

import assert from "node:assert/strict";
import { after, afterEach, before, beforeEach, test } from "node:test";
import { openPage, startBrowser } from "../browser.mjs";
import { PICTURE, go, nextBody } from "../view.mjs";
import { startWorker } from "../worker.mjs";

let worker, browser, page, faults, close;
before(async () => { [worker, browser] = await Promise.all([startWorker(), startBrowser()]); });
after(async () => { await browser?.close(); await worker?.stop(); });
beforeEach(async () => {
  ({ page, faults, close } = await openPage(browser, worker.address));
  await page.getByText("tiny", { exact: true }).waitFor();
});
afterEach(async () => {
  await close();
  assert.deepEqual(faults, []);
});

test("the verdict is the one that the API gives", async () => {
  await go(page, "Compare");
  await page.locator("#compare-form input[type=file]").setInputFiles(PICTURE);
  await page.getByRole("img", { name: /rings/ }).waitFor();
  await page.locator("#compare-question").fill("What is this?");
  await page.locator("#compare-first").fill("Rings");
  await page.locator("#compare-second").fill("A house");
  await page.locator("#compare-max-tokens").fill("8");
  const [body] = await Promise.all([nextBody(page, "/v1/critic/compare"), page.locator("#compare-second").press("Control+Enter")]);
  const heading = page.locator("#compare-result h2");
  await heading.waitFor();
  const given = await worker.post("/v1/critic/compare", body);
  const names = { 1: "Answer 1 is better", 2: "Answer 2 is better", tie: "A tie" };
  assert.equal(await heading.textContent(), names[given.verdict] ?? "The critic names neither");
  assert.match(await page.locator("#compare-result .figures").textContent(), new RegExp(`${given.usage.completion_tokens} out`));
  if (given.margin !== null) {
    const sign = given.margin < 0 ? "−" : "+";
    assert.match(await page.locator("#compare-result figcaption").textContent(), new RegExp(`log-odds \\${sign}${Math.abs(given.margin).toFixed(2)}`));
  }
});

test("the chosen candidate, its bracket and its table are those that the API gives", async () => {
  await go(page, "Best of N");
  await page.locator("#best-form input[type=file]").setInputFiles(PICTURE);
  await page.getByRole("img", { name: /rings/ }).waitFor();
  await page.locator("#best-question").fill("What is this?");
  await page.locator("#best-n").fill("6");
  await page.locator("#best-max-tokens").fill("8");
  await page.locator("#best-critic-tokens").fill("8");
  await page.locator("#best-seed").fill("5");
  await page.getByLabel("Ask in both orders").last().check();
  await page.getByLabel("Report every selector").check();
  const [body] = await Promise.all([nextBody(page, "/v1/critic/best-of-n"), page.locator("#best-question").press("Control+Enter")]);
  const given = await worker.post("/v1/critic/best-of-n", { ...body, stream: false });
  await page.getByRole("heading", { name: `Candidate ${given.winner + 1} is chosen` }).waitFor();
  const pairs = given.reports[0].rounds.flatMap((round) => round.comparisons);
  assert.ok(pairs.length > 0);
  await page.getByText("All comparisons as a table").click();
  const better = await page.locator("#best-result details tbody tr td:nth-child(3)").allTextContents();
  assert.deepEqual(better, pairs.map(({ winner, by_lot: byLot }) => `Candidate ${winner + 1}${byLot ? ", by lot" : ""}`));
  assert.equal(await page.locator(".bracket .match").count(), pairs.length);
  assert.equal(await page.getByRole("img", { name: `Bracket of ${given.distinct} candidates` }).count(), 1);
  const reported = await page.locator(".result .scroll table", { hasText: "Every selector" }).locator("tbody tr").count();
  assert.equal(reported, given.reports.length);
});

for (const selector of ["round_robin", "sequential", "majority", "pointwise"]) {
  test(`${selector} shows the candidate that the API chooses`, async () => {
    await go(page, "Best of N");
    await page.locator("#best-question").fill("What is this?");
    await page.locator("#best-n").fill("4");
    await page.locator("#best-max-tokens").fill("6");
    await page.locator("#best-critic-tokens").fill("6");
    await page.locator("#best-seed").fill("9");
    await page.locator("#best-selector").selectOption(selector);
    const [body] = await Promise.all([nextBody(page, "/v1/critic/best-of-n"), page.getByRole("button", { name: "Find the best" }).click()]);
    const given = await worker.post("/v1/critic/best-of-n", { ...body, stream: false });
    await page.getByRole("heading", { name: `Candidate ${given.winner + 1} is chosen` }).waitFor();
  });
}

test("a selection that is stopped shows what has come, and the worker stops too", async () => {
  await go(page, "Best of N");
  await page.locator("#best-question").fill("What is this?");
  await page.locator("#best-n").fill("64");
  await page.locator("#best-max-tokens").fill("900");
  await page.getByRole("button", { name: "Find the best" }).click();
  await page.getByText(/of 64 candidates written/).waitFor();
  await page.keyboard.press("Escape");
  await page.getByText(/^Ended early/).waitFor();
  assert.equal(await page.getByRole("alert").count(), 0);
  await page.waitForFunction(async () => /_requests_running 0(\.0)?$/m.test(await (await fetch("metrics")).text()));
});

test("the score and its distribution are those that the API gives", async () => {
  await go(page, "Score");
  await page.locator("#score-question").fill("What is this?");
  await page.locator("#score-response").fill("Rings");
  const [body] = await Promise.all([nextBody(page, "/v1/critic/score"), page.getByRole("button", { name: "Score" }).click()]);
  await page.getByRole("heading", { name: /^Score /, level: 2 }).waitFor();
  const given = await worker.post("/v1/critic/score", body);
  assert.match(await page.locator("#score-result h2").textContent(), new RegExp(`^Score ${Number(given.score.toFixed(2))} of 1 to 10`));
  assert.equal(await page.locator("#score-result tbody tr").count(), given.distribution.length);
});

for (const [purpose, modes] of [["policy", ["Chat"]], ["critic", ["Compare", "Score"]]]) {
  test(`a worker that serves with purpose ${purpose} shows ${modes.join(" and ")}`, async () => {
    const other = await startWorker("--purpose", purpose);
    const view = await openPage(browser, other.address);
    await view.page.getByText("tiny", { exact: true }).waitFor();
    const shown = await view.page.getByRole("navigation", { name: "Modes" }).getByRole("link").allTextContents();
    await view.close();
    await other.stop();
    assert.deepEqual([shown, view.faults], [modes, []]);
  });
}
