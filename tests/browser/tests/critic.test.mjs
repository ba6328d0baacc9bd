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
