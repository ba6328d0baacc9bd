// Chromium for the tests: where it is, and a page that notes what it must not do.

import { existsSync } from "node:fs";
import { chromium } from "playwright-core";

const KNOWN = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];

/** Starts Chromium; FLOTILLA_CHROMIUM names another one. */
export async function startBrowser() {
  const executablePath = process.env.FLOTILLA_CHROMIUM ?? KNOWN.find((path) => existsSync(path));
  if (executablePath === undefined) throw new Error("no Chromium found: apt-get install chromium, or set FLOTILLA_CHROMIUM");
  return chromium.launch({
    executablePath,
    headless: true,
    args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
  });
}

/** A page at `address`, with `faults`: errors of scripts, of the console and of the content security policy, and requests to
 * other hosts. Statuses and broken streams, which tests provoke, are not faults. */
export async function openPage(browser, address, { path = "", ...options } = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, ...options });
  const page = await context.newPage();
  const faults = [];
  page.on("pageerror", (error) => faults.push(`script: ${error.message}`));
  page.on("console", (message) => {
    const provoked = /^Failed to load resource: (the server responded with a status of|net::ERR_INCOMPLETE_CHUNKED_ENCODING)/.test(message.text());
    if (["error", "warning"].includes(message.type()) && !provoked) faults.push(`console: ${message.text()}`);
  });
  page.on("request", (request) => {
    const url = request.url();
    if (!url.startsWith(`${address}/`) && !url.startsWith("data:") && !url.startsWith("blob:")) faults.push(`request: ${url}`);
  });
  await page.addInitScript(() => {
    addEventListener("securitypolicyviolation", (event) => {
      console.error(`content security policy: ${event.violatedDirective} ${event.blockedURI} ${event.sample}`);
    });
  });
  await page.goto(`${address}/${path}`);
  return { page, faults, close: () => context.close() };
}
