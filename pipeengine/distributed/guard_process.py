"""The guard's own small process, one beside every worker: it watches the worker and tells worker 0's, which judges.

It is a process so that nothing in the worker can stop it: no long call that holds the interpreter's lock, no stopped
or dead worker, no sockets that forked children keep open. It runs this file alone and needs nothing but the standard
library. Worker 0's outlives worker 0, so that its death is told like any other.
"""
from __future__ import annotations

import hashlib
import hmac
import json
import mmap
import os
import secrets
import selectors
import signal
import socket
import sys
import time
from contextlib import suppress

from pipeengine.distributed.guard_judge import Judge, how_ended, silence_limit
from pipeengine.distributed.guard_watch import RECORD_BYTES, TICK, Watch

_LINGER = 2.0                               # seconds that the one that judges outlives its worker at most
_LINEAR_TIMEOUTS = 16                       # TCP_THIN_LINEAR_TIMEOUTS of linux/tcp.h
_LINE, _STRANGERS = 1 << 22, 64             # bytes of a line, connections that have not proved who they are


def prove(token: str, nonce: str, who: str) -> str:
    """Shows that one knows ``token`` without telling it."""
    return hmac.new(token.encode(), f"{nonce}/{who}".encode(), hashlib.sha256).hexdigest()


def read_line(connection: socket.socket, limit: int = 4096) -> bytes:
    """The next line and not a byte more; blocks."""
    line = bytearray()
    while len(line) < limit and not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            break
        line += byte
    return bytes(line)


def retry_soon(connection: socket.socket) -> None:
    """Send lost packets again every fifth of a second for a while, and not after twice as long each time: a link that
    was down for two seconds must not keep silent for three."""
    with suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.IPPROTO_TCP, _LINEAR_TIMEOUTS, 1)


class Lines:
    """A connection that carries one JSON object per line and never blocks."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        self.connection, self._arrived, self._leaving = connection, bytearray(), bytearray()

    def send(self, message: dict) -> None:
        """Send soon; a peer that is gone is told by ``receive``."""
        self._leaving += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what the connection takes now."""
        try:
            while self._leaving:
                del self._leaving[:self.connection.send(self._leaving)]
        except BlockingIOError:
            pass
        except OSError:
            self._leaving.clear()

    def receive(self, limit: int = _LINE) -> tuple[list[dict], bool]:
        """What has arrived, and whether the connection still stands. Raises ``ValueError`` for what is no message."""
        alive = True
        try:
            while data := self.connection.recv(65536):
                self._arrived += data
                if len(self._arrived) > limit:
                    raise ValueError("a line that is too long")
            alive = False
        except BlockingIOError:
            pass
        except OSError:
            alive = False
        *lines, rest = bytes(self._arrived).split(b"\n")
        self._arrived = bytearray(rest)
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("a line that is no message")
        return messages, alive


def write_cause(path: str, what: str, traceback: str = "") -> None:
    """Say in torchrun's error file what ended a worker, unless the worker has done so.

    torchrun blames who has failed first, by whole seconds. The date is a second back, so that workers which end as a
    consequence, in the same second and with or without files of their own, have failed later.
    """
    told = {"message": what, "extraInfo": {"py_callstack": f"{what}\n{traceback}".strip(),
                                           "timestamp": str(int(time.time()) - 1)}}
    with suppress(OSError):
        if path and not os.path.exists(path):
            with open(f"{path}.part", "w") as file:
                json.dump({"message": told}, file)
            os.replace(f"{path}.part", path)            # nobody reads half of it


