"""What a save promises besides being whole: errors that are told, parts that are kept, and when it saves."""
import errno
import os
import stat
import threading
import time
from collections import Counter
from pathlib import Path

import numpy
import pytest
import threads
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import pipeengine as pe
from pipeengine.checkpoint import save_weights, writing
from pipeengine.checkpoint.host_buffer import HostBuffer


class Holder:
    """A part that is nothing but its state."""

    def __init__(self, state: object):
        self.state_now = state

    def state_dict(self) -> object:
        return self.state_now

    def load_state_dict(self, state: object) -> None:
        self.state_now = state


def alone(folder: Path, model: nn.Module | None = None, **options: object) -> pe.Checkpoints:
    """Checkpoints of one worker that holds every parameter of ``model``."""
    model = threads.model(1.0) if model is None else model
    workers = threads.ThreadWorkers(0, 1, threading.Barrier(1), {})
    return pe.Checkpoints(folder, threads.Fake(model, {name: 0 for name, _ in model.named_parameters()}, workers),
                          **options)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 3, dtype=next(model.parameters()).dtype)).float().square().sum().backward()
        optimizer.step()


# -- when -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every, expected", [(None, [1, 2, 3, 4, 5]), (2, [2, 4]), (5, [5]), ("1h", [])])
def test_a_save_is_due_every_so_many_steps(every, expected, tmp_path):
    checkpoints = alone(tmp_path, every=every, keep=None)
    for step in range(1, 6):
        checkpoints.save(step)
    checkpoints.wait()
    assert sorted(os.listdir(tmp_path)) == [f"step-{step:06}" for step in expected]


def test_a_save_is_due_after_so_much_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checkpoints = alone(tmp_path, every="10min", background=False)
    for step, seconds in ((1, 599), (2, 601), (3, 1200), (4, 1202)):
        now[0] = seconds
        checkpoints.save(step)
    assert sorted(os.listdir(tmp_path)) == ["step-000002", "step-000004"]


@pytest.mark.parametrize("options, word", [
    (dict(every=0), "every"), (dict(every="soon"), "every"), (dict(every="0s"), "every"), (dict(every=True), "every"),
    (dict(keep=0), "keep"), (dict(keep="3"), "keep"), (dict(model=Holder(1)), "model"),
    ({"../x": Holder(1)}, "part"), (dict(scheduler=object()), "scheduler.*state_dict")])
def test_wrong_options_are_refused(options, word, tmp_path):
    fake = threads.Fake(threads.model(1.0), threads.owners(1), threads.ThreadWorkers(0, 1, threading.Barrier(1), {}))
    with pytest.raises(pe.InputError, match=word):
        pe.Checkpoints(tmp_path, fake, **options)


@pytest.mark.parametrize("step", [-1, 1.0, "1", True])
def test_a_wrong_step_is_refused(step, tmp_path):
    with pytest.raises(pe.InputError, match="step is"):
        alone(tmp_path).save(step)


def test_workers_that_disagree_are_told(tmp_path):
    def work(workers):
        fake = threads.Fake(threads.model(1.0), threads.owners(2), workers)
        with pytest.raises(pe.InputError, match="worker 0 saves 5, worker 1 6"):
            pe.Checkpoints(tmp_path, fake).save(5 + workers.rank)
        with pytest.raises(pe.InputError, match="disagree on the parts"):
            pe.Checkpoints(tmp_path, fake, **{f"part{workers.rank}": Holder(1)}).save(5)
    threads.as_threads(2, work)
    assert not os.listdir(tmp_path)


# -- parts ------------------------------------------------------------------------------------------------------------


VALUES = [None, True, 3, -2 ** 70, 0.1, float("inf"), float("-inf"), "text", b"\x00\xff", 2 - 3j, (1, (2, [3])), {1, 2},
          frozenset("ab"), {"a": [1, {"b": None}]}, {1: "one", (2, 3): "two"}, Counter([3, 3, 5]), {}, [], (),
          torch.float16, torch.device("cpu")]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_plain_values_come_back(value, tmp_path):
    alone(tmp_path, part=Holder({"value": value})).save(1, force=True)
    part = Holder(None)
    checkpoints = alone(tmp_path, part=part)
    while not (tmp_path / "step-000001").exists():
        time.sleep(0.01)
    assert checkpoints.load() == 1
    assert part.state_now == {"value": value} and type(part.state_now["value"]) is type(value)


