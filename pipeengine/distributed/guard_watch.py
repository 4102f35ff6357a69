"""Look at one worker process: what it says it does, and what the kernel says of it.

Needs the standard library alone.
"""
from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
from contextlib import suppress

# What a worker is doing, in memory that it shares with its guard: progress, step, micro-batch, operation, stage, calls
# finished in this section; then bytes: waits for others, its script ends, takes long; then the section's name.
MARK = struct.Struct("<qqqii")
CALLS = struct.Struct("<q")
CALLS_AT, WAITING_AT, LEAVING_AT, LONG_AT, SECTION_AT, RECORD_BYTES = 32, 40, 41, 42, 64, 256
OPERATIONS = ("", "forward", "backward", "input gradient", "weight gradient", "sending an activation",
              "receiving an activation", "sending a gradient", "receiving a gradient", "summing gradients")
TICK = 0.25                 # seconds between two looks
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Patience:
    """How long a worker may go without progress, learnt from this run. All in seconds."""

    def __init__(self, stall: float, outside: float, long: float):
        self._stall, self._outside, self._long = stall, outside, long
        self._longest: dict[tuple, float] = {}

    def learn(self, key: tuple, quiet: float) -> None:
        """It was ``quiet`` for so many seconds and went on."""
        self._longest[key] = max(self._longest.get(key, 0.0), quiet)

    def limit(self, key: tuple, calls: int, takes_long: bool, busy: bool) -> float:
        """Ten times the longest pause seen there; what is known to be long, or new, may take its time."""
        if takes_long or calls < 6:
            return self._long
        usual = 10 * self._longest.get(key, 0.0)
        return max(usual, self._outside if busy or not key[0] else self._stall)


class Watch:
    """Looks at one worker process: what it says it does, and what the kernel says of it."""

    def __init__(self, pid: int, memory: mmap.mmap, settings: dict, proc: str = "/proc"):
        self._proc = f"{proc}/{pid}"
        self.process = os.pidfd_open(pid)
        self._memory, self._frozen_after = memory, settings["frozen"]
        self._judges = settings["judges"]
        self._patience = Patience(settings["stall"], settings["outside"], settings["long"])
        self._key: tuple = ()
        self._seen: tuple = ()
        self._since = self._stopped = time.monotonic()
        self._cpu = 0.0
        self._last = self._since

    def look(self) -> dict:
        """One look: what it does, seconds without progress, whether it waits, is overdue, or has been stopped."""
        now = time.monotonic()
        if now - self._last > 8 * TICK:        # this process itself was stopped: what happened meanwhile says nothing
            self._seen, self._stopped = (), now
        self._last = now
        progress, step, microbatch, operation, stage = MARK.unpack_from(self._memory, 0)
        waiting, takes_long = bool(self._memory[WAITING_AT]), bool(self._memory[LONG_AT])
        section = bytes(self._memory[SECTION_AT:RECORD_BYTES]).split(b"\0")[0].decode(errors="replace")
        (calls,) = CALLS.unpack_from(self._memory, CALLS_AT)
        state, cpu = self._kernel()
        if (progress, waiting) != self._seen:
            if self._seen and not self._seen[1]:
                self._patience.learn(self._key, now - self._since)
            self._seen, self._since, self._cpu = (progress, waiting), now, cpu
            self._key = section.split(" ")[0], operation
        if state != "T":
            self._stopped = now
        quiet = now - self._since
        overdue = False
        if not waiting and quiet > 1.0 and self._judges and state not in "Tt":
            busy = state == "D" or cpu - self._cpu > 0.2 * quiet
            overdue = quiet > self._patience.limit(self._key, calls, takes_long, busy) and not self._traced()
        where = section or "outside of any call of the pipeline"
        if operation and section:
            where += f", stage {stage}, {OPERATIONS[operation]}"
            where += f" of micro-batch {microbatch}" if microbatch >= 0 else ""
        return {"section": section, "where": where, "waiting": waiting, "quiet": quiet, "overdue": overdue,
                "frozen": self._judges and now - self._stopped > self._frozen_after}

    def _kernel(self) -> tuple[str, float]:
        """The process's state (R, S, D, T, ...) and the seconds of CPU time that it has used or waited for.

        On a machine with much to do a worker that computes may get less of a CPU than one that sleeps now and then.
        """
        try:
            with open(f"{self._proc}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            return fields[0], sum(map(int, fields[11:13])) / _TICKS_PER_SECOND + self._starved()
        except (OSError, IndexError, ValueError):
            return "S", 0.0

    def _starved(self) -> float:
        """Seconds that the threads of the process could have run and had no CPU; 0 where the kernel does not say."""
        seconds = 0.0
        with suppress(OSError):
            for thread in os.listdir(f"{self._proc}/task"):
                with suppress(OSError, IndexError, ValueError), open(f"{self._proc}/task/{thread}/schedstat") as file:
                    seconds += int(file.read().split()[1]) / 1e9
        return seconds

    def _traced(self) -> bool:
        try:
            with open(f"{self._proc}/status") as file:
                return "TracerPid:\t0\n" not in file.read()
        except OSError:
            return False

    def ending(self) -> tuple[int | None, bool]:
        """After its end: the exit code as ``subprocess`` has it (None where it is not known), and whether its script
        had ended."""
        code = None
        for _ in range(20):             # known while nobody has asked for it, and again once somebody has
            code = self._exit_code()
            if code is not None:
                break
            time.sleep(0.005)
        return code, bool(self._memory[LEAVING_AT])

    def _exit_code(self) -> int | None:
        with suppress(OSError, IndexError, ValueError), open(f"{self._proc}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
            if fields[0] == "Z" and fields[49] != "0":      # 0 also stands for what we may not see
                return os.waitstatus_to_exitcode(int(fields[49]))
        information = bytearray(64)
        struct.pack_into("<Q", information, 0, 8)           # PIDFD_INFO_EXIT
        try:                                                # PIDFD_GET_INFO of struct pidfd_info, Linux 6.15
            fcntl.ioctl(self.process, 0xC040FF0B, information)
        except OSError:
            return None
        mask, status = struct.unpack_from("<Q", information)[0], struct.unpack_from("<i", information, 60)[0]
        return os.waitstatus_to_exitcode(status) if mask & 8 else None
