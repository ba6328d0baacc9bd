// A worker with API keys: who has none is asked for one, who asks too often is told to wait.

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, afterEach, before, beforeEach, test } from "node:test";
import { openPage, startBrowser } from "../browser.mjs";
import { answered, say, set } from "../view.mjs";
import { startWorker } from "../worker.mjs";

const KEYS = { free: "", slow: " rate=2/m" };
const directory = mkdtempSync(join(tmpdir(), "flotilla-keys-"));
let worker, browser, page, faults, close;
before(async () => {
  const lines = Object.entries(KEYS).map(([name, limits]) => `${name} sha256:${createHash("sha256").update(`key-${name}`).digest("hex")}${limits}\n`);
  writeFileSync(join(directory, "keys"), lines.join(""));
  [worker, browser] = await Promise.all([startWorker("--api-key-file", join(directory, "keys")), startBrowser()]);
});
after(async () => { await browser?.close(); await worker?.stop(); rmSync(directory, { recursive: true }); });
beforeEach(async () => {
  ({ page, faults, close } = await openPage(browser, worker.address));
  await page.getByText("needs an API key").waitFor();
});
afterEach(async () => {
  await close();
  assert.deepEqual(faults, []);
});

async function enter(key) {
  await page.locator("#key").fill(key);
  await page.keyboard.press("Enter");
}

test("the page itself needs no key, and with one it answers", async () => {
  await enter("key-wrong");
  await page.getByRole("alert").getByText("status 401").waitFor();
  await enter("key-free");
  await page.getByText("tiny", { exact: true }).waitFor();
  await set(page, { max_tokens: 4 });
  await say(page, "One");
  await answered(page);
});

test("a key with a limit is told when to try again", async () => {
  await enter("key-slow");
  await page.getByText("tiny", { exact: true }).waitFor();
  await set(page, { max_tokens: 4 });
  await say(page, "One");
  await answered(page);
  await say(page, "Two");
  await page.getByRole("alert").getByText(/status 429 · rate_limit_exceeded/).waitFor();
  const again = page.getByRole("button", { name: /^Try again in \d+ s$/ });
  assert.equal(await again.isDisabled(), true);
  assert.equal(await page.locator("#message").inputValue(), "Two");
});