def test_tensors_and_arrays_come_back(tmp_path):
    state = {"noise": torch.get_rng_state(), "nan": torch.tensor([float("nan"), -0.0]),
             "transposed": torch.ones(2, 3).T, "deep": [(torch.arange(3),)],
             "numpy": numpy.random.RandomState(3).get_state(),
             "empty": torch.empty(0, 4)}
    saving = alone(tmp_path, part=Holder(state))
    saving.save(1)
    saving.wait()
    part = Holder(None)
    assert alone(tmp_path, part=part).load() == 1
    loaded = part.state_now
    assert torch.equal(loaded["noise"], state["noise"]) and loaded["nan"].view(torch.int32).equal(
        state["nan"].view(torch.int32)) and torch.equal(loaded["transposed"], state["transposed"])
    assert torch.equal(loaded["deep"][0][0], torch.arange(3)) and loaded["empty"].shape == (0, 4)
    assert loaded["numpy"][0] == "MT19937" and (loaded["numpy"][1] == state["numpy"][1]).all()


def _loop() -> list:
    loop: list = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize("value", [object(), lambda: 1, _loop(), torch.eye(2).to_sparse(), torch.ones(2, device="meta"),
                                   numpy.array([object()]), torch.ones(1, dtype=torch.complex128)],
                         ids=lambda value: type(value).__name__)
def test_what_cannot_be_written_is_named(value, tmp_path):
    with pytest.raises(pe.InputError, match=r"state of loader.*state\.inner"):
        alone(tmp_path, loader=Holder({"inner": value})).save(1)
    assert not os.listdir(tmp_path)


SCHEDULERS = {
    "StepLR": lambda o: schedulers.StepLR(o, 2), "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 2, 5]),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9 ** epoch),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: schedulers.SequentialLR(o, [schedulers.LinearLR(o), schedulers.StepLR(o, 2)], [4]),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler([schedulers.LinearLR(o), schedulers.StepLR(o, 2)]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on_as_they_would_have(name, tmp_path):
    rates = []
    for turn in ("whole", "resumed"):
        model = threads.model(0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        scheduler = SCHEDULERS[name](optimizer)
        checkpoints = alone(tmp_path, model, optimizer=optimizer, scheduler=scheduler, background=False)
        if turn == "resumed":
            assert checkpoints.load() == 3
        for step in range(1, 10) if turn == "whole" else range(4, 10):
            trained(model, optimizer, 1)
            scheduler.step()
            rates.append((step, scheduler.get_last_lr()[0], [p.detach().clone() for p in model.parameters()]))
            if step == 3 and turn == "whole":
                checkpoints.save(3)
    for step, rate, values in rates[9:]:
        assert rate == rates[step - 1][1] and all(map(torch.equal, values, rates[step - 1][2]))


OPTIMIZERS = {
    "tensor rate": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(0.01), amsgrad=True),
    "NAdam": torch.optim.NAdam, "RAdam": torch.optim.RAdam, "Adagrad": torch.optim.Adagrad, "Rprop": torch.optim.Rprop,
    "ASGD": torch.optim.ASGD, "Adadelta": torch.optim.Adadelta, "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "SGD with momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "Adamax": torch.optim.Adamax, "Adafactor": torch.optim.Adafactor,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_optimizer_comes_back_bit_for_bit(name, dtype, tmp_path):
    """With parameters in half precision and moments in full too: torch's own loading rounds those."""
    model, other = threads.model(0.5).to(dtype), threads.model(0.1).to(dtype)
    optimizer, fresh = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](other.parameters())
    trained(model, optimizer)
    for state in optimizer.state.values() if dtype == torch.bfloat16 else ():
        state.update({key: value.float() + 1e-3 for key, value in state.items()
                      if isinstance(value, torch.Tensor) and key.startswith("exp_avg")})
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.5
    alone(tmp_path, model, optimizer=optimizer, background=False).save(3)
    assert alone(tmp_path, other, optimizer=fresh).load() == 3
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two) and set(optimizer.state[one]) == set(fresh.state[two])
        for key, value in optimizer.state[one].items():
            again = fresh.state[two][key]
            assert type(again) is type(value), key
            assert again.dtype == value.dtype and torch.equal(again, value) if isinstance(value, torch.Tensor) else \
                again == value, key
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert type(fresh.param_groups[0]["lr"]) is type(optimizer.param_groups[0]["lr"])


