// What a person does on the page, for the tests.

import { readFileSync } from "node:fs";

/** A small picture. */
export const PICTURE = { name: "rings.png", mimeType: "image/png", buffer: readFileSync(new URL("../parity/fixtures/processors/rgb.png", import.meta.url)) };

/** Shows a mode. */
export async function go(page, mode) {
  await page.getByRole("navigation", { name: "Modes" }).getByRole("link", { name: mode, exact: true }).click();
}

/** Sets fields of the settings. */
export async function set(page, values) {
  for (const [name, value] of Object.entries(values)) await page.locator(`#settings-form [name=${name}]`).fill(String(value));
}

/** Writes a message and sends it. */
export async function say(page, text) {
  await page.locator("#message").fill(text);
  await page.keyboard.press("Enter");
}

/** Waits for the end of the newest answer. */
export async function answered(page) {
  await page.getByRole("button", { name: "Ask again" }).waitFor();
  await page.getByRole("button", { name: "Send" }).waitFor();
}

/** Drops files on the page. */
export async function drop(page, files) {
  const transfer = await page.evaluateHandle((given) => {
    const carried = new DataTransfer();
    for (const { name, mimeType, base64 } of given) {
      const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
      carried.items.add(new File([bytes], name, { type: mimeType }));
    }
    return carried;
  }, files.map(({ name, mimeType, buffer }) => ({ name, mimeType, base64: buffer.toString("base64") })));
  for (const event of ["dragenter", "dragover", "drop"]) await page.dispatchEvent("main", event, { dataTransfer: transfer });
}

/** A PNG of this size. */
export async function pngOf(page, width, height) {
  const url = await page.evaluate(([wide, high]) => {
    const canvas = document.createElement("canvas");
    canvas.width = wide;
    canvas.height = high;
    canvas.getContext("2d").fillRect(0, 0, wide / 2, high);
    return canvas.toDataURL("image/png");
  }, [width, height]);
  return Buffer.from(url.split(",")[1], "base64");
}

/** The JSON body of the next request to a path. */
export async function nextBody(page, path) {
  const request = await page.waitForRequest((each) => new URL(each.url()).pathname === path);
  return JSON.parse(request.postData());
}
