"""What a training loop changes in Python between steps is seen: the next step is that of one plain process."""
import argparse
import copy
import dataclasses
import functools
import sys
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_step, gradients, reference_step
from torch import nn
from workers import launch

import pipeengine as pe

WIDTH = 8
SCALE = 1.0                                 # read by a forward and by a loss below
SETTINGS = types.SimpleNamespace(scale=1.0)
TABLE = {"scale": 1.0, "inner": {"shift": 0.0}}


pytestmark = pytest.mark.usefixtures("quiet")


@dataclasses.dataclass
class Config:
    scale: float = 1.0
    mode: str = "mean"
    drop: float = 0.0
    layers: int = 4
    flags: list = dataclasses.field(default_factory=lambda: [False, False])
    inner: object = None


class Block(nn.Module):
    beta = 1.0

    def __init__(self, config):
        super().__init__()
        self.linear, self.config, self.alpha = nn.Linear(WIDTH, WIDTH), config, 1.0
        self.act = torch.tanh

    def forward(self, x):
        if self.config.flags[0]:
            x = x * 2
        x = F.dropout(x, self.config.drop, self.training)
        return x + self.alpha * self.beta * self.act(self.linear(x))


class Net(nn.Module):
    """Reads an attribute, a config, objects behind it, a global, a property and a closure."""

    def __init__(self):
        super().__init__()
        self.config = Config(inner=argparse.Namespace(shift=0.0))
        self.blocks = nn.ModuleList(Block(self.config) for _ in range(6))
        self.weight = 1.0
        self.gate = self.make_gate()
        self.options = {"norm": False, "deep": [{"sign": 1}]}

    def make_gate(self):
        gain = 1.0

        def gate(x, change=None):
            nonlocal gain
            if change is not None:
                gain = change
                return None
            return x * gain
        return gate

    @property
    def scale(self):
        return self.config.scale * getattr(self, "extra", 1.0)

    def forward(self, x, y=None):
        for block in self.blocks[:self.config.layers]:
            x = block(x)
        x = self.gate(x * self.scale + self.config.inner.shift) * SCALE * SETTINGS.scale * TABLE["scale"]
        x = x + TABLE["inner"]["shift"] + self.options["deep"][0]["sign"]
        if self.options["norm"]:
            x = F.layer_norm(x, (WIDTH,))
        if y is None:
            return x
        loss = (x - y).square()
        return self.weight * (loss.mean() if self.config.mode == "mean" else loss.abs().sqrt().mean())


def set_global(value: float) -> None:
    sys.modules[__name__].SCALE = value


HABITS: dict[str, Callable[[Net], object]] = {
    "an attribute": lambda m: setattr(m, "weight", 0.3),
    "an attribute of a block": lambda m: setattr(m.blocks[3], "alpha", 0.5),
    "an attribute that was not there": lambda m: setattr(m, "extra", 0.5),
    "an attribute of a class, on one object": lambda m: setattr(m.blocks[1], "beta", 0.5),
    "a number in a config": lambda m: setattr(m.config, "scale", 0.5),
    "a mode in a config": lambda m: setattr(m.config, "mode", "root"),
    "a flag in a list": lambda m: m.config.flags.__setitem__(0, True),
    "a list of flags": lambda m: setattr(m.config, "flags", [True, False]),
    "an object behind a config": lambda m: setattr(m.config.inner, "shift", 0.7),
    "another config": lambda m: setattr(m.blocks[2], "config", Config(scale=2.0, flags=[True])),
    "a number of layers": lambda m: setattr(m.config, "layers", 2),
    "an activation": lambda m: setattr(m.blocks[0], "act", F.relu),
    "a closure of the forward": lambda m: m.gate(None, 0.4),
    "an entry of a dict": lambda m: m.options.update(norm=True),
    "an entry deep inside": lambda m: m.options["deep"][0].update(sign=-1),
}
GLOBALS = {
    "a global": lambda: set_global(0.5),
    "a namespace": lambda: setattr(SETTINGS, "scale", 0.5),
    "a global dict": lambda: TABLE.update(scale=0.5),
    "a dict in a global dict": lambda: TABLE["inner"].update(shift=0.5),
    "an attribute of a class": lambda: setattr(Block, "beta", 0.5),
}


