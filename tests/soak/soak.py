"""Five times the load that a worker can bear, for minutes: what is accepted is right, what is not is refused, nothing leaks.

    python soak.py --minutes 10 --out out

The exit code is 0 only if every check holds. README.md says what is asked and what is checked.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import httpx

from report import drawing, table
from worker import MODEL, Worker
from workload import Case, Client, Outcome, chats, clients, critiques, known, offered, same, wrong

# Kinds of requests and how often each is asked.
MIX = {"chat": 20, "stream": 30, "critic": 20, "cancel": 15, "wrong": 13, "half": 2}
# Requests of this client that may be under way at once; more are not sent, and counted.
MOST = 600
TIMEOUT = 120.0
# What memory may grow by: allocators keep some, caches fill.
SHARE, MARGIN = 0.15, 48.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float)
    length.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--overload", type=float, default=5, help="times the measured capacity")
    parser.add_argument("--max-queue", type=int, default=32, help="requests that the worker lets wait")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for soak.json, soak.svg and the worker's log")
    return parser.parse_args()


class Soak:
    """One run: what is asked, what came back, what was measured meanwhile."""

    def __init__(self, worker: Worker, client: Client, cases: list[Case], answers: dict[int, object], seed: int):
        self.worker, self.client, self.cases, self.answers = worker, client, cases, answers
        self.chance = random.Random(seed)
        self.outcomes: list[Outcome] = []
        self.samples: list[dict] = []
        self.mismatches: list[str] = []
        self.unsent = 0
        self.checked = 0
        self.wrong = wrong()
        self.places = {
            "chat": [place for place, case in enumerate(cases) if case.kind == "chat"],
            "critic": [place for place, case in enumerate(cases) if case.kind != "chat"],
        }

    async def one(self, kind: str) -> None:
        """Asks one request of a kind and looks at what comes back."""
        if kind == "half":
            outcome = await self.client.break_off()
        elif kind == "wrong":
            outcome = await self.client.refused(*self.chance.choice(self.wrong))
        elif kind == "cancel":
            case = self.cases[self.chance.choice(self.places["chat"])]
            outcome = await self.client.leave(case, self.chance.choice([0, 1, 3, 10]))
        else:
            place = self.chance.choice(self.places["critic" if kind == "critic" else "chat"])
            case = self.cases[place]
            outcome = await self.client.ask(case.streamed() if kind == "stream" else case)
            self.judge(place, outcome)
        self.outcomes.append(outcome)

    def judge(self, place: int, outcome: Outcome) -> None:
        if outcome.status == 200 and outcome.fault is None:
            self.checked += 1
            if not same(outcome.answer, self.answers[place]):
                self.mismatches.append(f"{outcome.kind} {place}: {outcome.answer} instead of {self.answers[place]}")
        elif outcome.status == 429 and outcome.retry_after is None:
            outcome.fault = "429 without Retry-After"
        elif outcome.status not in (200, 429, 503) and outcome.fault is None:
            outcome.fault = f"{outcome.kind} {place} was answered {outcome.status}"

    async def capacity(self, seconds: float) -> float:
        """Requests per second that are answered when 24 clients each wait for their answers."""
        until = time.monotonic() + seconds
        begun, before = time.monotonic(), len(self.outcomes)

        async def closed_loop() -> None:
            while time.monotonic() < until:
                await self.one(self.chance.choices(["chat", "stream", "critic"], [20, 30, 20])[0])

        await asyncio.gather(*(closed_loop() for _ in range(24)))
        answered = sum(outcome.status == 200 for outcome in self.outcomes[before:])
        return answered / (time.monotonic() - begun)

    async def overload(self, rate: float, seconds: float) -> None:
        """Sends so many requests per second, whatever becomes of them, then waits for the last answer."""
        under_way: set[asyncio.Task] = set()
        begun = time.monotonic()
        due = begun
        while (now := time.monotonic()) < begun + seconds:
            while due <= now:
                due += self.chance.expovariate(rate)
                if len(under_way) >= MOST:
                    self.unsent += 1
                    continue
                kind = self.chance.choices(list(MIX), list(MIX.values()))[0]
                task = asyncio.create_task(self.one(kind))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            await asyncio.sleep(min(0.02, max(0.0, due - time.monotonic())))
        if under_way:
            await asyncio.wait(under_way)

    async def watch(self, began: float) -> None:
        """Samples memory and load until it is cancelled."""
        async with httpx.AsyncClient(timeout=10) as http:
            while True:
                gauges = await self.worker.gauges(http)
                self.samples.append({"at": time.monotonic() - began, "resident": self.worker.resident(), **gauges})
                await asyncio.sleep(0.5)

    async def rest(self, within: float = 60) -> dict[str, float]:
        """Waits until nothing runs or waits, at most `within` seconds, then a little; says what the gauges show."""
        async with httpx.AsyncClient(timeout=10) as http:
            until = time.monotonic() + within
            while time.monotonic() < until:
                gauges = await self.worker.gauges(http)
                if not any(gauges.values()):
                    break
                await asyncio.sleep(0.1)
            await asyncio.sleep(2)
            return await self.worker.gauges(http)


def checks(soak: Soak, base: dict, after: dict, seconds: float) -> list[tuple[bool, str]]:
    """What must hold."""
    faults = Counter(outcome.fault for outcome in soak.outcomes if outcome.fault)
    statuses = Counter(outcome.status for outcome in soak.outcomes)
    broken = {status: number for status, number in statuses.items() if isinstance(status, int) and status >= 500 and status != 503}
    overloaded = statuses[429] + statuses[503]
    limit = base["resident"] * (1 + SHARE) + MARGIN
    during = [sample["resident"] for sample in soak.samples]
    fifth = max(1, len(during) // 5)
    early, late = statistics.median(during[fifth:2 * fifth] or during), statistics.median(during[-fifth:])
    return [
        (not broken, f"no status of 500 and above but 503: {broken or 'none'}"),
        (not faults, f"no fault: {dict(faults.most_common(5)) or 'none'}"),
        (not soak.mismatches, f"{soak.checked} accepted answers equal those of single execution: {len(soak.mismatches)} differ"),
        (overloaded > 0, f"the load was more than the worker takes: {overloaded} refused with 429 or 503"),
        (all(after["gauges"].get(name) == base["gauges"].get(name) for name in after["gauges"]),
         f"running, waiting and blocks are back: {base['gauges']} before, {after['gauges']} after"),
        (after["resident"] <= limit, f"memory is back: {base['resident']:.0f} MiB before, {after['resident']:.0f} after, limit {limit:.0f}"),
        (late <= early * (1 + SHARE) + MARGIN, f"memory does not grow: median {early:.0f} MiB in the second fifth of {seconds:.0f} s, {late:.0f} in the last"),
        (after["descriptors"] <= base["descriptors"] + 8, f"connections are closed: {base['descriptors']} descriptors before, {after['descriptors']} after"),
    ]


async def main() -> int:
    asked = arguments()
    seconds = 60 * asked.minutes if asked.minutes else asked.seconds
    asked.out.mkdir(parents=True, exist_ok=True)
    worker = await Worker.start("--max-queue", str(asked.max_queue), model=asked.model, log=asked.out / "worker.log")
    try:
        async with clients(TIMEOUT) as pools:
            await worker.ready(pools[0], within=120)
            client = Client(pools, worker.address)
            both_orders, paths = await offered(client)
            cases = chats(random.Random(asked.seed)) + [case for case in critiques(both_orders) if case.path in paths]
            soak = Soak(worker, client, cases, await known(client, cases), asked.seed)
            print(f"{len(cases)} requests answered one by one; endpoints of the critic: {', '.join(sorted(paths))}")
            capacity = await soak.capacity(min(20.0, max(5.0, seconds / 10)))
            rate = asked.overload * capacity
            print(f"capacity {capacity:.1f} requests/s; {rate:.0f} requests/s for {seconds:.0f} s")
        base = {"gauges": await soak.rest(), "resident": worker.resident(), "descriptors": worker.descriptors()}
        began, first = time.monotonic(), len(soak.outcomes)
        watching = asyncio.create_task(soak.watch(began))
        async with clients(TIMEOUT) as pools:
            soak.client = Client(pools, worker.address)
            await soak.overload(rate, seconds)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        after = {"gauges": await soak.rest(), "resident": worker.resident(), "descriptors": worker.descriptors()}
    finally:
        code = await worker.stop()
    loaded = soak.outcomes[first:]
    drawing(soak.samples, loaded, began, asked.out / "soak.svg")
    results = checks(soak, base, after, seconds) + [(code in (0, 143), f"the worker stopped when asked: exit code {code}")]
    print(table(loaded))
    print(f"offered {len(loaded) / seconds:.0f} requests/s, {soak.unsent} more not sent: {MOST} were under way")
    for holds, text in results:
        print("ok    " if holds else "FAILED", text)
    for mismatch in soak.mismatches[:3]:
        print("       ", mismatch)
    (asked.out / "soak.json").write_text(json.dumps({
        "seconds": seconds, "capacity": capacity, "rate": rate, "base": base, "after": after, "samples": soak.samples,
        "checks": [{"holds": holds, "what": text} for holds, text in results], "mismatches": soak.mismatches[:100],
        "statuses": {str(status): number for status, number in Counter(outcome.status for outcome in loaded).items()},
    }, indent=1))
    failed = sum(not holds for holds, _ in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
