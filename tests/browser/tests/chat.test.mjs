// Chat on the real worker.

import assert from "node:assert/strict";
import { after, afterEach, before, beforeEach, test } from "node:test";
import { openPage, startBrowser } from "../browser.mjs";
import { PICTURE, answered, drop, go, nextBody, pngOf, say, set } from "../view.mjs";
import { startWorker } from "../worker.mjs";

let worker, browser, page, faults, close;
before(async () => { [worker, browser] = await Promise.all([startWorker(), startBrowser()]); });
after(async () => { await browser?.close(); await worker?.stop(); });
beforeEach(async () => {
  ({ page, faults, close } = await openPage(browser, worker.address, { permissions: ["clipboard-read", "clipboard-write"] }));
  await page.getByText("tiny", { exact: true }).waitFor();
});
afterEach(async () => {
  await close();
  assert.deepEqual(faults, []);
});

const copied = async () => {
  await page.getByRole("button", { name: "Copy the answer" }).last().click();
  return page.evaluate(() => navigator.clipboard.readText());
};

test("a streamed answer is the one that the API gives for the same settings", async () => {
  await set(page, { system: "Be brief.", temperature: 0.8, top_p: 0.9, max_tokens: 12, seed: 7 });
  await say(page, "What is this?");
  await answered(page);
  const messages = [{ role: "system", content: "Be brief." }, { role: "user", content: "What is this?" }];
  const whole = await worker.post("/v1/chat/completions", { messages, temperature: 0.8, top_p: 0.9, max_tokens: 12, seed: 7 });
  assert.equal(await copied(), whole.choices[0].message.content);
  assert.match(await page.locator(".assistant .figures").textContent(), new RegExp(`${whole.usage.prompt_tokens} tokens in, ${whole.usage.completion_tokens} out`));
});

test("a conversation is sent whole, with the answers that were given", async () => {
  await set(page, { temperature: 0, max_tokens: 6 });
  await say(page, "One");
  await answered(page);
  const first = await copied();
  const [body] = await Promise.all([nextBody(page, "/v1/chat/completions"), say(page, "Two")]);
  assert.deepEqual(body.messages, [{ role: "user", content: "One" }, { role: "assistant", content: first }, { role: "user", content: "Two" }]);
  await answered(page);
});

test("of several answers the chosen one goes on", async () => {
  await set(page, { temperature: 1, max_tokens: 6, seed: 3, n: 3 });
  await say(page, "One");
  await answered(page);
  await page.getByRole("radio").nth(2).check();
  await page.getByRole("button", { name: "Copy answer 3" }).click();
  const third = await page.evaluate(() => navigator.clipboard.readText());
  const [body] = await Promise.all([nextBody(page, "/v1/chat/completions"), say(page, "Two")]);
  assert.equal(body.messages[1].content, third);
  await answered(page);
});

test("dropped, pasted and chosen pictures are sent byte for byte, before the text", async () => {
  await set(page, { temperature: 0, max_tokens: 4 });
  await drop(page, [PICTURE, { ...PICTURE, name: "second.png" }]);
  await page.getByRole("img", { name: /second\.png, \d+ by \d+ pixels/ }).waitFor();
  await page.locator("#message").focus();
  await page.evaluate((base64) => {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const clipboardData = new DataTransfer();
    clipboardData.items.add(new File([bytes], "pasted.png", { type: "image/png" }));
    document.activeElement.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
  }, PICTURE.buffer.toString("base64"));
  await page.getByRole("img", { name: /pasted/ }).waitFor();
  await page.locator("#composer input[type=file]").setInputFiles({ ...PICTURE, name: "chosen.png" });
  await page.getByRole("img", { name: /chosen/ }).waitFor();
  await page.getByRole("button", { name: "Remove second.png" }).click();
  const [body] = await Promise.all([nextBody(page, "/v1/chat/completions"), say(page, "What is this?")]);
  const url = `data:image/png;base64,${PICTURE.buffer.toString("base64")}`;
  const picture = { type: "image_url", image_url: { url } };
  assert.deepEqual(body.messages, [{ role: "user", content: [picture, picture, picture, { type: "text", text: "What is this?" }] }]);
  await answered(page);
  assert.equal(await page.locator(".user img").count(), 3);
});