@pytest.fixture()
def globals_put_back():
    yield
    set_global(1.0)
    SETTINGS.scale, Block.beta = 1.0, 1.0
    TABLE.update(scale=1.0, inner={"shift": 0.0})


def build() -> Net:
    torch.manual_seed(0)
    return Net().train()


def batch() -> dict:
    torch.manual_seed(1)
    return dict(x=torch.randn(4, WIDTH), y=torch.randn(4, WIDTH))


def pipeline(model, example=None, **options) -> pe.Pipeline:
    usual = dict(num_microbatches=2, num_stages=3, costs="analytic")
    return pe.Pipeline(model, example or batch(), **(usual | options))


def both(pipe, model, plain, **options) -> torch.Tensor:
    """One step of each, compared; returns the loss."""
    model.zero_grad()
    target = options.get("target")
    given = {name: value for name, value in batch().items() if target is None or name != "y"}
    expected = reference_step(plain, given, 2, [0.5, 0.5], **options)
    found = pipe.step(**given, **({} if target is None else {"target": target})), gradients(model)
    assert_same_step(expected, found, 1e-6)
    return found[0]


def recorded(pipe) -> int:
    return pipe._assembly.specializations.recorded


@pytest.mark.parametrize("habit", HABITS)
def test_what_the_loop_changes_is_seen(habit):
    """And nothing is recorded again when nothing changes, or when what was there before comes back."""
    model, plain = build(), build()
    pipe = pipeline(model)
    before = both(pipe, model, plain)
    both(pipe, model, plain)
    assert recorded(pipe) == 1
    for one in (model, plain):
        HABITS[habit](one)
    assert both(pipe, model, plain) != before
    both(pipe, model, plain)
    assert recorded(pipe) == 2


@pytest.mark.parametrize("habit", GLOBALS)
def test_globals_and_classes_are_seen(habit, globals_put_back):
    model, plain = build(), build()
    pipe = pipeline(model)
    before = both(pipe, model, plain)
    GLOBALS[habit]()
    assert both(pipe, model, plain) != before
    assert recorded(pipe) == 2


def test_what_comes_back_is_not_recorded_again():
    model, plain = build(), build()
    pipe = pipeline(model)
    for mode in ("mean", "root") * 3:
        model.config.mode = plain.config.mode = mode
        both(pipe, model, plain)
    assert recorded(pipe) == 2


def test_a_coefficient_annealed_every_step():
    model, plain = build(), build()
    pipe = pipeline(model)
    losses = set()
    for step in range(6):
        model.weight = plain.weight = 1.0 - 0.1 * step
        losses.add(both(pipe, model, plain).item())
    assert len(losses) == 6


def test_a_rate_of_dropout_set_to_zero():
    """Without it the loss is that of one process; with it, it is not."""
    model, plain = build(), build()
    model.config.drop = 0.5
    pipe = pipeline(model)
    reference = reference_step(plain, batch(), 2, [0.5, 0.5])[0]
    assert pipe.step(**batch()) != reference
    model.config.drop = 0.0
    both(pipe, model, plain)
    for module in (model, plain):
        module.blocks[0].config = Config(drop=1.0)
    both(pipe, model, plain)


class Dropped(Net):
    """With modules that drop: a rate of 0 draws no random numbers, another one does."""

    def __init__(self, rate: float):
        super().__init__()
        self.drop = nn.Dropout(rate)

    def forward(self, x, y):
        return super().forward(self.drop(x), y)


def test_a_dropout_module_switched_on_draws_the_same_for_any_cut():
    losses = []
    for num_stages in (1, 3):
        torch.manual_seed(0)
        model = Dropped(0.0).train()
        pipe = pipeline(model, num_stages=num_stages)
        pipe.step(**batch())
        model.drop.p = 0.5
        losses.append(pipe.step(**batch()))
    assert torch.equal(*losses)


