"""What clients ask: requests whose answers are known beforehand, requests that are wrong, and clients that go away."""

import asyncio
import base64
import contextlib
import itertools
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx

from worker import HERE

MEDIA = HERE.parent / "parity/fixtures/cases/media"
# No two runs agree on these.
CHANCE = {"id", "created", "usage", "prefill_tokens"}
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """A request that has one right answer."""

    kind: str
    path: str
    body: dict = field(hash=False)

    def streamed(self) -> "Case":
        return Case("stream", self.path, {**self.body, "stream": True})


@dataclass
class Outcome:
    """What became of a request. Times are seconds."""

    kind: str
    status: int | str
    began: float
    latency: float
    first: float | None = None
    answer: object = None
    retry_after: str | None = None
    fault: str | None = None


def picture(name: str) -> str:
    media_type = {"png": "png", "jpg": "jpeg", "gif": "gif", "webp": "webp"}[name.rsplit(".", 1)[1]]
    return f"data:image/{media_type};base64,{base64.b64encode((MEDIA / name).read_bytes()).decode()}"


def chats(chance: random.Random) -> list[Case]:
    """Text and pictures, greedy and drawn, one sample and several, with beginnings that are shared."""
    subjects = ["a house", "the sea", "seven ships", "a chart with four bars", "nothing at all"]
    cases = []
    for index in range(24):
        text = f"You are a careful reader. Describe {subjects[index % len(subjects)]} in {1 + index // 5} words."
        content: object = text
        if index % 3 == 0:
            images = chance.sample(["square.png", "wide.png", "grey.png", "golden.png"], 1 + index % 2)
            parts = [{"type": "image_url", "image_url": {"url": picture(image)}} for image in images]
            content = [*parts, {"type": "text", "text": text}]
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": chance.choice([8, 16, 24, 40]),
            "temperature": chance.choice([0, 0.7, 1]),
            "top_p": chance.choice([1, 0.9]),
            "seed": index,
            "n": chance.choice([1, 1, 3]),
        }
        cases.append(Case("chat", "/v1/chat/completions", body))
    return cases


def critiques(both_orders: str) -> list[Case]:
    """Comparisons, scores and selections; `both_orders` is what the server calls that field."""
    cases = []
    for index in range(8):
        body = {
            "question": f"How many ships are there in picture {index}?",
            "responses": [f"There are {index} ships.", "I see none: the sea is calm."],
            "images": [picture("square.png")] if index % 2 else [],
            "max_tokens": 12,
            both_orders: index % 4 == 0,
        }
        cases.append(Case("compare", "/v1/critic/compare", body))
    for index in range(2):
        body = {"question": "How many ships?", "response": f"There are {index}.", "images": [picture("grey.png")]}
        cases.append(Case("score", "/v1/critic/score", body))
        critic = {"think": index == 0, "max_tokens": 12}
        body = {"question": "How many ships?", "n": 4, "seed": index, "max_tokens": 8, "selector": "knockout", "critic": critic}
        cases.append(Case("best-of-n", "/v1/critic/best-of-n", body))
    return cases


def wrong() -> list[tuple[str, str, bytes, set[int]]]:
    """Requests that must be refused: method, path, body, statuses that are right."""
    chat, compare = "/v1/chat/completions", "/v1/critic/compare"
    ask = lambda **more: json.dumps({"messages": [{"role": "user", "content": "a"}], **more}).encode()
    look = lambda url: json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}).encode()
    refused = {400, 422}
    return [
        ("POST", chat, b"", refused),
        ("POST", chat, b"{", refused),
        ("POST", chat, b"\xff\xfe", refused),
        ("POST", chat, b"[" * 20_000, refused),
        ("POST", chat, b"{}", refused),
        ("POST", chat, ask(n=0), refused),
        ("POST", chat, ask(n=100_000), refused),
        ("POST", chat, ask(temperature=-1), refused),
        ("POST", chat, ask(max_tokens=10_000_000), refused),
        ("POST", chat, ask(model="other"), {404}),
        ("POST", chat, ask(messages=[{"role": "pirate", "content": "a"}]), refused),
        ("POST", chat, look("file:///etc/passwd"), refused),
        ("POST", chat, look("http://127.0.0.1:9/a.png"), refused),
        ("POST", chat, look("data:image/png;base64,iVBORw0KGgo="), refused),
        ("POST", compare, b'{"question": "q", "responses": []}', refused),
        ("POST", compare, b'{"question": "", "responses": ["a", "b"]}', refused),
        ("GET", chat, b"", {405}),
        ("GET", "/v1/nothing", b"", {404}),
        ("DELETE", "/v1/models", b"", {405}),
    ]


def essence(answer: object) -> object:
    """An answer without what chance decides."""
    if isinstance(answer, dict):
        return {name: essence(value) for name, value in answer.items() if name not in CHANCE}
    if isinstance(answer, list):
        return [essence(value) for value in answer]
    return answer


