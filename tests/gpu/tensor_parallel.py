"""A server of several GPUs beside one of a single GPU, as their clients see them.

    python tests/gpu/tensor_parallel.py ~/.cache/flotilla/target/cuda/flotilla-worker tests/parity/fixtures/tiny-qwen2.5-vl

Greedy answers must be the same, with pictures and without; a rank that is killed ends the server with its name; ranks end with
a server that is killed; SIGTERM lets answers end. Needs two GPUs, CUDA 13's libraries, NCCL and nothing of Python's besides
itself. The exit code is 0 only if every check holds, or where there are too few GPUs to check anything.
"""

import argparse
import base64
import concurrent.futures
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path



def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("worker", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--size", type=int, default=2, help="GPUs that share the model")
    parser.add_argument("--dtype", default="f32", help="format in which answers are compared: in bf16 random weights may differ")
    parser.add_argument("--measure", default="", metavar="DTYPE", help="tokens per second of both servers in this format, besides")
    parser.add_argument("--only-answers", action="store_true", help="kill nothing")
    parser.add_argument("--only-measure", action="store_true", help="compare nothing")
    parser.add_argument("--not-alone", action="store_true", help="measure no server of one GPU: it cannot hold the model")
    parser.add_argument("--start-seconds", type=float, default=120, help="after which a server that is not ready has failed")
    return parser.parse_args()


def picture(width: int, height: int) -> str:
    """A grey ramp as a data URL."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + bytes((3 * x + 5 * y) % 256 for x in range(width)) for y in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()


def chat(content: object, tokens: int, **fields: object) -> dict:
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "logprobs": True, **fields}


def requests() -> list[dict]:
    image = {"type": "image_url", "image_url": {"url": picture(140, 84)}}
    other = {"type": "image_url", "image_url": {"url": picture(56, 112)}}
    text = {"type": "text", "text": "What digit is this?"}
    long = "Seven ships sail on the sea. " * 12
    return [
        chat("Hello", 24),
        chat(long, 40),
        chat([image, text], 24),
        chat([image, other, {"type": "text", "text": long}], 32),
        chat([image, text], 24, n=4, temperature=1.0, seed=7),
    ]


class Server:
    """A process of `flotilla-worker serve` and what it said."""

    def __init__(self, asked: argparse.Namespace, size: int, dtype: str):
        self.log = tempfile.NamedTemporaryFile("w+", suffix=f".{size}.log")
        command = [asked.worker, "serve", "--model", asked.model, "--listen", "127.0.0.1:0", "--device", "cuda"]
        command += ["--dtype", dtype, "--tensor-parallel", str(size)]
        self.patience = asked.start_seconds
        self.begun = time.monotonic()
        self.process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=self.log, text=True)
        line = self.process.stdout.readline()
        if not line.startswith("listening on "):
            raise SystemExit(f"no server: {line}{self.said()}")
        self.url = line.split()[-1]

    def said(self) -> str:
        return Path(self.log.name).read_text()

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def ready(self) -> float:
        """Seconds from the start."""
        while self.get("/readyz")[0] != 200:
            if self.process.poll() is not None or time.monotonic() - self.begun > self.patience:
                raise SystemExit(f"not ready, exit code {self.process.poll()}:\n{self.said()}")
            time.sleep(0.05)
        return time.monotonic() - self.begun

    def ask(self, body: dict) -> dict:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + "/v1/chat/completions", data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def ranks(self) -> list[int]:
        """Process ids of the other ranks."""
        return [int(pid) for pid in re.findall(r"started a rank .*?pid=(\d+)", re.sub(r"\x1b\[[0-9;]*m", "", self.said()))]

    def end(self, sign: int = signal.SIGTERM, within: float = 60.0) -> int:
        self.process.send_signal(sign)
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return -1000


# What ranks know each other by: 32 bytes.
SECRET = re.compile(r"[0-9a-f]{64}")


def process(pid: int, what: str) -> str:
    """Arguments or environment of a process."""
    return Path(f"/proc/{pid}/{what}").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()


def alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def gone(pids: list[int], within: float) -> float:
    """Seconds until none of the processes is there."""
    begun = time.monotonic()
    while any(alive(pid) for pid in pids) and time.monotonic() - begun < within:
        time.sleep(0.02)
    return time.monotonic() - begun


class Checks:
    def __init__(self) -> None:
        self.failed = 0

    def hold(self, holds: bool, text: str) -> None:
        print("ok     " if holds else "FAILED ", text, flush=True)
        self.failed += not holds


def tokens(answer: dict) -> list[list[tuple[str, float]]]:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [[(token["token"], token["logprob"]) for token in choice["logprobs"]["content"]] for choice in choices]


def compare(checks: Checks, bodies: list[dict], one: list[dict], several: list[dict], size: int) -> None:
    for body, first, second in zip(bodies, map(tokens, one), map(tokens, several)):
        pairs = [pair for a, b in zip(first, second) for pair in zip(a, b)]
        same = all(a[0] == b[0] for a, b in pairs) and [*map(len, first)] == [*map(len, second)]
        apart = max(abs(a[1] - b[1]) for a, b in pairs)
        content = body["messages"][0]["content"]
        kind = "text" if isinstance(content, str) else f"{len(content) - 1} pictures"
        samples = f"{len(first)} samples" if len(first) > 1 else "greedy"
        checks.hold(same and apart < 1e-2, f"{kind}, {samples}: {len(pairs)} tokens of {size} GPUs are those of one, "
                    f"log-probabilities at most {apart:.1e} apart")


def answers(checks: Checks, asked: argparse.Namespace) -> None:
    bodies, found = requests(), []
    for size in (1, asked.size):
        server = Server(asked, size, asked.dtype)
        seconds = server.ready()
        found.append([server.ask(body) for body in bodies])
        again = [server.ask(body) for body in bodies]
        # Prefixes that are read from the cache the second time round otherwise.
        drawn = [[[token for token, _ in choice] for answer in part for choice in tokens(answer)] for part in (found[-1], again)]
        checks.hold(drawn[0] == drawn[1] or asked.dtype != "f32", f"{size} GPUs repeat themselves")
        if size > 1:
            progress = server.get("/progress")[1]
            checks.hold(f"cuda:{size - 1}" in progress, f"the progress says where it runs: {progress[:160]}")
            ranks = server.ranks()
            checks.hold(len(ranks) == size - 1 and all(map(alive, ranks)), f"ranks run as {ranks}")
            shown = [process(pid, "cmdline") for pid in ranks]
            told = [part for pid in ranks for part in (process(pid, "cmdline"), process(pid, "environ"))]
            checks.hold("--rank 1" in shown[0], f"processes are shown as: {shown}")
            checks.hold(not any(SECRET.search(part) for part in told), "neither arguments nor environment show the secret")
            ended, code = drained(server), server.process.returncode
            checks.hold(ended and code == 0, f"SIGTERM: the answer that had begun came to its end: {ended}, exit code {code}")
            checks.hold(gone(ranks, 10) < 10, "the other ranks ended too")
        else:
            server.end()
        print(f"        {size} GPUs: ready after {seconds:.1f} s", flush=True)
    compare(checks, bodies, *found, asked.size)


def drained(server: Server) -> bool:
    """Whether an answer that runs when SIGTERM comes, also to the other ranks, ends well."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.ask, chat("Hello", 3500))
        time.sleep(0.15)
        begun = not running.done()
        for pid in server.ranks():
            os.kill(pid, signal.SIGTERM)
        server.end()
        try:
            usage = running.result()["usage"]
            print(f"        it ran on when SIGTERM came: {begun}; {usage}")
            return begun and usage["completion_tokens"] == 3500
        except OSError as error:
            print(f"        {error}")
            return False


def killed(checks: Checks, asked: argparse.Namespace) -> None:
    for busy in (False, True):
        server = Server(asked, asked.size, asked.dtype)
        server.ready()
        ranks = server.ranks()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.ask, chat("Hello", 3500)) if busy else None
            time.sleep(0.15)
            if running and running.done():
                print("        it computed nothing any more:", running.exception() or running.result()["usage"])
            os.kill(ranks[-1], signal.SIGKILL)
            begun = time.monotonic()
            try:
                code = server.process.wait(30)
            except subprocess.TimeoutExpired:
                code = None
                server.process.kill()
            seconds = time.monotonic() - begun
            if running:
                running.exception()
        named = [line for line in server.said().splitlines() if f"rank {asked.size - 1}" in line and "SIGKILL" in line]
        what = "while it computed" if busy else "without work"
        if seconds > 4:
            print(server.said()[-3000:])
        checks.hold(code == 1 and bool(named) and seconds < 4, f"a rank was killed {what}: exit code {code} after {seconds:.2f} s; "
                    f"{named[-1:] or server.said()[-600:]}")
        checks.hold(gone(ranks, 10) < 10, "no rank was left")
    for what in ("without work", "while it computed", "while it loaded"):
        server = Server(asked, asked.size, asked.dtype)
        if what == "while it loaded":
            ranks = started(server, asked.size)
        else:
            server.ready()
            ranks = server.ranks()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.ask, chat("Hello", 3500)) if what == "while it computed" else None
            time.sleep(0.15)
            server.end(signal.SIGKILL)
            seconds = gone(ranks, 20)
            if running:
                running.exception()
        checks.hold(bool(ranks) and seconds < 20, f"the server was killed {what}: the other ranks ended after {seconds:.2f} s")
    server = Server(asked, asked.size, asked.dtype)
    ranks = started(server, asked.size)
    os.kill(ranks[-1], signal.SIGKILL)
    try:
        code = server.process.wait(60)
    except subprocess.TimeoutExpired:
        code = server.end(signal.SIGKILL)
    named = [line for line in server.said().splitlines() if f"rank {asked.size - 1}" in line and "SIGKILL" in line]
    checks.hold(code == 1 and bool(named), f"a rank was killed while it loaded: exit code {code}; {named[-1:] or server.said()[-600:]}")
    checks.hold(gone(ranks, 10) < 10, "no rank was left")