test("a huge picture is made smaller, and the page says so", async () => {
  const buffer = await pngOf(page, 4000, 1000);
  await page.locator("#composer input[type=file]").setInputFiles({ name: "wide.png", mimeType: "image/png", buffer });
  await page.getByText("wide.png is 4000 × 1000 pixels; it is sent as 3072 × 768.").waitFor();
  await page.getByRole("img", { name: "wide.png, 3072 by 768 pixels" }).waitFor();
});

test("a file that is no picture is refused by name", async () => {
  await page.locator("#composer input[type=file]").setInputFiles({ name: "notes.png", mimeType: "image/png", buffer: Buffer.from("text") });
  await page.getByText("notes.png is not a picture that this browser can read.").waitFor();
  assert.equal(await page.locator("#composer img").count(), 0);
});

test("Escape stops an answer: what has come stays, and the worker stops too", async () => {
  await set(page, { temperature: 1, seed: 1, max_tokens: 3500 });
  // A random model ends by chance, often before a key can be pressed.
  const endless = (route) => route.continue({ postData: JSON.stringify({ ...route.request().postDataJSON(), ignore_eos: true }) });
  await page.route("**/v1/chat/completions", endless);
  await say(page, "Go on and on");
  await page.locator(".assistant .prose p:not(.waiting)").first().waitFor();
  await page.keyboard.press("Escape");
  await page.getByText("stopped", { exact: true }).waitFor();
  assert.notEqual((await page.locator(".assistant .prose").textContent()).trim(), "");
  await page.waitForFunction(async () => /_requests_running 0(\.0)?$/m.test(await (await fetch("metrics")).text()));
  await page.unroute("**/v1/chat/completions", endless);
});

test("an answer that is not given says why, and the question comes back", async () => {
  await set(page, { max_tokens: 100000 });
  await drop(page, [PICTURE]);
  await page.getByRole("img", { name: /rings/ }).waitFor();
  await say(page, "Too much");
  const alert = page.getByRole("alert");
  await alert.waitFor();
  assert.match(await alert.textContent(), /context/);
  assert.match(await alert.textContent(), /status 400 · context_length_exceeded/);
  assert.equal(await page.locator("#message").inputValue(), "Too much");
  assert.equal(await page.locator("#composer img").count(), 1);
  assert.equal(await page.locator("#transcript > li").count(), 0);
  await set(page, { max_tokens: 4 });
  await alert.getByRole("button", { name: "Try again" }).click();
  await answered(page);
  assert.equal(await page.locator("#transcript > li").count(), 2);
});

test("a conversation is held with the keyboard alone", async () => {
  const focused = () => page.evaluate(() => document.activeElement.textContent || document.activeElement.id);
  await page.keyboard.press("Tab");
  assert.equal(await focused(), "Skip to the content");
  await page.keyboard.press("Enter");
  await page.keyboard.press("Tab");
  assert.equal(await focused(), "message");
  await page.keyboard.type("One");
  await page.keyboard.press("Shift+Enter");
  await page.keyboard.type("two");
  assert.equal(await page.locator("#message").inputValue(), "One\ntwo");
  const reached = [];
  for (let step = 0; step < 20; step += 1) {
    await page.keyboard.press("Tab");
    reached.push(await focused());
    if (reached.at(-1) === "max-tokens") break;
  }
  assert.deepEqual(reached.slice(0, 4), ["Add pictures", "New chat", "Send", "system"]);
  await page.keyboard.type("5");
  while ((await focused()) !== "Send") await page.keyboard.press("Shift+Tab");
  await page.keyboard.press("Enter");
  await answered(page);
  assert.equal(await focused(), "message");
  assert.match(await page.locator("#announcer").textContent(), /End of the answer/);
});

test("settings stay for the tab, and nothing that was said is stored", async () => {
  await set(page, { temperature: 0, max_tokens: 4, system: "Be brief." });
  await say(page, "A secret");
  await answered(page);
  await page.reload();
  assert.equal(await page.locator("#system").inputValue(), "Be brief.");
  const stored = await page.evaluate(() => JSON.stringify([{ ...sessionStorage }, { ...localStorage }, document.cookie, location.href]));
  assert.doesNotMatch(stored, /secret/);
});

test("what is written in one mode is there when it is shown again", async () => {
  await page.locator("#message").fill("Half a");
  await go(page, "Compare");
  await page.getByRole("heading", { name: "Compare two answers" }).waitFor();
  assert.equal(await page.evaluate(() => document.activeElement.id), "compare-question");
  await page.goBack();
  assert.equal(await page.locator("#message").inputValue(), "Half a");
});
