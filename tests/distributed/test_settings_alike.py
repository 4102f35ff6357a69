"""What changes after construction must change on every worker: an error that names it before the step, not a loss that
is a little wrong."""
import contextlib

import pytest
import torch
from torch import nn
from workers import Workers

import pipeengine as pe
from pipeengine.distributed.workers import ProcessGroupWorkers
from pipeengine.errors import InputError
from pipeengine.tracing import ModelFlags, current_modes, settings_digest, settings_of


class Model(nn.Module):
    """A tied table, dropout of two kinds, and a number that the forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)) for _ in range(4))
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.table.weight
        self.scale, self.drop = 1.0, 0.1

    def forward(self, ids):
        hidden = self.table(ids)
        for block in self.blocks:
            hidden = self.scale * nn.functional.dropout(block(hidden), self.drop, self.training)
        return nn.functional.cross_entropy(self.head(hidden), ids)


def set_to(thing: object, name: str, value: object) -> None:
    setattr(thing, name, value)


# What is set on one worker alone and what the error says of it; ``undo`` sets it back.
CHANGES = {
    "eval": (lambda m: m.eval(), lambda m: m.train(),
             "the mode of the model: worker 0 has {train}, worker 1 has {eval}"),
    "one module in eval": (lambda m: m.blocks[2].eval(), lambda m: m.train(), "the mode of blocks.2: worker"),
    "frozen": (lambda m: m.blocks[3][0].weight.requires_grad_(False),
               lambda m: m.blocks[3][0].weight.requires_grad_(True), "requires_grad of blocks.3.0.weight: worker"),
    "frozen and shared": (lambda m: m.head.weight.requires_grad_(False), lambda m: m.requires_grad_(True),
                          "requires_grad of table.weight: worker"),
    "dropout": (lambda m: set_to(m.blocks[1][1], "p", 0.5), lambda m: set_to(m.blocks[1][1], "p", 0.1),
                "the dropout rate of blocks.1.1: worker"),
    "dropout in a forward": (lambda m: set_to(m, "drop", 0.5), lambda m: set_to(m, "drop", 0.1), ".drop: worker"),
    "a number": (lambda m: set_to(m, "scale", 2.0), lambda m: set_to(m, "scale", 1.0), ".scale: worker"),
}


def unlike(report, odd: int) -> None:
    """Each change on worker ``odd`` alone, for a step and for an evaluation; then autocast; then all is well."""
    torch.manual_seed(0)
    model, batch = Model(), {"ids": torch.arange(4)}
    pipe = pe.Pipeline(model, batch, num_microbatches=2, costs="analytic")
    pipe.step(**batch)

    def tell(name: str, call) -> None:
        try:
            call(**batch)
            report(name, "nothing")
        except InputError as error:
            report(name, str(error))
    for name, (do, undo, _) in CHANGES.items():
        for call in (pipe.step, pipe.evaluate):
            if pipe.rank == odd:
                do(model)
            tell(f"{name} {call.__name__}", call)
            if pipe.rank == odd:
                undo(model)
    with torch.autocast("cpu", torch.bfloat16) if pipe.rank == odd else contextlib.nullcontext():
        tell("autocast", pipe.step)
    report("steps", (pipe._runner.progress.step, float(pipe.step(**batch))))
    model.eval().requires_grad_(False)         # on every worker: no error
    model.blocks.requires_grad_(True)
    model.blocks[0][1].p = model.drop = 0.4
    with torch.autocast("cpu", torch.bfloat16):
        report("alike", float(pipe.step(**batch)))
    pipe.close()


@pytest.mark.parametrize("odd", [1])
def test_what_one_worker_changes_is_named_on_all(odd):
    """Was silent: off by 0.05 (mode), 0.8 (autocast), 0.003 (frozen)."""
    running = Workers(2, unlike, odd, limit=120)
    for report in running.join():
        for name, (_, _, words) in CHANGES.items():
            for call in ("step", "evaluate"):
                text = report.get(f"{name} {call}", running.account())
                assert text.startswith("workers disagree on ") and words.format(train="train", eval="eval") in text, \
                    (name, call, text)
                assert "worker 0 has" in text and "worker 1 has" in text and "on every worker" in text
        assert "disagree on autocast: worker 0 has off, worker 1 has cpu in torch.bfloat16" in report["autocast"]
        assert report["steps"][0] == 1, "a step that is refused has not happened"
        assert report["steps"][1] == report["steps"][1] and report["alike"] > 0, running.account()


# ------------------------------------------------------------------------------------------- without any process

def digest(model: nn.Module) -> int:
    return settings_digest(ModelFlags(model).now(), current_modes().autocast)


def test_the_digest_sees_what_the_names_tell():
    """Whatever changes one of the names' values, dropout rates aside, which are read while recording, changes it."""
    model = Model()
    known, named = digest(model), settings_of(model)
    for name in ("eval", "one module in eval", "frozen", "frozen and shared"):
        do, undo, _ = CHANGES[name]
        do(model)
        assert digest(model) != known and settings_of(model) != named, name
        undo(model)
        assert digest(model) == known and settings_of(model) == named, name
    with torch.autocast("cpu", torch.bfloat16):
        assert digest(model) != known and settings_of(model)["autocast"] == "cpu in torch.bfloat16"
    with torch.autocast("cpu", torch.float16):
        assert settings_of(model)["autocast"] == "cpu in torch.float16"
    assert named["the dropout rate of blocks.0.1"] == 0.1 and named["autocast"] == "off"


def test_the_digest_is_the_same_where_a_shared_parameter_is_not_held():
    """There its two names stand for two parameters on meta, here for one."""
    held, elsewhere = Model(), Model()
    for module in (elsewhere.table, elsewhere.head):
        module.weight = nn.Parameter(module.weight.detach().to("meta"))
    assert digest(held) == digest(elsewhere) and settings_of(held) == settings_of(elsewhere)


@pytest.mark.parametrize("first, other, told, words", [
    (0, 1, [{"a": "1", "b": "2"}, {"a": "1", "b": "3"}], "disagree on b: worker 0 has 2, worker 1 has 3"),
    (1, 2, [{"a": "0"}, {"a": "1"}, {"a": "2"}], "disagree on a: worker 1 has 1, worker 2 has 2"),
    (0, 1, [{"a": "1"}, {"a": "1"}], None), (0, 1, [{"a": "1"}, {}], None), (0, 1, [{}, {}], None)])
def test_the_first_difference_is_named(first, other, told, words):
    if words is None:
        ProcessGroupWorkers._name_difference(first, other, told)
    else:
        with pytest.raises(InputError, match=words):
            ProcessGroupWorkers._name_difference(first, other, told)