def started(server: Server, size: int) -> list[int]:
    """Process ids of the other ranks, as soon as all have been started."""
    while len(server.ranks()) < size - 1 and server.process.poll() is None and time.monotonic() - server.begun < server.patience:
        time.sleep(0.01)
    return server.ranks()


def refused(checks: Checks, asked: argparse.Namespace, cards: int) -> None:
    command = [asked.worker, "serve", "--model", asked.model, "--listen", "127.0.0.1:0", "--device", "cuda"]
    wrong = {"too many GPUs": ["--tensor-parallel", "8"], "f16": ["--tensor-parallel", "2", "--dtype", "f16"]}
    if cards >= 8:
        del wrong["too many GPUs"]
    for what, flags in wrong.items():
        ran = subprocess.run([*map(str, command), *flags], capture_output=True, text=True, timeout=60)
        last = ran.stderr.strip().splitlines()[-1:]
        checks.hold(ran.returncode == 78, f"{what}: exit code {ran.returncode}, {last}")


def measure(asked: argparse.Namespace) -> None:
    print(f"\n{asked.model} in {asked.measure}: tokens per second through HTTP, greedy, 256 tokens each")
    print(f"{'GPUs':>4} {'ready s':>8} {'1 at once':>10} {'8':>10} {'32':>10}")
    for size in (asked.size,) if asked.not_alone else (1, asked.size):
        server = Server(asked, size, asked.measure)
        seconds, rates = server.ready(), []
        body = chat("Seven ships sail on the sea. " * 8, 256)
        body["logprobs"] = False
        for count in (1, 8, 32):
            with concurrent.futures.ThreadPoolExecutor(count) as pool:
                # Kernels are compiled and graphs recorded by the first.
                for timed in (False, True):
                    begun = time.monotonic()
                    drawn = sum(answer["usage"]["completion_tokens"] for answer in pool.map(server.ask, [body] * count))
                    spent = time.monotonic() - begun
            rates.append(drawn / spent)
        server.end()
        print(f"{size:>4} {seconds:>8.1f} " + " ".join(f"{rate:>10.1f}" for rate in rates), flush=True)


def main() -> int:
    asked = arguments()
    looked = subprocess.run([asked.worker, "doctor", "--quick", "--json"], capture_output=True, text=True)
    cards = len(json.loads(looked.stdout)["driver"]["cards"])
    if cards < asked.size:
        print(f"{cards} GPUs here: nothing of {asked.size} was checked")
        return 0
    checks = Checks()
    if not asked.only_measure:
        answers(checks, asked)
    if not asked.only_measure and not asked.only_answers:
        refused(checks, asked, cards)
        killed(checks, asked)
    if asked.measure:
        measure(asked)
    print(f"{checks.failed} checks failed" if checks.failed else "all checks hold")
    return int(checks.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