# ------------------------------------------------------------------------------------------------------------ the loss

class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.smoothing, self.inner = 0.0, nn.Module()
        self.inner.factor = 1.0

    def forward(self, output, target):
        return self.inner.factor * (output - target * (1 - self.smoothing)).square().mean()


class Caller:
    def __init__(self):
        self.factor = 1.0

    def __call__(self, output, target):
        return self.factor * F.mse_loss(output, target)

    def method(self, output, target):
        return self(output, target)


def scaled(output, target, settings):
    return settings["factor"] * F.mse_loss(output, target)


def by_global(output, target):
    return helper(output, target)


def helper(output, target):
    return SCALE * F.mse_loss(output, target)


def in_closure():
    factor = {"now": 1.0}
    return lambda output, target: factor["now"] * F.mse_loss(output, target), lambda: factor.update(now=0.5)


def in_cell():
    factor = 1.0

    def loss(output, target):
        return factor * F.mse_loss(output, target)

    def change():
        nonlocal factor
        factor = 0.5
    return loss, change


def in_module(change):
    loss = Loss()
    return loss, lambda: change(loss)


def in_partial():
    settings = {"factor": 1.0}
    return functools.partial(scaled, settings=settings), lambda: settings.update(factor=0.5)


def in_object(of: Callable):
    caller = Caller()
    return of(caller), lambda: setattr(caller, "factor", 0.5)


LOSSES = {
    "a cell": in_cell,
    "a dict in a closure": in_closure,
    "a global of a helper": lambda: (by_global, lambda: set_global(0.5)),
    "a loss module": lambda: in_module(lambda loss: setattr(loss, "smoothing", 0.1)),
    "inside a loss module": lambda: in_module(lambda loss: setattr(loss.inner, "factor", 0.5)),
    "a partial": in_partial,
    "a callable object": lambda: in_object(lambda caller: caller),
    "a method": lambda: in_object(lambda caller: caller.method),
}


@pytest.mark.parametrize("habit", LOSSES)
def test_what_the_loss_reads_is_seen(habit, globals_put_back):
    model, plain = build(), build()
    loss_fn, change = LOSSES[habit]()
    target = batch()["y"]
    pipe = pipeline(model, {"x": batch()["x"]}, loss_fn=loss_fn, target=target)
    before = both(pipe, model, plain, loss_fn=loss_fn, target=target)
    both(pipe, model, plain, loss_fn=loss_fn, target=target)
    assert recorded(pipe) == 1
    change()
    assert both(pipe, model, plain, loss_fn=loss_fn, target=target) != before
    assert recorded(pipe) == 2


def test_a_torch_loss_whose_smoothing_changes():
    model, plain, loss_fn = build(), build(), nn.CrossEntropyLoss()
    target = torch.tensor([1, 2, 3, 4])
    pipe = pipeline(model, {"x": batch()["x"]}, loss_fn=loss_fn, target=target)
    before = both(pipe, model, plain, loss_fn=loss_fn, target=target)
    loss_fn.label_smoothing = 0.2
    assert both(pipe, model, plain, loss_fn=loss_fn, target=target) != before


def test_a_loss_that_counts_its_calls_is_refused_and_has_not_counted():
    class Counting(Loss):
        def forward(self, output, target):
            self.smoothing += 0.1
            return super().forward(output, target)
    loss = Counting()
    with pytest.raises(pe.CaptureError, match="smoothing"):
        pipeline(build(), {"x": batch()["x"]}, loss_fn=loss, target=batch()["y"])
    assert loss.smoothing == 0.0


# ----------------------------------------------------------------------------------- what a forward writes by itself

class Writes(Net):
    """Keeps a cache that grows, counts in a config, and sets a flag at its first call."""

    def __init__(self):
        super().__init__()
        self.longest, self.table = 0, None
        self.started = False

    def forward(self, x, y):
        self.started = True
        if len(x) > self.longest:
            self.longest = len(x)
        self.config.flags.append(False) if len(self.config.flags) < 3 else None
        return super().forward(x, y) + 0.0 * self.longest