def test_one_state_for_all_parameters_is_refused(tmp_path):
    model = threads.model(0.5)
    with pytest.raises(pe.InputError, match="LBFGS.*AdamW"):
        alone(tmp_path, model, optimizer=torch.optim.LBFGS(model.parameters())).save(1)


def test_other_groups_are_refused(tmp_path):
    model = threads.model(0.5)
    weights, biases = ([p for n, p in model.named_parameters() if n.endswith(kind)] for kind in ("weight", "bias"))
    optimizer = torch.optim.AdamW([dict(params=weights), dict(params=biases, lr=0.5)])
    alone(tmp_path, model, optimizer=optimizer, background=False).save(1)
    with pytest.raises(pe.InputError, match="step-000001.*group 0 of optimizer.*0.weight.*0.bias"):
        alone(tmp_path, model, optimizer=torch.optim.AdamW(model.parameters())).load()
    with pytest.raises(pe.InputError, match="step-000001 cannot give scheduler"):
        alone(tmp_path, model, scheduler=Holder(1)).load()


@pytest.mark.parametrize("other, word", [
    (nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4)), "does not have, first 2.bias"),
    (nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 3)), "2.weight is .*[2, 4].*[3, 4]"),
    (threads.model(1.0).half(), "0.weight is torch.float32.*torch.float16"),
    (nn.Sequential(*threads.model(1.0), nn.Linear(2, 2)), "lacks 3.weight")], ids=["less", "shape", "dtype", "more"])
def test_another_model_is_refused(other, word, tmp_path):
    alone(tmp_path, background=False).save(1)
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(pe.InputError, match=f"step-000001.*{word}"):
        alone(tmp_path, other).load()
    assert all(map(torch.equal, before, other.parameters())), "nothing has changed"


# -- what goes wrong --------------------------------------------------------------------------------------------------


FAULTS = {"write": errno.ENOSPC, "fsync": errno.EIO, "mkdir": errno.EROFS, "rename": errno.EACCES}


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("call", FAULTS)
def test_a_failed_save_is_told_on_every_worker_and_costs_nothing(call, background, tmp_path, monkeypatch):
    """By the next save or wait; the last good checkpoint stays, and the next save works."""
    real, broken = getattr(os, call), threading.Event()

    def faulty(*args, **kwargs):
        if broken.is_set() and threading.current_thread() not in healthy:
            raise OSError(FAULTS[call], os.strerror(FAULTS[call]), str(tmp_path))
        return real(*args, **kwargs)
    healthy: set = set()
    monkeypatch.setattr(os, call, faulty)

    def work(workers):
        checkpoints = pe.Checkpoints(tmp_path, threads.Fake(threads.model(1.0), threads.owners(3), workers),
                                     background=background)
        checkpoints.save(1)
        checkpoints.wait()
        workers.all_gather_object(broken.set())
        with pytest.raises(pe.InputError, match=f"cannot write.*{os.strerror(FAULTS[call])}; "):
            checkpoints.save(2)
            checkpoints.wait()
        workers.all_gather_object(None)
        broken.clear()
        workers.all_gather_object(None)
        checkpoints.wait()
        assert checkpoints.load() == 1
        checkpoints.save(3)
        checkpoints.wait()
        assert checkpoints.load() == 3
    threads.as_threads(3, work)
    assert sorted(os.listdir(tmp_path)) == ["step-000001", "step-000003"]


def test_the_failure_of_one_worker_is_told_on_all(tmp_path):
    """Worker 0 does not wait for the part of one that cannot write."""
    def work(workers):
        fake = threads.Fake(threads.model(1.0), threads.owners(3), workers)
        checkpoints = pe.Checkpoints(tmp_path, fake)
        if workers.rank == 2:
            checkpoints._buffer.copy = lambda files: [iter(_failing()) for _ in files]
        checkpoints.save(1)
        with pytest.raises(pe.InputError, match="cannot write this"):
            checkpoints.save(2)
    threads.as_threads(3, work)
    while os.listdir(tmp_path):
        time.sleep(0.01)


