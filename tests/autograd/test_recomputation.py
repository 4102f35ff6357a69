"""Recomputation: what may run twice, where, and that running twice changes no bit."""
import itertools

import pytest
import torch
from torch import nn

from pipeengine.autograd import Recompute, check_recomputable, checkpoint_block
from pipeengine.errors import InputError
from pipeengine.rng import RngStreams, place_number
from pipeengine.tracing import Inputs, Recording, capture

CPU = torch.device("cpu")


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
        self.b = nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(self.a(x))).square().mean()


MODEL = Nested()
PATHS = [path for path, _ in MODEL.named_modules() if path]


def recording(model: nn.Module = MODEL) -> Recording:
    return capture(model, Inputs((torch.ones(2, 4),), {}))


RECORDING = recording()


# -- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stages", (1, 2, 5))
def test_all_or_nothing(num_stages):
    assert Recompute.of(True, num_stages, MODEL) == Recompute(frozenset(range(num_stages)))
    assert Recompute.of(False, num_stages, MODEL) == Recompute.of((), num_stages, MODEL) == Recompute()


def test_stages_and_modules_may_be_mixed():
    assert Recompute.of([1, "a.0", 0, "b"], 3, MODEL) == Recompute(frozenset({0, 1}), frozenset({"a.0", "b"}))
    assert Recompute.of("a", 3, MODEL).modules == {"a"}, "one path is not five letters"


@pytest.mark.parametrize(("asked", "words"), [
    ([0, 3], r"stages \[3\]; there are stages 0 to 2"), ([-1], r"stages \[-1\]"), ([""], "'', which is no module"),
    (["a.7"], r"'a.7', which is no module of the model; its modules are a, a.0, a.1 ...")])
def test_what_there_is_not_is_refused(asked, words):
    with pytest.raises(InputError, match=words):
        Recompute.of(asked, 3, MODEL)


@pytest.mark.parametrize("paths", [paths for n in range(4) for paths in itertools.combinations(PATHS, n)], ids=str)
def test_spans_are_the_calls_of_the_named_modules(paths):
    """In order, apart from each other; a node lies in one exactly when a named module is around it."""
    spans = Recompute(modules=frozenset(paths)).spans(RECORDING)
    assert all(start < end for start, end in spans) and all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))
    for index, node in enumerate(RECORDING.nodes):
        path = node.name.partition(":")[0].partition("#")[0]
        inside = any(path == asked or path.startswith(f"{asked}.") for asked in paths)
        assert inside == any(start <= index < end for start, end in spans), node.name


def test_a_module_that_is_called_twice_has_two_spans():
    assert Recompute(modules=frozenset({"a"})).spans(RECORDING) == ((0, 3), (3, 6))


# -- what may run twice -----------------------------------------------------------------------------------------------


def test_a_change_of_what_is_outside_is_refused_by_name():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count.add_(1)
            return self.layer(x).mul_(2).mean()
    made = recording(Counting())
    with pytest.raises(InputError, match="stage 1 cannot be recomputed: .* changes count in place"):
        check_recomputable(made, made.nodes, "stage 1")
    inside = [node for node in made.nodes if not node.writes & {v.storage for v in made.values if v.name == "count"}]
    assert any(node.writes for node in inside)
    check_recomputable(made, inside, "stage 1")     # mul_ changes only what the second forward makes anew


# -- running twice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", (0, 5, 1 << 40))
def test_a_block_runs_twice_with_the_same_bits(key):
    """Dropout included: gradients are those of one run, and the global random state is left alone."""
    rng, calls = RngStreams(CPU), []
    layer = nn.Linear(8, 8)

    def block(x):
        calls.append(1)
        rng(place_number("here"))
        return (nn.functional.dropout(layer(x).tanh(), 0.5),)
    gradients = []
    for run in (lambda x: block(x), lambda x: checkpoint_block(block, rng, x)):
        x = torch.linspace(-1, 1, 8).repeat(3, 1).requires_grad_()
        states = rng.enter(key)
        out, = run(x)
        rng.leave(states)
        before = torch.get_rng_state()
        layer.zero_grad()
        rng.key = key + 1           # by the time of backward other micro-batches have run
        out.square().sum().backward()
        assert torch.equal(before, torch.get_rng_state())
        gradients.append((out.detach(), x.grad, layer.weight.grad, layer.bias.grad))
    assert len(calls) == 3, "once plainly, then once and again"
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
