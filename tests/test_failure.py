"""What goes wrong on one worker is the same error on every worker, soon, and says what happened."""
import signal
import time
import traceback
from functools import cache
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import zoo
from torch import nn
from workers import Workers

import pipeengine as pe

NUM_WORKERS = 3
SOON = 20       # seconds; only so that a test never hangs, whatever else the machine does


class Fuse(torch.autograd.Function):
    """The identity, until it is lit."""
    lit: tuple[str, type[BaseException]] | None = None

    @staticmethod
    def _burn(place: str) -> None:
        if Fuse.lit is not None and Fuse.lit[0] == place:
            raise Fuse.lit[1]("boom")

    @staticmethod
    def forward(ctx, x):
        Fuse._burn("forward")
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Fuse._burn("backward")
        return grad


class Fused(zoo.Blocks):
    def __init__(self, width: int = zoo.WIDTH):
        super().__init__()
        self.blocks.extend(zoo.Block() for _ in range(2))

    def forward(self, x, y):
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 2:
                x = Fuse.apply(x)
        return self.loss(x, y)


BATCH = zoo.regression()[0]


def pipeline(model: nn.Module | None = None, example=BATCH, **options) -> pe.Pipeline:
    options = dict(num_microbatches=4, schedule="1f1b", costs="analytic") | options
    return pe.Pipeline(zoo.seeded(Fused)() if model is None else model, example, **options)


def outcome(what) -> tuple[str, str]:
    """The kind and the text of the error that ``what()`` raises."""
    try:
        what()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


# ------------------------------------------------------------------------------------------------- during a step

def explosion(place: str, kind: type[BaseException]):
    """The second step fails on the stage with the fuse; afterwards a new pipeline on the same workers trains."""
    def scenario():
        pipe = pipeline()
        first = pipe.step(**BATCH)
        held = {n: p.grad.clone() for n, p in pipe.named_parameters()}
        Fuse.lit = place, kind
        failed = outcome(lambda: pipe.step(**BATCH))
        Fuse.lit = None
        again = outcome(lambda: pipe.step(**BATCH))
        anew = pipeline()
        equal = (torch.equal(anew.step(**BATCH), first)
                 and all(torch.equal(p.grad, held[n]) for n, p in anew.named_parameters()))
        anew.close()
        return failed, again, equal
    return scenario


EXPLOSIONS = {f"{place}-{kind.__name__}": explosion(place, kind)
              for place in ("forward", "backward") for kind in (ValueError, MemoryError)}


# ------------------------------------------------------------------------------------- before a step: nothing is lost

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def bad_batch(make):
    """A batch that cannot be used is an ``InputError``; the next good one trains as ever."""
    def scenario():
        pipe = pipeline()
        first = pipe.step(**BATCH)
        for parameter in pipe.parameters():
            parameter.grad = None
        failed = outcome(lambda: pipe.step(**make()))
        untouched = all(p.grad is None for p in pipe.parameters())
        equal = torch.equal(pipe.step(**BATCH), first)
        pipe.close()
        return failed, untouched, equal
    return scenario


def on_one(changed: dict) -> dict:
    return BATCH | changed if rank() == dist.get_world_size() - 1 else BATCH


BAD_BATCHES = {
    "empty": (lambda: {name: value[:0] for name, value in BATCH.items()}, "empty"),
    "wrong width": (lambda: BATCH | dict(x=BATCH["x"][..., :5]), "blocks.0.norm"),
    "unknown name": (lambda: BATCH | dict(z=BATCH["x"]), "z"),
    "missing": (lambda: dict(x=BATCH["x"]), "y"),
    "no tensors": (lambda: dict(x=1, y=2), "rows"),
    "wants a gradient": (lambda: BATCH | dict(x=BATCH["x"].clone().requires_grad_()), "gradient"),
}
BAD_ON_ONE = {
    "another batch": (lambda: on_one(dict(x=BATCH["x"] + 1)), "batch"),
    "one number differs": (lambda: on_one(dict(y=BATCH["y"].index_fill(0, torch.tensor([3]), 0.5))), "batch"),
    "another length": (lambda: on_one({n: v[:, :3] for n, v in BATCH.items()}), "batch"),
    "empty on one": (lambda: on_one({n: v[:0] for n, v in BATCH.items()}), "empty"),
    "wrong width on one": (lambda: on_one(dict(x=BATCH["x"][..., :5])), "size[2, 6, 5]"),
}


# ------------------------------------------------------------------------------------------------------ construction

def other_plan() -> pe.Plan:
    model = zoo.AWKWARD["CalledTwice"].build()
    return pe.Pipeline(model, BATCH, num_stages=NUM_WORKERS, costs="analytic").plan


