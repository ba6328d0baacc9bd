// What the page does with answers that the tiny model does not give: scripted by the stand-in, which sends the same headers.

import assert from "node:assert/strict";
import { after, afterEach, before, beforeEach, test } from "node:test";
import { openPage, startBrowser } from "../browser.mjs";
import { startMock } from "../mock_server.mjs";
import { answered, go, say } from "../view.mjs";

let mock, browser, page, faults, close;
before(async () => { [mock, browser] = await Promise.all([startMock({ pace: 5, key: "right" }), startBrowser()]); });
after(async () => { await browser?.close(); mock?.stop(); });
beforeEach(async () => { ({ page, faults, close } = await openPage(browser, mock.address)); });
afterEach(async () => {
  await close();
  assert.deepEqual(faults, []);
});

async function enter(key) {
  await page.getByLabel("API key", { exact: true }).and(page.locator("input")).fill(key);
  await page.keyboard.press("Enter");
}

test("a key is asked for, kept for the tab only, and never in an address", async () => {
  await page.getByText("needs an API key").waitFor();
  assert.equal(await page.evaluate(() => document.activeElement.id), "key");
  await enter("wrong");
  await page.getByRole("alert").getByText("the bearer token is wrong").waitFor();
  await enter("right");
  await page.getByText("critic-r1-demo").waitFor();
  assert.equal(await page.getByRole("alert").count(), 0);
  const kept = await page.evaluate(() => [Object.values({ ...sessionStorage }).includes("right"), JSON.stringify({ ...localStorage }), document.cookie, location.href]);
  assert.deepEqual(kept, [true, "{}", "", `${mock.address}/`]);
  await page.getByRole("button", { name: "API key" }).click();
  await page.getByRole("button", { name: "Forget key" }).click();
  await page.getByText("needs an API key").waitFor();
  assert.equal(await page.evaluate(() => sessionStorage.getItem("flotilla.key")), null);
});

test("an overloaded server is asked again only after the time that it named", async () => {
  await enter("right");
  await say(page, "Answer with 429");
  const again = page.getByRole("button", { name: /^Try again/ });
  await page.getByText("Try again in 3 s").waitFor();
  assert.equal(await again.isDisabled(), true);
  assert.match(await page.getByRole("alert").textContent(), /256 requests wait.*status 429 · overloaded · request req-7f3a/s);
  await page.locator("#message").fill("Now it has room");
  await page.getByRole("button", { name: "Try again", exact: true }).click();
  await answered(page);
});

test("markup of a model stays text", async () => {
  await enter("right");
  await say(page, "hostile");
  await answered(page);
  const prose = page.locator(".assistant .prose");
  assert.match(await prose.textContent(), /<img src=x onerror="alert\(1\)"> <script>alert\(2\)<\/script> \[x\]\(javascript:alert\(3\)\)/);
  assert.equal(await prose.locator("img, script, a").count(), 0);
});

test("Markdown of a model is laid out, its thought is folded, and its box is framed", async () => {
  await enter("right");
  await say(page, "Which quarter?");
  await answered(page);
  const prose = page.locator(".assistant .prose");
  assert.equal(await prose.locator("ol > li").count(), 4);
  assert.equal(await prose.locator("strong").textContent(), "42 units");
  assert.equal(await prose.locator("pre code").textContent(), "total = sum([18, 31, 42, 27])");
  assert.equal(await prose.locator(".boxed").textContent(), "42");
  assert.equal(await prose.locator("details.thought").getAttribute("open"), null);
});

test("a thought that is opened while the answer streams stays open", async () => {
  await enter("right");
  await say(page, "Which quarter?");
  await page.getByText("Thought", { exact: true }).click();
  await answered(page);
  assert.equal(await page.locator("details.thought").evaluate((thought) => thought.open), true);
});

test("an answer that breaks off keeps what has come and says so", async () => {
  await enter("right");
  await say(page, "Please cut this short");
  await page.getByRole("alert").getByText(/connection (broke|ended) before/).waitFor();
  await page.getByText("broken off", { exact: true }).waitFor();
  assert.match(await page.locator(".assistant .prose").textContent(), /Q1 sold 18/);
});

test("the verdict, its margin, both orders and a flip are told", async () => {
  await enter("right");
  await go(page, "Compare");
  await page.locator("#compare-question").fill("Which quarter? flip");
  await page.locator("#compare-first").fill("Q3");
  await page.locator("#compare-second").fill("Q2");
  await page.keyboard.press("Control+Enter");
  await page.getByRole("heading", { name: "Answer 1 is better" }).waitFor();
  await page.getByText("71 % for answer 1, 29 % for answer 2; log-odds +0.90").waitFor();
  await page.getByText("The order decides").waitFor();
  assert.deepEqual(await page.locator("#compare-result tbody tr").allTextContents(), ["Answer 2 firstAnswer 2 is better−0.62", "Both ordersAnswer 1 is better+0.90"]);
});

test("the bracket and its table tell the same comparisons", async () => {
  await enter("right");
  await go(page, "Best of N");
  await page.locator("#best-question").fill("Which quarter?");
  await page.locator("#best-n").fill("16");
  await page.getByRole("button", { name: "Find the best" }).click();
  await page.getByRole("heading", { name: "Candidate 1 is chosen" }).waitFor();
  await page.getByText("All comparisons as a table").click();
  await page.locator("#best-result details tbody tr").nth(14).waitFor();
  assert.equal(await page.locator("#best-result details tbody tr").count(), 15);
  assert.equal(await page.locator(".bracket .match").count(), 15);
  assert.equal(await page.locator(".bracket path.best").count(), 4);
  assert.match(await page.getByRole("img", { name: "Bracket of 16 candidates" }).locator("desc").textContent(), /Candidate 1 is chosen/);
});
