// Every mode, empty and filled, light and dark: no rule of axe is broken; and it fits narrow and zoomed screens.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { after, before, test } from "node:test";
import { openPage, startBrowser } from "../browser.mjs";
import { startMock } from "../mock_server.mjs";
import { PICTURE, answered, go, say } from "../view.mjs";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

let mock, browser;
before(async () => { [mock, browser] = await Promise.all([startMock({ pace: 1 }), startBrowser()]); });
after(async () => { await browser?.close(); mock?.stop(); });

/** Visits every state of the page and calls `look(state)` in each. */
async function visit(page, look) {
  await page.getByText("critic-r1-demo").waitFor();
  await look("chat, empty");
  await page.locator("#composer input[type=file]").setInputFiles([PICTURE, PICTURE]);
  await page.getByRole("button", { name: /^Remove/ }).nth(1).waitFor();
  await look("chat, with pictures");
  await say(page, "Which quarter?");
  await answered(page);
  await page.getByText("Thought", { exact: true }).click();
  await look("chat, answered");
  await page.locator("#n").evaluate((field) => { field.value = "3"; });
  await say(page, "Again, please");
  await page.getByRole("radio").nth(2).waitFor();
  await look("chat, several answers");
  await say(page, "Answer with 429");
  await page.getByRole("alert").waitFor();
  await look("chat, refused");

  await go(page, "Compare");
  await page.locator("#compare-question").fill("Which quarter? flip");
  await page.locator("#compare-first").fill("Q3");
  await page.locator("#compare-second").fill("Q2");
  await page.getByRole("button", { name: "Compare" }).click();
  await page.getByRole("heading", { name: "Answer 1 is better" }).waitFor();
  await look("compare");

  await go(page, "Best of N");
  await page.locator("#best-question").fill("Which quarter?");
  await page.locator("#best-n").fill("16");
  await page.getByLabel("Ask in both orders").last().check();
  await page.getByLabel("Report every selector").check();
  await page.getByRole("button", { name: "Find the best" }).click();
  await page.getByRole("heading", { name: /is chosen/ }).waitFor();
  await page.getByText("All comparisons as a table").click();
  await page.getByText("All candidates").click();
  await page.locator(".candidates .prose").nth(15).waitFor();
  await look("best of n");

  await go(page, "Score");
  await page.locator("#score-question").fill("Which quarter?");
  await page.locator("#score-response").fill("Q3");
  await page.getByRole("button", { name: "Score" }).click();
  await page.getByRole("heading", { name: "Score 7.31" }).waitFor();
  await look("score");
}

for (const colorScheme of ["light", "dark"]) {
  test(`no rule of axe is broken, ${colorScheme}`, async () => {
    // Only axe itself needs what the policy forbids; chat.test.mjs holds the page to the policy.
    const { page, faults, close } = await openPage(browser, mock.address, { colorScheme, bypassCSP: true, reducedMotion: "reduce" });
    const found = [];
    await visit(page, async (state) => {
      await page.evaluate(AXE);
      const { violations } = await page.evaluate(() => window.axe.run(document, {
        runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
      }));
      for (const { id, nodes } of violations) found.push(`${state}: ${id}: ${nodes.map(({ html, failureSummary }) => `${html} ${failureSummary}`).join("\n")}`);
    });
    await close();
    assert.deepEqual(found, []);
    assert.deepEqual(faults, []);
  });
}

// 320 px is what 1280 px show at 400 %, 640 by 400 what they show at 200 %.
for (const viewport of [{ width: 320, height: 256 }, { width: 320, height: 640 }, { width: 640, height: 400 }, { width: 1280, height: 800 }]) {
  test(`nothing is cut off at ${viewport.width} by ${viewport.height} pixels`, async () => {
    const { page, faults, close } = await openPage(browser, mock.address, { viewport });
    const found = [];
    await visit(page, async (state) => {
      const wide = await page.evaluate(() => {
        const width = document.documentElement.clientWidth;
        const outside = (node) => {
          const box = node.getBoundingClientRect();
          return box.width > 0 && (box.right > width + 1 || box.left < -1) && !node.closest(".scroll, .prose pre, .unseen");
        };
        return [document.documentElement.scrollWidth > width ? "the page scrolls sideways" : null,
          ...[...document.querySelectorAll("main *, header *")].filter(outside).map((node) => `${node.tagName} ${node.className}`)].filter(Boolean);
      });
      if (wide.length > 0) found.push(`${state}: ${wide.join(", ")}`);
    });
    await close();
    assert.deepEqual(found, []);
    assert.deepEqual(faults, []);
  });
}

test("with reduced motion nothing moves", async () => {
  const moving = {};
  for (const reducedMotion of ["no-preference", "reduce"]) {
    const { page, close } = await openPage(browser, mock.address, { reducedMotion });
    await page.getByText("critic-r1-demo").waitFor();
    // Without an answer the page waits for one.
    await page.route("**/v1/chat/completions", () => {});
    await say(page, "Which quarter?");
    moving[reducedMotion] = await page.evaluate(() => document.getAnimations().length);
    await close();
  }
  assert.deepEqual(moving, { "no-preference": 1, reduce: 0 });
});

for (const [purpose, modes] of [["Policy", ["Chat"]], ["Critic", ["Compare", "Score"]], ["Both", ["Chat", "Compare", "Best of N", "Score"]]]) {
  test(`a deployment with purpose ${purpose} shows ${modes.join(", ")}`, async () => {
    const served = await startMock({ purpose });
    const { page, close } = await openPage(browser, served.address);
    await page.getByText("critic-r1-demo").waitFor();
    const shown = await page.getByRole("navigation", { name: "Modes" }).getByRole("link").allTextContents();
    const visible = await page.locator("section.mode").evaluateAll((all) => all.filter((each) => !each.hidden).length);
    await close();
    served.stop();
    assert.deepEqual([shown, visible], [modes, 1]);
  });
}