def test_a_worker_that_begins_late_finds_the_folder_of_a_save_that_has_failed(tmp_path, monkeypatch):
    """Worker 0 once removed it as soon as its own part had failed, and who came later waited a minute for it."""
    write_part, close, failed, written = writing.write_part, writing.Writing._close, threading.Event(), []

    def write(task):
        if task.rank == 0:
            raise pe.InputError("cannot write this")
        assert failed.wait(30)
        write_part(task)
        written.append(task.rank)

    def closed(self):
        close(self)
        if self._task.rank == 0:
            failed.set()
    monkeypatch.setattr(writing.Writing, "_close", closed)
    monkeypatch.setattr(writing, "write_part", write)
    monkeypatch.setattr(writing, "_FOLDER_SECONDS", 0.0)

    def work(workers):
        fake = threads.Fake(threads.model(1.0), threads.owners(3), workers)
        checkpoints = pe.Checkpoints(tmp_path, fake)
        with pytest.raises(pe.InputError, match="cannot write this"):
            checkpoints.save(1)
            checkpoints.wait()
    threads.as_threads(3, work)
    assert sorted(written) == [1, 2] and not os.listdir(tmp_path)


def _failing():
    raise pe.InputError("cannot write this; try that")
    yield


def test_weights_fail_alike(tmp_path):
    target = tmp_path / "file"
    target.write_text("x")

    def work(workers):
        owned = {name for name, rank in threads.owners(2).items() if rank == workers.rank}
        with pytest.raises(pe.InputError, match=f"{target}.*; "):
            save_weights(threads.model(1.0), owned, target / "folder", workers)
    threads.as_threads(2, work)


def test_files_have_the_modes_that_the_user_wants(tmp_path):
    before = os.umask(0o027)
    try:
        alone(tmp_path / "run", background=False).save(1)
        workers = threads.ThreadWorkers(0, 1, threading.Barrier(1), {})
        save_weights(threads.model(1.0), set(threads.owners(1)), tmp_path / "weights", workers)
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_what_was_trained_meanwhile_is_not_in_the_checkpoint(tmp_path, monkeypatch):
    """A save in the background holds what was there when it was called, however late it is written."""
    real, go = os.fsync, threading.Event()
    monkeypatch.setattr(os, "fsync", lambda file: (go.wait(10), real(file))[1])
    model = threads.model(1.0)
    checkpoints = alone(tmp_path, model)
    checkpoints.save(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)
    go.set()
    checkpoints.wait()
    checkpoints.load()
    assert all((parameter == 1.0).all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ("SGD", "Adam"))
def test_memory_is_prepared_before_the_first_save_and_made_once(name, tmp_path, monkeypatch):
    """The pages of a new buffer cost several copies: they must not hold the loop in the first save that is due."""
    makers = []
    make = HostBuffer._make
    monkeypatch.setattr(HostBuffer, "_make", lambda *args: (makers.append(threading.current_thread().name),
                                                            make(*args))[1])
    model = threads.model(1.0)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-6)
    for options in ({"every": 3}, {"background": False, "every": 3}):
        checkpoints = alone(tmp_path, model, optimizer=optimizer, **options)
        for step in range(1, 7):
            trained(model, optimizer, 1)
            checkpoints.save(step)
        checkpoints.wait()
        assert makers == ["pipeengine-buffer"], "and none at all where nothing is copied"
    saved = [parameter.detach().clone() for parameter in model.parameters()]
    trained(model, optimizer)
    assert checkpoints.load() == 6 and all(map(torch.equal, saved, model.parameters()))


def test_only_the_newest_stay(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "step-7").mkdir()
    checkpoints = alone(tmp_path, keep=2)
    for step in range(1, 6):
        checkpoints.save(step)
    checkpoints.wait()
    assert sorted(os.listdir(tmp_path)) == ["notes", "step-000004", "step-000005", "step-7"]


def test_a_forgotten_save_leaves_a_newer_one_alone(tmp_path, monkeypatch):
    """As by a cell of a notebook that runs again: the first save ends while the second is under way."""
    real, first, second = os.rename, threading.Event(), threading.Event()

    def slow(source, target):
        if "step-000001" in str(target):
            first.wait(10)
        real(source, target)
    monkeypatch.setattr(os, "rename", slow)
    forgotten = alone(tmp_path)
    forgotten.save(1)
    written = writing.write_part
    monkeypatch.setattr(writing, "write_part", lambda task: (second.wait(10), written(task)))
    newer = alone(tmp_path)
    newer.save(2)
    first.set()
    forgotten.wait()
    second.set()
    newer.wait()
    assert sorted(os.listdir(tmp_path)) == ["step-000001", "step-000002"]
