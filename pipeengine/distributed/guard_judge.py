"""Who is to blame: heard from every worker's guard, said once. Needs the standard library alone."""
from __future__ import annotations

import signal
import time
from collections.abc import Callable

from pipeengine.distributed.guard_watch import TICK

_GRACE = 0.5        # seconds that one who has left stays unblamed: others may be about to leave too


def silence_limit(settings: dict) -> float:
    """Seconds without a word after which a guard, its machine or the way to it counts as lost: those after which a
    stopped process counts as frozen, and two beats, for packets that are sent again."""
    return float(settings["frozen"] + 2 * settings["beat"])


def how_ended(code: int | None, where: str) -> str:
    """Of a worker that ended with exit ``code`` (None where that is not known) while it was ``where``."""
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -9 else "")
    else:
        how = "died" if code is None else f"died with exit code {code}"
    return how + placed(where)


def placed(where: str) -> str:
    """Where something happened, to follow what it was."""
    return f" {where}" if where.startswith("outside") else f" in {where}" if where else ""


class Judge:
    """Worker 0's: hears of all workers, and says once who is to blame. ``tell`` sends its verdict to every worker."""

    def __init__(self, size: int, settings: dict, tell: Callable[[dict], None]):
        self._size, self._settings, self._tell = size, settings, tell
        self._state: dict[int, dict] = {}
        self._heard: dict[int, float] = {}
        self._gone: dict[int, tuple[float, dict]] = {}
        self.verdict: dict | None = None
        self._start = self._last = time.monotonic()

    def hear(self, rank: int, message: dict) -> None:
        """A message of worker ``rank``'s guard."""
        self._heard[rank] = time.monotonic()
        if "beat" in message:
            self._state[rank] = message["beat"]
        elif "failed" in message:
            self._decide({"kind": "failed", "rank": rank, **message["failed"]})
        elif "ended" in message:
            self._end(rank, message["ended"])
        elif "closed" in message:
            self._gone.setdefault(rank, (time.monotonic(), {"kind": "closed", "rank": rank, "what":
                                                            "has closed its pipeline or let it go"}))

    def lost(self, rank: int) -> None:
        """The connection to worker ``rank``'s guard has broken: unless it had said good-bye, it is dead."""
        if rank not in self._gone:
            self._decide({"kind": "died", "rank": rank, "what": "died: its guard's connection broke" + self._at(rank)})

    def _end(self, rank: int, ending: dict) -> None:
        code, left = ending["code"], ending["left"]
        if left and not code:
            told = {"kind": "left", "rank": rank, "what": "has left: its script has ended"}
            self._gone.setdefault(rank, (time.monotonic(), told))
            return
        self._gone.setdefault(rank, (time.monotonic(), {}))
        where = ending["where"] or self._state.get(rank, {}).get("where", "")
        self._decide({"kind": "died", "rank": rank, "what": how_ended(code, where)})

    def _at(self, rank: int) -> str:
        return placed(self._state.get(rank, {}).get("where", ""))

    def judge(self) -> None:
        """Look at what is known; called several times a second."""
        now = time.monotonic()
        if now - self._last > 8 * TICK:            # this process was stopped: nobody else is to blame for the silence
            self._heard = dict.fromkeys(self._heard, now)
        self._last = now
        if self.verdict is not None:
            return
        for since, told in self._gone.values():
            if told and now - since > _GRACE and len(self._gone) < self._size:
                return self._decide(told)
        present = {rank: state for rank, state in self._state.items() if rank not in self._gone}
        for rank, heard in self._heard.items():
            if rank not in self._gone and now - heard > silence_limit(self._settings) and self._settings["judges"]:
                return self._decide({"kind": "frozen", "rank": rank, "what":
                                     f"has not been heard of for {now - heard:.1f} s{self._at(rank)}"})
        frozen = [rank for rank, state in present.items() if state["frozen"]]
        if frozen and len(frozen) < len(present):
            return self._decide({"kind": "frozen", "rank": frozen[0], "what":
                                 f"is frozen (stopped by a signal){self._at(frozen[0])}"})
        self._judge_progress(present)
        missing = sorted(set(range(self._size)) - set(self._heard))
        if missing and now - self._start > self._settings["join"]:
            self._decide({"kind": "missing", "rank": missing[0], "what":
                          f"has not come within {self._settings['join']:.0f} s; was every worker started?"})

    def _judge_progress(self, present: dict[int, dict]) -> None:
        """Who holds the others up, and who waits for each other in different calls."""
        waiting = {rank: state for rank, state in present.items() if state["waiting"] and state["quiet"] > 1.0}
        for rank, state in present.items():
            if state["overdue"] and waiting:
                victim = min(waiting)
                return self._decide({"kind": "stalled", "rank": rank, "what":
                                     f"has made no progress for {state['quiet']:.1f} s{self._at(rank)}, while worker "
                                     f"{victim} waits in {waiting[victim]['where']}"})
        if len(present) < self._size or len(waiting) < len(present) or not self._settings["judges"]:
            return
        shortest = min(state["quiet"] for state in waiting.values())
        calls = {state["section"].split(" ")[0]: rank for rank, state in sorted(waiting.items(), reverse=True)}
        if len(calls) > 1 and shortest > 2.0:
            told = "; ".join(f"worker {rank} in {waiting[rank]['where']}" for rank in sorted(calls.values()))
            self._decide({"kind": "parted", "rank": min(calls.values()), "what":
                          f"and others wait for each other in different calls: {told}; every worker must make the same "
                          "calls in the same order"})
        elif shortest > self._settings["outside"]:
            longest = max(waiting, key=lambda rank: waiting[rank]["quiet"])
            self._decide({"kind": "stalled", "rank": longest, "what":
                          f"waits for others{self._at(longest)}, and no worker has advanced for {shortest:.0f} s; has "
                          "a message been lost?"})

    def _decide(self, verdict: dict) -> None:
        if self.verdict is None:
            self.verdict = verdict
            self._tell(verdict)
