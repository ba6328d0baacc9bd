"""A worker that is killed while it answers: clients are told at once, and the next one is there soon and says the same.

    python kill.py --rounds 3

The exit code is 0 only if every check holds.
"""

import argparse
import asyncio
import random
import sys
import time
from pathlib import Path

from worker import MODEL, Worker
from workload import Case, Client, Outcome, chats, clients, critiques, known, offered, same

TIMEOUT = 60.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=24, help="streams that are open when it is killed")
    parser.add_argument("--told-within", type=float, default=2, help="seconds from the kill to the last client's error")
    parser.add_argument("--ready-within", type=float, default=20, help="seconds from the start to readiness")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the worker's log")
    return parser.parse_args()


class Round:
    """One worker's life: it answers, it is killed, it is started again on the same port."""

    def __init__(self, asked: argparse.Namespace):
        self.asked = asked
        self.failures: list[str] = []

    def hold(self, holds: bool, text: str) -> None:
        print("  ok    " if holds else "  FAILED", text)
        if not holds:
            self.failures.append(text)

    async def play(self, worker: Worker, cases: list[Case], answers: dict[int, object], chance: random.Random) -> Worker:
        """Gives the worker that was started after the kill."""
        async with clients(TIMEOUT) as pools:
            client = Client(pools, worker.address)
            long = [self.long(case) for case in cases if case.kind == "chat"]
            tasks = [asyncio.create_task(client.ask(chance.choice(long).streamed())) for _ in range(self.asked.streams)]
            tasks += [asyncio.create_task(client.ask(chance.choice(long))) for _ in range(4)]
            await asyncio.sleep(chance.uniform(0.4, 1.2))
            pending = [task for task in tasks if not task.done()]
            worker.kill()
            killed = time.monotonic()
            _, hanging = await asyncio.wait(pending, timeout=self.asked.told_within)
            told = time.monotonic() - killed
            for task in hanging:
                task.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)
            await worker.end()
        ended: list[Outcome] = [task.result() for task in pending if task not in hanging]
        begun = sum(outcome.first is not None for outcome in ended)
        self.hold(len(pending) >= self.asked.streams // 2, f"{len(pending)} requests were open when it was killed, {begun} streams among them had begun")
        self.hold(not hanging, f"every client was told within {told:.3f} s: {len(hanging)} hang")
        # Its last bytes may have been on their way when the worker was killed.
        whole = [outcome for outcome in ended if outcome.status == 200 and outcome.fault is None and all(end for _, end in outcome.answer)]
        wrong = [outcome.fault for outcome in ended if outcome.status != "broken" and outcome not in whole]
        self.hold(not wrong and len(whole) < len(ended), f"{len(ended) - len(whole)} were told that the connection broke, "
                  f"{len(whole)} had their last byte, nobody else took an answer for whole: {wrong or 'none'}")
        return await self.again(worker.port, cases, answers)

    @staticmethod
    def long(case: Case) -> Case:
        return Case(case.kind, case.path, {**case.body, "max_tokens": 2000, "n": 1, "temperature": 1, "ignore_eos": True})

    async def again(self, port: int, cases: list[Case], answers: dict[int, object]) -> Worker:
        begun = time.monotonic()
        worker = await Worker.start(model=self.asked.model, port=port, log=self.asked.out / "worker.log")
        async with clients(TIMEOUT, number=1) as pools:
            try:
                await worker.ready(pools[0], within=self.asked.ready_within)
                self.hold(True, f"it is ready again, on the same port, after {time.monotonic() - begun:.2f} s, limit {self.asked.ready_within:.0f} s")
            except TimeoutError as error:
                self.hold(False, str(error))
                return worker
            found = await known(Client(pools, worker.address), cases)
        differ = [place for place in answers if not same(found[place], answers[place])]
        self.hold(not differ, f"{len(answers)} answers equal those before the kill: {len(differ)} differ")
        return worker


async def main() -> int:
    asked = arguments()
    asked.out.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    begun = time.monotonic()
    worker = await Worker.start(model=asked.model, log=asked.out / "worker.log")
    rounds = [Round(asked) for _ in range(asked.rounds)]
    try:
        async with clients(TIMEOUT, number=1) as pools:
            await worker.ready(pools[0], within=120)
            print(f"first start: ready after {time.monotonic() - begun:.2f} s")
            client = Client(pools, worker.address)
            both_orders, paths = await offered(client)
            cases = (chats(random.Random(0)) + [case for case in critiques(both_orders) if case.path in paths])[::2]
            answers = await known(client, cases)
        for number, one in enumerate(rounds, start=1):
            print(f"round {number}")
            worker = await one.play(worker, cases, answers, chance)
            if one.failures:
                break
    finally:
        await worker.stop()
    failed = sum(len(one.failures) for one in rounds)
    print(f"{len(rounds) - sum(bool(one.failures) for one in rounds)} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
