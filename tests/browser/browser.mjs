// Chromium for the tests: where it is, and a page that notes what it must not do.

import { existsSync, readFileSync } from "node:fs";
import { chromium } from "playwright-core";

const PAGE = new URL("../../worker/src/http/page/", import.meta.url);

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
  page.on("response", (response) => {
    const ofPage = /^\/($|page\/)/.test(new URL(response.url()).pathname);
    if (ofPage && response.status() >= 400) faults.push(`file: ${response.status()} ${response.url()}`);
  });
  await page.addInitScript(() => {
    addEventListener("securitypolicyviolation", (event) => {
      console.error(`content security policy: ${event.violatedDirective} ${event.blockedURI} ${event.sample}`);
    });
  });
  if (process.env.FLOTILLA_PAGE_FROM_DISK) await fromDisk(page, address);
  await page.goto(`${address}/${path}`);
  return { page, faults, close: () => context.close() };
}

/** The page's files as they are on disk, with the headers that the server sends: while they are written no build is needed. */
async function fromDisk(page, address) {
  await page.route((url) => url.origin === address && /^\/($|page\/[\w.]+$)/.test(url.pathname), async (route) => {
    const name = new URL(route.request().url()).pathname.replace(/^\/(page\/)?/, "") || "index.html";
    await route.fulfill({ response: await route.fetch(), body: readFileSync(new URL(name, PAGE)) });
  });
}
