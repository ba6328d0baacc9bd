"""How long a server takes to be ready, and what its first requests wait for: once with an empty folder for kernels, once with a used one.

    python tests/gpu/random_checkpoint.py 7b tests/parity/fixtures/tiny-qwen2.5-vl /tmp/7b --layers 2
    python tests/gpu/first_requests.py ~/.cache/flotilla/target/cuda/flotilla-worker /tmp/7b

Needs nothing of Python's besides itself. Seconds until the server is ready include the reading of the model and its first steps.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

# Requests at once, one wave after the other.
WAVES = (1, 1, 1, 8, 8, 32, 32)


def is_ready(url: str) -> bool:
    try:
        return urllib.request.urlopen(url + "/readyz", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def ask(url: str) -> float:
    """Seconds of one answer of 64 tokens."""
    message = {"role": "user", "content": "Seven ships sail on the sea. " * 8}
    body = {"messages": [message], "max_tokens": 64, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    begun = time.monotonic()
    json.load(urllib.request.urlopen(request, timeout=300))
    return time.monotonic() - begun


def measure(asked: argparse.Namespace, folder: str, what: str) -> None:
    command = [asked.worker, "serve", "--model", asked.model, "--listen", "127.0.0.1:0", "--device", asked.device]
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        environment = {**os.environ, "FLOTILLA_KERNEL_CACHE": folder}
        server = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        line = server.stdout.readline()
        while line and server.poll() is None and not is_ready(line.split()[-1]):
            time.sleep(0.05)
        if not line or server.poll() is not None:
            log.seek(0)
            raise SystemExit(f"no server, exit code {server.wait()}:\n{log.read()}")
        print(f"{what}: ready after {time.monotonic() - begun:.1f} s", flush=True)
        for count in WAVES:
            with concurrent.futures.ThreadPoolExecutor(count) as pool:
                slowest = max(pool.map(ask, [line.split()[-1]] * count))
            print(f"  {count:>2} at once: the slowest took {slowest:.3f} s", flush=True)
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("worker", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o700)
        measure(asked, folder, "nothing kept")
        measure(asked, folder, "kept")


if __name__ == "__main__":
    sys.exit(main())