def broken_planning() -> pe.Pipeline:
    """Only the first worker plans; what breaks there need not be an error of ours."""
    with mock.patch("pipeengine.assembly.partition", side_effect=RuntimeError("no plan today")):
        return pipeline()


def odd(value, other):
    """Another value on the last worker."""
    return value if rank() < dist.get_world_size() - 1 else other


def changed(change) -> nn.Module:
    """The model, changed on the last worker."""
    model = zoo.seeded(Fused)()
    if rank() == dist.get_world_size() - 1:
        change(model)
    return model


def own_order(late: bool):
    """A schedule of the user's own: gpipe, or 1f1b under the same name."""
    def mine(num_workers: int, num_microbatches: int):
        return pe.build("1f1b" if late else "gpipe", num_workers=num_workers, num_microbatches=num_microbatches)
    return mine


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(zoo.WIDTH, zoo.WIDTH)

    def forward(self, x, y):
        return nn.functional.mse_loss(self.linear(x), y)


WRONG = {
    # what, the error, what its text names
    "more stages than nodes": (lambda: pipeline(Tiny(), num_stages=NUM_WORKERS), "PartitionError", ("3",)),
    "unknown schedule": (lambda: pipeline(schedule="sideways"), "ScheduleError", ("sideways", "1f1b")),
    "no model": (lambda: pipeline(model=[1]), "InputError", ("list", "Module")),
    "no microbatches": (lambda: pipeline(num_microbatches=0), "InputError", ("0", "num_microbatches")),
    "no example": (lambda: pipeline(example=3), "InputError", ("example", "int")),
    "negative stages": (lambda: pipeline(num_stages=-1), "InputError", ("-1", "num_stages")),
    "unknown costs": (lambda: pipeline(costs="guessed"), "InputError", ("guessed", "analytic")),
    "unknown batch_dims": (lambda: pipeline(batch_dims={"z": 0}), "InputError", ("z", "x")),
    "empty example": (lambda: pipeline(example={n: v[:0] for n, v in BATCH.items()}), "InputError", ("empty",)),
    "file is no plan": (lambda: pipeline(plan=__file__, num_stages=NUM_WORKERS), "PlanError", ("no plan",)),
    "no such file": (lambda: pipeline(plan="/nonexistent/plan.json", num_stages=NUM_WORKERS),
                     "", ("/nonexistent/plan.json",)),
    "no loss": (lambda: pipeline(zoo.AWKWARD["Classifier"].build(), example=dict(x=BATCH["x"])),
                "CaptureError", ("loss_fn",)),
    "all frozen": (lambda: pipeline(zoo.seeded(Fused)().requires_grad_(False)), "InputError", ("frozen",)),
}
WRONG_ON_ONE = {
    "other microbatches": (lambda: pipeline(num_microbatches=odd(4, 2)), "InputError", ("num_microbatches", "4", "2")),
    "other models": (lambda: pipeline(odd(zoo.AWKWARD["LongSkips"].build(), zoo.AWKWARD["CalledTwice"].build())),
                     "InputError", ("model",)),
    "other schedules": (lambda: pipeline(schedule=odd("gpipe", "1f1b")), "InputError", ("schedule", "gpipe", "1f1b")),
    "other seeds": (lambda: pipeline(seed=odd(1, 2)), "InputError", ("seed", "1", "2")),
    "other recomputation": (lambda: pipeline(recompute=odd(True, {0})), "InputError",
                            ("recompute", "[0, 1, 2]", "[0]")),
    "planning breaks": (broken_planning, "WorkerError RuntimeError", ("no plan today",)),
    "other mode": (lambda: pipeline(odd(zoo.seeded(Fused)(), zoo.seeded(Fused)().eval())), "InputError",
                   ("the mode of the model", "worker 0 has train, worker 2 has eval")),
    "one mode": (lambda: pipeline(changed(lambda m: m.blocks[1].eval())), "InputError", ("blocks.1", "train", "eval")),
    "one frozen": (lambda: pipeline(changed(lambda m: m.blocks[1].requires_grad_(False))), "InputError",
                   ("requires_grad of blocks.1", "worker 0 has True, worker 2 has False")),
    "other loss weight": (lambda: pipeline(loss_weight=odd(lambda x, y: 1.0, lambda x, y: 2.0)), "InputError",
                          ("loss_weight", "code")),
    "loss weight on one": (lambda: pipeline(loss_weight=odd(None, len)), "InputError", ("loss_weight", "None", "len")),
    "other check": (lambda: pipeline(check=odd(True, False)), "InputError", ("check", "True", "False")),
    "other order": (lambda: pipeline(schedule=odd(own_order(False), own_order(True))), "InputError",
                    ("the schedule's order",)),
    "bad option on one": (lambda: pipeline(num_microbatches=odd(4, 0)), "InputError", ("0",)),
    "stages not a multiple": (lambda: pipeline(num_stages=NUM_WORKERS + 1), "InputError", ("4", "3")),
}