class Guard:
    """The process beside worker ``rank``: watches it, and either judges or is connected to the one that does."""

    def __init__(self, worker: Lines, memory: mmap.mmap, pid: int, setup: dict):
        self._worker, self._setup, self._rank = worker, setup, setup["rank"]
        self._watch = Watch(pid, memory, setup["settings"])
        self._selector = selectors.DefaultSelector()
        self._selector.register(worker.connection, selectors.EVENT_READ, self._from_worker)
        self._process = self._watch.process
        self._selector.register(self._process, selectors.EVENT_READ, self._worker_ended)
        self._agent: int | None = None
        if setup["agent"]:
            self._agent = os.pidfd_open(setup["agent"])
            self._selector.register(self._agent, selectors.EVENT_READ, self._agent_ended)
        self._judge: Judge | None = None
        self._peers: dict[int, Lines] = {}
        self._up: Lines | None = None
        self._deadline: float | None = None         # when to end, once that is known
        self._kill_at: float | None = None
        self._told: dict | None = None
        self._hub_heard = self._last = time.monotonic()
        if setup["hub"] is None:
            self._listen()
        else:
            self._connect()

    # -- connections ------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        self._judge = Judge(self._setup["size"], self._setup["settings"], self._broadcast)
        listener = socket.create_server((self._setup["bind"], 0), backlog=max(16, self._setup["size"]))
        listener.setblocking(False)
        self._strangers = 0
        self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))
        self._worker.send({"port": listener.getsockname()[1]})

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        retry_soon(connection)
        if self._strangers >= _STRANGERS:
            connection.close()
            return
        self._strangers += 1
        lines, nonce = Lines(connection), secrets.token_hex(16)
        lines.send({"nonce": nonce})
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._greet(lines, nonce))

    def _greet(self, lines: Lines, nonce: str) -> None:
        """A stranger's first line must prove that it knows the run's token; anything else ends the connection."""
        rank, proof = None, None
        try:
            messages, _ = lines.receive(limit=4096)
            if messages and isinstance(messages[0].get("rank"), int):
                rank, proof = messages[0]["rank"], prove(self._setup["token"], nonce, str(messages[0]["rank"]))
        except ValueError:
            messages = []
        self._selector.unregister(lines.connection)
        self._strangers -= 1
        if rank is None or not 0 < rank < self._setup["size"] or rank in self._peers \
                or not hmac.compare_digest(str(messages[0].get("proof")), str(proof)):
            lines.connection.close()
            return
        lines.send({"welcome": prove(self._setup["token"], str(messages[0].get("nonce")), "hub")})
        self._peers[rank] = lines
        self._selector.register(lines.connection, selectors.EVENT_READ, lambda: self._from_peer(rank))
        assert self._judge is not None
        for message in messages[1:]:
            self._judge.hear(rank, message)
        if self._judge.verdict is not None:
            lines.send({"verdict": self._judge.verdict})

    def _connect(self) -> None:
        connection = socket.create_connection(tuple(self._setup["hub"]), timeout=self._setup["settings"]["join"])
        nonce, own = str(json.loads(read_line(connection))["nonce"]), secrets.token_hex(16)
        answer = {"rank": self._rank, "proof": prove(self._setup["token"], nonce, str(self._rank)), "nonce": own}
        connection.sendall(json.dumps(answer).encode() + b"\n")
        welcome = str(json.loads(read_line(connection))["welcome"])
        if not hmac.compare_digest(welcome, prove(self._setup["token"], own, "hub")):
            raise ConnectionError("what answers in the place of worker 0 does not know this run's token")
        retry_soon(connection)
        self._up, self._hub_heard = Lines(connection), time.monotonic()
        self._selector.register(connection, selectors.EVENT_READ, self._from_hub)

    # -- messages ---------------------------------------------------------------------------------------------------

    def _tell_judge(self, message: dict) -> None:
        if self._judge is not None:
            self._judge.hear(self._rank, message)
        elif self._up is not None:
            self._up.send(message)

    def _broadcast(self, verdict: dict) -> None:
        for lines in self._peers.values():
            lines.send({"verdict": verdict})
        self._verdict(verdict)

    def _verdict(self, verdict: dict) -> None:
        if self._told is None:
            self._told = verdict
            self._worker.send({"verdict": verdict})
            # So that whoever started it can start it again. One that stalls may sit in a call that no signal ends;
            # without an agent it is left to its user.
            ends = ("frozen", "stalled") if self._agent is not None else ("frozen",)
            if verdict["kind"] in ends and verdict["rank"] == self._rank and self._setup["settings"]["kills"]:
                self._blame(verdict["what"])
                self._kill(signal.SIGKILL)

    def _blame(self, what: str, traceback: str = "") -> None:
        """This worker is the cause, for whoever started it."""
        write_cause(self._setup["error_file"], f"worker {self._rank} {what}", traceback)

    def _from_worker(self) -> None:
        messages, alive = self._worker.receive()
        for message in messages:
            if "failed" in message and self._told is None:
                self._blame(message["failed"]["what"], message["failed"].get("traceback", ""))
            self._tell_judge(message)
        closed = any("closed" in message for message in messages)
        if closed or not alive:         # without good-bye it is dying: the kernel tells how
            self._selector.unregister(self._worker.connection)
        if closed:
            self._end()

    def _from_peer(self, rank: int) -> None:
        assert self._judge is not None
        try:
            messages, alive = self._peers[rank].receive()
        except ValueError:
            messages, alive = [], False
        for message in messages:
            self._judge.hear(rank, message)
        if not alive:
            self._selector.unregister(self._peers[rank].connection)
            self._peers.pop(rank).connection.close()
            self._judge.lost(rank)

    def _from_hub(self) -> None:
        assert self._up is not None
        messages, alive = self._up.receive()
        self._hub_heard = time.monotonic()
        for message in messages:
            if "verdict" in message:
                self._verdict(message["verdict"])
        if not alive:
            self._selector.unregister(self._up.connection)
            self._up = None
            if self._deadline is None:
                self._verdict({"kind": "died", "rank": 0, "what": "died, and its machine or guard with it"})

    def _look_at_hub(self, now: float) -> None:
        """Nothing has come from the guard that judges for too long: nobody but this one can say so here."""
        if now - self._last > 8 * TICK:         # this process itself was stopped
            self._hub_heard = now
        self._last = now
        quiet, settings = now - self._hub_heard, self._setup["settings"]
        if self._up is not None and self._told is None and settings["judges"] and quiet > silence_limit(settings):
            self._up.send({"failed": {"what": f"has not heard of worker 0 for {quiet:.1f} s; is the network between "
                                              "them down?"}})
            self._verdict({"kind": "frozen", "rank": 0, "what":
                           f"has not been heard of for {quiet:.1f} s; is the network between it and worker "
                           f"{self._rank} down?"})

    # -- ends -------------------------------------------------------------------------------------------------------

    def _worker_ended(self) -> None:
        self._selector.unregister(self._process)
        code, left = self._watch.ending()
        where = self._watch.look()["where"]
        if self._told is None and not left:
            self._blame(how_ended(code, where))
        self._tell_judge({"ended": {"code": code, "left": left, "where": where}})
        self._end()

    def _agent_ended(self) -> None:
        """Whoever started the worker is dead: nobody would ever end it, so this does."""
        assert self._agent is not None
        self._selector.unregister(self._agent)
        self._kill(signal.SIGTERM)
        self._kill_at = time.monotonic() + _LINGER

    def _kill(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self._process, number)
        except OSError:
            pass

    def _end(self) -> None:
        """Leave soon: the one that judges stays until the others have gone too, or have been told."""
        if self._deadline is None:
            self._deadline = time.monotonic() + (_LINGER if self._judge is not None else 0.0)

    def run(self) -> None:
        """Watch until the worker has gone or has closed its pipeline."""
        beat = said = 0.0
        last: tuple = ()
        while self._deadline is None or (self._peers and time.monotonic() < self._deadline):
            for key, _ in self._selector.select(TICK):
                key.data()
            now = time.monotonic()
            if self._kill_at is not None and now > self._kill_at:
                self._kill(signal.SIGKILL)
            if self._deadline is None:
                seen = self._watch.look()
                news = (seen["waiting"] and seen["quiet"] > 1.0, seen["overdue"], seen["frozen"], seen["section"])
                if news != last or now - beat >= self._setup["settings"]["beat"]:
                    self._tell_judge({"beat": seen})
                    beat, last = now, news
            self._look_at_hub(now)
            if self._judge is not None:
                self._judge.judge()
                if now - said >= self._setup["settings"]["beat"]:
                    said = now
                    for lines in self._peers.values():
                        lines.send({"beat": True})
            for lines in (*self._peers.values(), *([self._up] if self._up else []), self._worker):
                lines.flush()
        if self._up is not None:
            self._up.connection.setblocking(True)
            self._up.flush()


def main() -> None:
    """Watch over the worker at the other end of two inherited file descriptors, a socket and a memory."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    memory = mmap.mmap(int(sys.argv[2]), RECORD_BYTES)
    setup = json.loads(read_line(connection, _LINE))
    worker = Lines(connection)
    try:
        guard = Guard(worker, memory, setup["pid"], setup)
        guard.run()
    except Exception as error:          # the worker is told, and says so; the others see this connection break
        worker.send({"broken": f"{type(error).__name__}: {error}"})
        raise

