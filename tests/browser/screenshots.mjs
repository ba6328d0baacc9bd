// Pictures of the page over the stand-in, to be looked at: node screenshots.mjs [DIR]

import { mkdirSync } from "node:fs";
import { openPage, startBrowser } from "./browser.mjs";
import { startMock } from "./mock_server.mjs";

const directory = process.argv[2] ?? "screenshots";
mkdirSync(directory, { recursive: true });
const VIEWS = {
  desktop: { viewport: { width: 1280, height: 800 } },
  dark: { viewport: { width: 1280, height: 800 }, colorScheme: "dark" },
  mobile: { viewport: { width: 390, height: 844 }, deviceScaleFactor: 2 },
  tiny: { viewport: { width: 320, height: 640 } },
};

/** Four bars as a PNG. */
async function chart(page) {
  const url = await page.evaluate(() => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 480, height: 300 });
    const context = canvas.getContext("2d");
    context.fillStyle = "#ffffff";
    context.fillRect(0, 0, 480, 300);
    context.font = "18px sans-serif";
    context.textAlign = "center";
    for (const [index, units] of [18, 31, 42, 27].entries()) {
      const x = 90 + 100 * index;
      context.fillStyle = "#5b7fb5";
      context.fillRect(x - 30, 260 - 5 * units, 60, 5 * units);
      context.fillStyle = "#222222";
      context.fillText(`Q${index + 1}`, x, 284);
      context.fillText(String(units), x, 252 - 5 * units);
    }
    return canvas.toDataURL("image/png");
  });
  return Buffer.from(url.split(",")[1], "base64");
}

const mock = await startMock({ pace: 1 });
const browser = await startBrowser();
for (const [view, options] of Object.entries(VIEWS)) {
  const { page, faults, close } = await openPage(browser, mock.address, options);
  const shoot = (name) => page.screenshot({ path: `${directory}/${name}-${view}.png` });
  const go = (mode) => page.getByRole("navigation", { name: "Modes" }).getByRole("link", { name: mode, exact: true }).click();
  await page.getByText("critic-r1-demo").waitFor();
  const buffer = await chart(page);
  const files = ["sales.png", "forecast.png"].map((name) => ({ name, mimeType: "image/png", buffer }));
  await shoot("empty");
  await page.locator("#composer input[type=file]").setInputFiles(files.slice(0, 1));
  await page.getByLabel("Message", { exact: true }).and(page.locator("textarea")).fill("Which quarter sold most, and how much did all four sell together?");
  await shoot("composed");
  await page.keyboard.press("Tab");
  await page.getByRole("button", { name: "Send" }).click();
  await page.getByRole("button", { name: "Ask again" }).waitFor();
  await shoot("chat");
  await page.locator("#n").evaluate((field) => { field.value = "3"; });
  await page.locator("#message").fill("And in hostile markup?");
  await page.keyboard.press("Enter");
  await page.getByRole("radio").nth(2).waitFor();
  await shoot("several");
  await page.locator("#message").fill("Answer with 429");
  await page.keyboard.press("Enter");
  await page.getByRole("alert").waitFor();
  await shoot("overloaded");

  await go("Compare");
  await shoot("compare-empty");
  await page.locator("#compare-form input[type=file]").setInputFiles(files.slice(0, 1));
  await page.locator("#compare-question").fill("Which quarter sold most?");
  await page.locator("#compare-first").fill("The third quarter, with 42 units.");
  await page.locator("#compare-second").fill("The second quarter, with 31 units: its bar is the tallest of the four.");
  await page.getByRole("button", { name: "Compare" }).click();
  await page.getByRole("heading", { name: "Answer 1 is better" }).waitFor();
  await page.evaluate(() => scrollTo(0, 0));
  await page.screenshot({ path: `${directory}/compare-${view}.png`, fullPage: true });

  await go("Best of N");
  await page.locator("#best-question").fill("Which quarter sold most?");
  await page.locator("#best-n").fill("16");
  await page.getByLabel("Ask in both orders").last().check();
  await page.getByLabel("Report every selector").check();
  await page.getByRole("button", { name: "Find the best" }).click();
  await page.getByRole("heading", { name: /is chosen/ }).waitFor();
  await page.locator(".verdict").last().scrollIntoViewIfNeeded();
  await page.locator("#best-result").evaluate((result) => scrollTo(0, result.offsetTop - 80));
  await shoot("bracket");
  await page.getByText("All comparisons as a table").click();
  await page.evaluate(() => scrollTo(0, 0));
  await page.screenshot({ path: `${directory}/best-${view}.png`, fullPage: true });

  await go("Score");
  await page.locator("#score-question").fill("Which quarter sold most?");
  await page.locator("#score-response").fill("The third quarter, with 42 units.");
  await page.getByRole("button", { name: "Score" }).click();
  await page.getByRole("heading", { name: "Score 7.31" }).waitFor();
  await page.screenshot({ path: `${directory}/score-${view}.png`, fullPage: true });
  if (faults.length > 0) throw new Error(`${view}: ${faults.join("; ")}`);
  await close();
}
await browser.close();
mock.stop();
