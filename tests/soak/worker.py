"""The real worker as a process: started on a free port, watched from outside, killed."""

import asyncio
import os
import re
import signal
import time
from pathlib import Path

import httpx

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "parity/fixtures/tiny-qwen2.5-vl"


def program() -> Path:
    """FLOTILLA_WORKER, else what `make build` leaves."""
    target = os.environ.get("CARGO_TARGET_DIR", str(Path.home() / ".cache/flotilla/target"))
    return Path(os.environ.get("FLOTILLA_WORKER", f"{target}/debug/flotilla-worker"))


class Worker:
    """A running `flotilla-worker serve`."""

    def __init__(self, process: asyncio.subprocess.Process, address: str, log):
        self.process = process
        self.address = address
        self._log = log

    @classmethod
    async def start(cls, *arguments: str, model: Path = MODEL, port: int = 0, log: Path | None = None) -> "Worker":
        """Starts it; returns when it has printed its address, which is before the model is loaded."""
        opened = open(log or os.devnull, "ab")
        process = await asyncio.create_subprocess_exec(
            program(), "serve", "--model", model, "--listen", f"127.0.0.1:{port}", "--served-model-name", "tiny",
            *arguments, stdout=asyncio.subprocess.PIPE, stderr=opened,
        )
        while line := (await process.stdout.readline()).decode():
            if found := re.search(r"listening on (http:\S+)", line):
                return cls(process, found[1], opened)
        raise RuntimeError(f"the worker ended with {await process.wait()}; its log: {log}")

    @property
    def port(self) -> int:
        return int(self.address.rsplit(":", 1)[1])

    async def ready(self, client: httpx.AsyncClient, within: float) -> float:
        """Waits until it is ready, at most `within` seconds; says how many it took."""
        begun = time.monotonic()
        while time.monotonic() - begun < within:
            try:
                if (await client.get(f"{self.address}/readyz")).status_code == 200:
                    return time.monotonic() - begun
            except httpx.TransportError:
                pass
            if self.process.returncode is not None:
                raise RuntimeError(f"the worker ended with {self.process.returncode}")
            await asyncio.sleep(0.01)
        raise TimeoutError(f"the worker is not ready after {within} s")

    def resident(self) -> float:
        """Resident memory, MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024

    def descriptors(self) -> int:
        """Open files and sockets."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    async def gauges(self, client: httpx.AsyncClient) -> dict[str, float]:
        """`running`, `waiting` and `blocks`, as far as /metrics has them, by whatever prefix."""
        text = (await client.get(f"{self.address}/metrics")).text
        found = {}
        for line in text.splitlines():
            name, _, value = line.partition(" ")
            name = name.split("{")[0]
            for gauge, pattern in {
                "running": r"(num_requests|num_sequences)_running$",
                "waiting": r"num_requests_waiting$",
                "blocks": r"kv_(cache_usage_perc|blocks_used)$",
            }.items():
                if re.search(pattern, name):
                    found[gauge] = found.get(gauge, 0.0) + float(value)
        return found

    def kill(self) -> None:
        """SIGKILL: nothing of it runs any more."""
        self.process.send_signal(signal.SIGKILL)

    async def end(self) -> int:
        """Waits for the end of a process that was killed or stopped."""
        code = await self.process.wait()
        self._log.close()
        return code

    async def stop(self) -> int:
        """SIGTERM, and after 40 seconds SIGKILL."""
        if self.process.returncode is None:
            self.process.terminate()
            try:
                await asyncio.wait_for(self.process.wait(), 40)
            except TimeoutError:
                self.kill()
        return await self.end()