def test_what_a_forward_writes_does_not_make_every_step_record():
    torch.manual_seed(0)
    model, plain = Writes().train(), None
    torch.manual_seed(0)
    plain = Writes().train()
    pipe = pipeline(model)
    for _ in range(4):
        both(pipe, model, plain)
    count = recorded(pipe)
    assert count <= 2
    model.weight = plain.weight = 0.5
    both(pipe, model, plain)
    assert recorded(pipe) == count + 1


def test_what_is_not_read_is_not_watched():
    model, plain = build(), build()
    model.epoch = 0
    model.config.unread = 0
    pipe = pipeline(model)
    for step in range(3):
        model.epoch = model.config.unread = step
        model.blocks[0].note = "seen"
        both(pipe, model, plain)
    assert recorded(pipe) == 1


def test_a_model_keeps_its_classes():
    """Watching leaves no trace on the classes of modules and configs."""
    before = [(cls, cls.__getattribute__, "__getattribute__" in vars(cls)) for cls in (nn.Module, Net, Config)]
    pipeline(build())
    assert before == [(cls, cls.__getattribute__, "__getattribute__" in vars(cls)) for cls, *_ in before]


# ---------------------------------------------------------------------------------------------------- grown and swapped

def test_a_layer_that_is_taken_out_or_swapped():
    model, plain = build(), build()
    model.config.layers = plain.config.layers = 6
    pipe = pipeline(model)
    both(pipe, model, plain)
    for one in (model, plain):
        one.blocks[1], one.blocks[4] = one.blocks[4], one.blocks[1]
    both(pipe, model, plain)
    for one in (model, plain):
        one.config.layers = 5
    both(pipe, model, plain)


def test_a_layer_that_grows_is_refused_by_name():
    model = build()
    model.config.layers = 9
    pipe = pipeline(model)
    pipe.step(**batch())
    model.blocks.append(Block(model.config))
    with pytest.raises(pe.InputError, match=r"blocks\.6"):
        pipe.step(**batch())
    del model.blocks[6]
    pipe.step(**batch())


# --------------------------------------------------------------------------------------------------------- over workers

def disagreeing(report) -> None:
    """One worker anneals, the other forgets to: both are told, and go on when it is mended."""
    torch.set_num_threads(1)
    model = build()
    pipe = pe.Pipeline(model, batch(), num_microbatches=2, costs="analytic")
    first = pipe.step(**batch())
    told = ""
    if pipe.rank == 0:
        model.weight = 0.5
    try:
        pipe.step(**batch())
    except pe.InputError as error:
        told = str(error)
    model.weight = 0.5
    report("seen", (first, told, pipe.step(**batch())))
    pipe.close()
    model.blocks[2].alpha = pipe.rank
    try:
        pe.Pipeline(model, batch(), num_microbatches=2, costs="analytic")
        report("construction", "")
    except pe.InputError as error:
        report("construction", str(error))


def test_workers_whose_python_differs_are_told():
    reports = launch(2, disagreeing, limit=60)
    plain = build()
    expected = [reference_step(plain, batch(), 2, [0.5, 0.5])[0]]
    plain.weight = 0.5
    expected.append(reference_step(plain, batch(), 2, [0.5, 0.5])[0])
    for report in reports:
        first, told, last = report["seen"]
        assert torch.equal(first, expected[0]) and torch.equal(last, expected[1])
        assert "weight: worker 0 has 0.5, worker 1 has 1.0" in told
        assert "reads from Python" in report["construction"]


def test_copies_of_a_model_do_not_share_a_watch():
    model = build()
    pipe = pipeline(model)
    first = pipe.step(**batch())
    copy.deepcopy(model).weight = 0.1
    assert torch.equal(pipe.step(**batch()), first) and recorded(pipe) == 1