def same(one: object, other: object) -> bool:
    """Equal, numbers up to rounding."""
    if isinstance(one, float) or isinstance(other, float):
        numbers = isinstance(one, int | float) and isinstance(other, int | float)
        return numbers and abs(one - other) <= TOLERANCE * max(1.0, abs(one), abs(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def texts(answer: dict) -> list:
    """Text and end of each choice of a chat completion, in the order of their indices."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [[choice["message"]["content"], choice["finish_reason"]] for choice in choices]


@contextlib.asynccontextmanager
async def clients(timeout: float, number: int = 32) -> AsyncIterator[list[httpx.AsyncClient]]:
    """Several clients with a pool of connections each: looking for a free one takes a time that grows with the pool."""
    async with contextlib.AsyncExitStack() as stack:
        # Neither TLS nor proxies: the server is on loopback.
        make = lambda: httpx.AsyncClient(timeout=timeout, limits=httpx.Limits(max_connections=None), verify=False, trust_env=False)
        yield [await stack.enter_async_context(make()) for _ in range(number)]


class Client:
    """Asks one server, and says what became of each request; it never raises."""

    def __init__(self, pools: list[httpx.AsyncClient], address: str):
        self._pools = itertools.cycle(pools)
        self.address = address

    @property
    def http(self) -> httpx.AsyncClient:
        """The next pool."""
        return next(self._pools)

    async def ask(self, case: Case) -> Outcome:
        """The whole answer, or the whole stream."""
        read = self._stream if case.kind == "stream" else self._whole
        return await self._timed(case.kind, lambda outcome: read(case, outcome))

    async def refused(self, method: str, path: str, body: bytes, statuses: set[int]) -> Outcome:
        """A wrong request; any other status than those and 429 or 503 is a fault."""

        async def send(outcome: Outcome) -> None:
            headers = {"content-type": "application/json"}
            response = await self.http.request(method, f"{self.address}{path}", content=body, headers=headers)
            self._note(outcome, response)
            if response.status_code not in statuses | {429, 503}:
                outcome.fault = f"{method} {path} with {body[:60]!r} was answered {response.status_code}"
            elif not isinstance(response.json().get("error", {}).get("message"), str):
                outcome.fault = f"{method} {path}: the refusal has no message"

        return await self._timed("wrong", send)

    async def leave(self, case: Case, pieces: int) -> Outcome:
        """Goes away after so many pieces of a long stream."""

        async def send(outcome: Outcome) -> None:
            body = {**case.body, "stream": True, "max_tokens": 1500, "n": 2}
            async with self.http.stream("POST", f"{self.address}{case.path}", json=body) as response:
                self._note(outcome, response)
                left = pieces
                async for line in response.aiter_lines():
                    left -= line.startswith("data:")
                    if left < 0:
                        return

        return await self._timed("cancel", send)

    async def break_off(self) -> Outcome:
        """Sends half a request and closes."""

        async def send(outcome: Outcome) -> None:
            host, port = urlsplit(self.address).netloc.split(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n{\"messages\":")
            await writer.drain()
            writer.close()
            outcome.status = "left"

        return await self._timed("cancel", send)

    async def _timed(self, kind: str, send) -> Outcome:
        outcome = Outcome(kind, "none", time.monotonic(), 0.0)
        try:
            await send(outcome)
        except httpx.TimeoutException:
            outcome.status, outcome.fault = "timeout", f"{kind}: no answer in time"
        except httpx.TransportError as error:
            outcome.status, outcome.fault = "broken", f"{kind}: {type(error).__name__}: {error}"
        except (OSError, ValueError, KeyError) as error:
            outcome.status, outcome.fault = "broken", f"{kind}: {type(error).__name__}: {error}"
        outcome.latency = time.monotonic() - outcome.began
        return outcome

    def _note(self, outcome: Outcome, response: httpx.Response) -> None:
        outcome.status = response.status_code
        outcome.retry_after = response.headers.get("retry-after")

    async def _whole(self, case: Case, outcome: Outcome) -> None:
        response = await self.http.post(f"{self.address}{case.path}", json=case.body)
        self._note(outcome, response)
        if response.status_code == 200:
            answer = response.json()
            outcome.answer = texts(answer) if case.kind == "chat" else essence(answer)

    async def _stream(self, case: Case, outcome: Outcome) -> None:
        async with self.http.stream("POST", f"{self.address}{case.path}", json=case.body) as response:
            self._note(outcome, response)
            if response.status_code != 200:
                await response.aread()
                return
            choices: dict[int, list] = {}
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    outcome.answer = [choices[index] for index in sorted(choices)]
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    outcome.fault = f"stream: {chunk['error'].get('message')}"
                    return
                for choice in chunk["choices"]:
                    outcome.first = outcome.first or time.monotonic() - outcome.began
                    told = choices.setdefault(choice["index"], ["", None])
                    told[0] += choice["delta"].get("content") or ""
                    told[1] = choice["finish_reason"] or told[1]
            if outcome.answer is None:
                outcome.fault = "stream: it ended without [DONE]"


async def known(client: Client, cases: list[Case]) -> dict[int, object]:
    """The answer of each case by its place, asked one after the other."""
    answers = {}
    for place, case in enumerate(cases):
        outcome = await client.ask(case)
        if outcome.status != 200 or outcome.fault:
            raise RuntimeError(f"{case.path} alone was answered {outcome.status} {outcome.fault or ''}: {case.body}")
        answers[place] = outcome.answer
    return answers


async def offered(client: Client) -> tuple[str, set[str]]:
    """What the server calls both orders, and the critic's endpoints that it has."""
    body = {"question": "q", "responses": ["a", "b"], "max_tokens": 1, "both_orders": True}
    response = await client.http.post(f"{client.address}/v1/critic/compare", json=body)
    paths = set()
    for path in ("/v1/critic/score", "/v1/critic/best-of-n"):
        if (await client.http.post(f"{client.address}{path}", json={})).status_code != 404:
            paths.add(path)
    return ("both_orders" if response.status_code == 200 else "swap"), paths | {"/v1/critic/compare"}