def scenarios(report) -> None:
    """On every worker, all of the above in turn."""
    table = {**EXPLOSIONS, **{name: bad_batch(make) for name, (make, _) in (BAD_BATCHES | BAD_ON_ONE).items()},
             **{name: lambda what=what: outcome(what) for name, (what, _, _) in (WRONG | WRONG_ON_ONE).items()}}
    for name, scenario in table.items():
        try:
            report(name, scenario())
        except Exception:
            report(name, traceback.format_exc())
            raise


@cache
def workers() -> Workers:
    found = Workers(NUM_WORKERS, scenarios, limit=300)
    found.join()
    return found


def found(name: str) -> list:
    answers = [worker.reports.get(name) for worker in workers().workers]
    assert not any(answer is None or isinstance(answer, str) for answer in answers), workers().account()
    return answers


@pytest.mark.parametrize("name", EXPLOSIONS)
def test_every_worker_raises_the_root_cause(name):
    place, kind = name.split("-")
    for failed, again, equal in found(name):
        assert failed[0] == "WorkerError" and f"{kind}: boom" in failed[1] and "worker 1" in failed[1], failed
        assert "step 1" in failed[1] and "stage 1" in failed[1] and place in failed[1] and "micro-batch 0" in failed[1]
        assert again[0] == "WorkerError" and "closed" in again[1] and "boom" in again[1]
        assert equal, "a new pipeline on the same group trains as the first did"


@pytest.mark.parametrize("name", BAD_BATCHES | BAD_ON_ONE)
def test_a_bad_batch_is_refused_everywhere_and_loses_nothing(name):
    for failed, untouched, equal in found(name):
        assert failed[0] == "InputError" and (BAD_BATCHES | BAD_ON_ONE)[name][1] in failed[1], failed
        assert untouched and equal


@pytest.mark.parametrize("name", WRONG | WRONG_ON_ONE)
def test_wrong_options_are_refused_everywhere(name):
    _, kind, words = (WRONG | WRONG_ON_ONE)[name]
    for error, text in found(name):
        assert error in (kind or "InputError PlanError").split(), (error, text)
        assert all(word in text for word in words), text


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_bad_batch_is_refused_in_one_process(name):
    make, word = BAD_BATCHES[name]
    pipe = pipeline(num_stages=2)
    first = pipe.step(**BATCH)
    with pytest.raises(pe.InputError, match=word):
        pipe.step(**make())
    assert torch.equal(pipe.step(**BATCH), first)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_refused_in_one_process(name, monkeypatch):
    what, kind, words = WRONG[name]
    error, text = outcome(what)
    if name in ("unknown schedule", "no model", "no microbatches", "no example", "unknown costs"):
        assert error == kind and all(word in text for word in words), (error, text)
    else:
        assert error in ("nothing", kind) or not kind, (error, text)


def test_a_plan_of_another_model_is_refused():
    plan = other_plan()
    with pytest.raises(pe.PlanError, match="another model"):
        pipeline(num_stages=NUM_WORKERS, plan=plan)
    with pytest.raises(pe.PlanError, match=f"{NUM_WORKERS} stages.*2"):
        pipeline(num_stages=2, plan=plan)


# ----------------------------------------------------------------------------------------------------------- signals

def endless(report) -> None:
    # A test run that was started in the background ignores Ctrl-C, and its children would too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pipe = pipeline()
    pipe.step(**BATCH)
    report("training")
    while True:
        pipe.step(**BATCH)


@pytest.mark.parametrize(("number", "ranks"), [
    (signal.SIGINT, (2,)), (signal.SIGINT, (0, 1, 2)), (signal.SIGKILL, (0,)), (signal.SIGTERM, (1,)),
    pytest.param(signal.SIGINT, (0,), marks=pytest.mark.slow),
    pytest.param(signal.SIGKILL, (1,), marks=pytest.mark.slow)])
def test_a_signal_ends_all(number, ranks):
    """Ctrl-C or a kill of some workers: the others are not left waiting, and do not pretend that all went well."""
    running = Workers(NUM_WORKERS, endless, limit=240)
    running.wait_for("training")
    for one in ranks:
        running.signal(one, number)
    start = time.monotonic()
    running.join()
    took = time.monotonic() - start
    assert took < SOON and all(running.exit_codes), f"{took:.1f} s, {running.exit_codes}\n{running.account()}"
    for one, worker in enumerate(running.workers):
        if one not in ranks:
            assert "WorkerError" in worker.error, running.account()
