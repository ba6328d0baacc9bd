// The real worker over the tiny checkpoint, on a free port of loopback.

import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const BUILT = join(process.env.CARGO_TARGET_DIR ?? join(homedir(), ".cache/flotilla/target"), "debug/flotilla-worker");
const MODEL = fileURLToPath(new URL("../parity/fixtures/tiny-qwen2.5-vl", import.meta.url));
const PATIENCE = 60_000;

/** Starts `flotilla-worker serve` with more arguments, and waits until it is ready. FLOTILLA_WORKER names the program. */
export async function startWorker(...more) {
  const program = process.env.FLOTILLA_WORKER ?? BUILT;
  if (!existsSync(program)) throw new Error(`${program} is not there: make build, or set FLOTILLA_WORKER`);
  const child = spawn(program, ["serve", "--model", MODEL, "--listen", "127.0.0.1:0", "--served-model-name", "tiny", ...more], { stdio: ["ignore", "pipe", "pipe"] });
  let log = "";
  child.stderr.on("data", (chunk) => { log = (log + chunk).slice(-20_000); });
  const ended = new Promise((resolve) => { child.on("exit", resolve); });
  const address = await new Promise((resolve, reject) => {
    let said = "";
    child.stdout.on("data", (chunk) => {
      said += chunk;
      const found = /listening on (http:\S+)/.exec(said);
      if (found) resolve(found[1]);
    });
    ended.then((code) => reject(new Error(`the worker ended with ${code}: ${log}`)));
  });
  const until = Date.now() + PATIENCE;
  while (!(await fetch(`${address}/readyz`).catch(() => ({}))).ok) {
    if (Date.now() > until) throw new Error(`the worker is not ready: ${log}`);
    await new Promise((resolve) => { setTimeout(resolve, 50); });
  }
  return {
    address,
    /** The JSON that answers a POST. */
    async post(path, body, headers = {}) {
      const response = await fetch(`${address}${path}`, { method: "POST", headers: { "content-type": "application/json", ...headers }, body: JSON.stringify(body) });
      return response.json();
    },
    /** The value of a gauge or counter of /metrics without labels. */
    async metric(name) {
      const text = await (await fetch(`${address}/metrics`)).text();
      const line = text.split("\n").find((each) => each.startsWith(`${name} `));
      return line === undefined ? null : Number(line.split(" ")[1]);
    },
    async stop() {
      child.kill("SIGKILL");
      await ended;
    },
  };
}
