"""The user's loop, with everything around it."""
from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from partitioners import draw
from pipeengine.checkpoint import Checkpoints
from pipeengine.errors import InputError
from pipeengine.pipeline import Pipeline
from pipeengine.report import History, RunReport, report_text, save_report
from pipeengine.run.folder import PLAN_PICTURE, RunFolder, host_name, write_json
from pipeengine.run.interruption import Interruption
from pipeengine.run.mail import Mail
from pipeengine.run.own_values import PREFIX, parameters_of, timeline_values, worker_values
from pipeengine.run.recorder import Recorder
from pipeengine.tracking import Progress, TrackerSetting, plain_values

_COUNTED = 4        # the step whose memory is counted, once: caches are warm by then, and the first three are timed
_ENOUGH = 8         # what worker 0 asks for when a start has had its seconds
_OFTEN = 10         # steps between two looks at timelines and memory: those that the pipeline publishes


class _Identity:
    """The run's id, as a part of the checkpoint."""

    def __init__(self, own: str):
        self.id = own

    def state_dict(self) -> dict[str, str]:
        """The id."""
        return {"id": self.id}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Be that run."""
        self.id = state["id"]


class Run:
    """Training of ``pipe`` in ``folder`` that resumes, tracks and reports itself; every worker makes one alike.

    Making it restores the newest whole checkpoint of the folder; ``first_step`` is the step that comes next.

    - ``save_every`` (10 minutes): steps between checkpoints, or a time such as ``"10min"``; the last step is always
      saved, and so is the one in which SIGTERM or Ctrl-C comes, after which the program ends.
    - ``keep`` (3): the newest checkpoints that stay; None keeps all.
    - ``trackers`` (none): "tensorboard", "comet_ml", "mlflow", "wandb", classes or objects like those of
      ``accelerate.tracking``. A restarted run continues the same experiment.
    - ``config`` (None): the user's own parameters, to be told to the trackers and kept in ``options.json``.
    - ``parts``: what is saved besides the weights, such as ``optimizer=optimizer, scheduler=scheduler``.

    The folder has ``run.json``, ``options.json``, ``plan.json``, ``metrics.jsonl``, ``checkpoints/``, ``report.json``,
    ``report.html``, ``timeline.svg``, ``plan.svg`` and ``trace.json``. Raises ``InputError`` as ``Checkpoints``
    does, and for trackers that do not exist; one that fails later is told of once on stderr and training goes on.
    """

    def __init__(self, folder: str | Path, pipe: Pipeline, *, save_every: int | str | None = None,
                 keep: int | None = 3, trackers: Sequence[object] = (), config: Mapping[str, Any] | None = None,
                 **parts: Any):
        if "run" in parts:
            raise InputError("a part is called run, which is where the run keeps its id; give it another name")
        self.folder, self.pipe, self.config = Path(folder), pipe, dict(config or {})
        self._files, self._workers = RunFolder(self.folder), pipe.holdings().workers
        self._identity = _Identity(self._workers.broadcast_object(
            self._workers.run_synchronized(lambda: self._files.id() if pipe.is_first_worker else "")))
        self.checkpoints = Checkpoints(self._files.checkpoints, pipe, every=save_every or "10min", keep=keep,
                                       run=self._identity, **parts)
        self.first_step: int = self.checkpoints.load()
        self._mail, self._interruption = Mail(self._workers), Interruption(pipe.is_first_worker)
        self._values: dict[str, Any] = {}
        self._step, self._in_step, self._stopping, self._entered = self.first_step - 1, False, False, False
        hosts = self._workers.all_gather_object(host_name())
        self._recorder: Recorder | None = self._workers.run_synchronized(
            lambda: self._begin(tuple([trackers] if isinstance(trackers, str) else trackers), sorted(set(hosts))))
        # After an exception that nobody catches this is called as the process ends.
        self._end = weakref.finalize(self, self._recorder.close if self._recorder else _nothing)

    @property
    def id(self) -> str:
        """32 hexadecimal digits that stay the same through all restarts."""
        return self._identity.id

    def _begin(self, trackers: tuple[object, ...], hosts: list[str]) -> Recorder | None:
        """What worker 0 begins with; None elsewhere."""
        if not self.pipe.is_first_worker:
            return None
        self._files.begin(self.id, self.first_step, hosts)
        parameters = parameters_of(self.pipe, self.config)
        write_json(self._files.options, parameters)
        self.pipe.plan.save(self._files.plan)
        (self.folder / PLAN_PICTURE).write_text(draw(self.pipe.plan, self.pipe.graph), encoding="utf-8")
        recorder = Recorder(self._files.metrics, trackers,
                            TrackerSetting(self.folder.name or "run", self.id, self.folder, self.first_step))
        recorder.configure(parameters)
        return recorder

    # -- the loop ---------------------------------------------------------------------------------------------------

    def steps(self, total: int, seconds: float | None = None) -> Iterator[int]:
        """The numbers of the steps that are still to be trained, up to ``total - 1``; every worker loops over them.

        After ``seconds`` (None: no limit) by worker 0's clock all workers stop after the same step, as by ``stop``.
        Between two of them it logs, saves when due and shows progress. At the end it saves, writes the report and
        closes everything (in a ``with`` block that is left to the block). After ``break`` or an exception only the file
        and the trackers are closed: call ``stop`` to end early with a checkpoint.
        """
        if type(total) is not int or total < 1:
            raise InputError(f"total is {total!r}; give the number of steps that the run is to have, at least 1")
        if self._recorder is not None:
            self._files.set_total(total)
            self._recorder.begin_progress(Progress(self.first_step, total, limit=seconds))
            if self.first_step:
                self._recorder.say(f"{self.folder}: " + (
                    f"going on at step {self.first_step:,}, where its newest checkpoint ends"
                    if self.first_step < total else
                    f"all {total:,} steps are trained; ask for more, or take another folder"))
        started = time.perf_counter()
        try:
            for step in range(self.first_step, total):
                self._step, self._in_step, begin, sent = step, True, time.perf_counter(), self.pipe.message_bytes
                yield step
                self._end_step(step, time.perf_counter() - begin, self.pipe.message_bytes - sent)
                self._stopping |= self._had_enough(seconds is not None and time.perf_counter() - started > seconds)
                self._save(step + 1, last=step + 1 == total or self._stopping)
                if self._stopping:
                    break
            self._finish()
        finally:
            self._in_step = False
            self._interruption.release()
            if not self._entered:
                self._end()

    def stop(self) -> None:
        """End the loop after this step as if it were the last; every worker calls it in the same step."""
        self._stopping = True

    def _had_enough(self, over: bool) -> bool:
        """Whether the time is over for worker 0; the others hear of it with the next step, so all know it then."""
        if over and self.pipe.is_first_worker:
            self._workers.wishes.ask(_ENOUGH)
        return bool(self._workers.wishes.take(_ENOUGH, alone=self._workers.size == 1))

    def log(self, **values: object) -> None:
        """Values of this step: numbers, texts, tensors of one element. Any worker that has them calls it.

        A name that several workers log counts once, that of the first of them. Takes microseconds besides the wait for
        a value that is still being computed on an accelerator. Raises ``InputError`` for other values.
        """
        plain = plain_values(values)
        self._values |= plain
        if not self._in_step:
            self._hand_on(self._step, self._take_values())

    def _take_values(self) -> dict[str, Any]:
        values, self._values = self._values, {}
        return values

    def _hand_on(self, step: int, values: dict[str, Any]) -> None:
        """To the file and the trackers, here or on worker 0."""
        step = max(step, 0)
        if self._recorder is None:
            self._mail.post(step, values)
        else:
            self._mail.names_told(frozenset(values))
            self._recorder.record(step, values)

    def _end_step(self, step: int, seconds: float, sent_bytes: int) -> None:
        self._in_step, values = False, self._take_values()
        loss = values.get("loss", self.pipe.loss)
        amount, unit = self.pipe.amount
        number = self.pipe.num_steps - 1
        if number == _COUNTED - 1:
            self.pipe.count_memory()
        if number < 3 or number % _OFTEN == 0:
            values |= worker_values(self.pipe, sent_bytes)
        if self._recorder is not None:
            rate = amount / seconds if amount and seconds else None
            values |= {f"{PREFIX}step_seconds": seconds}
            values |= {} if rate is None else {f"{PREFIX}{unit}_per_second": rate}
            self._recorder.show(step, None if loss is None else float(loss), rate and (rate, unit) or None)
            if step % _OFTEN == 3:          # by now every worker has published the step before last
                self._recorder.measure(lambda: self._measure(step - number))
        self._hand_on(step, values)

    def _measure(self, offset: int) -> None:
        """Values that come from all workers; on a thread of its own."""
        assert self._recorder is not None
        own = timeline_values(self.pipe, self._workers.published(), self.pipe.predicted_timeline().makespan)
        if own is not None:
            self._recorder.record(own[0] + offset, own[1])
        self._take_mail()

    def _take_mail(self) -> None:
        for step, values in self._mail.take() if self._recorder is not None else ():
            self._recorder.record(step, values)         # type: ignore[union-attr]

    def _save(self, step: int, last: bool) -> None:
        try:
            self.checkpoints.save(step, force=last)
        except SystemExit:
            self._write_report()
            if self._interruption.first is not None:
                raise SystemExit(130) from None         # as a shell says of Ctrl-C
            raise
        self._interruption.watch()

    def _finish(self) -> None:
        """What follows the last step, on every worker."""
        self.checkpoints.wait()
        if self._step >= self.first_step:
            self._workers.all_gather_object(None)       # everybody has posted
            self._take_mail()
            self._write_report()
        if self._recorder is not None:
            self._recorder.end_progress()

    def __repr__(self) -> str:
        return f"<Run in {self.folder} at step {self._step + 1}: {self.pipe!r}>"

    # -- what happened ----------------------------------------------------------------------------------------------

    def report(self) -> str:
        """The run so far as a table for a terminal, with its history; on worker 0."""
        return report_text(self._report())

    def _report(self) -> RunReport:
        return replace(self.pipe.run_report(), history=History.of(self.folder))

    def _write_report(self) -> None:
        if self._recorder is not None:
            save_report(self._report(), self.folder)
            self._recorder.add_artifacts([self.folder / name for name in (
                "report.html", "report.json", "timeline.svg", "trace.json", "plan.json", PLAN_PICTURE,
                "options.json")])

    def close(self) -> None:
        """Close the file, the trackers and the checkpoints; every worker calls it. What is there stays."""
        self._end()
        self.checkpoints.close()

    def __enter__(self) -> Run:
        self._entered = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._end()
        if kind is None:
            self.checkpoints.close()


def _nothing() -> None:
    """What a worker that does not tell has to close."""
