"""Dataflow of recordings written by hand: what is needed, what any stage may repeat, what memory ties together."""
import random

import pytest
import torch

from pipeengine.errors import CaptureError
from pipeengine.tracing import dataflow
from pipeengine.tracing.modes import Modes
from pipeengine.tracing.recording import Guard, Node, NodeCost, Recording, Ref, TensorSpec, Value, node_refs

GRAD, PLAIN = True, False


class Written:
    """A recording, written node by node; values are numbers in the order in which they are named."""

    def __init__(self):
        self.values, self.nodes, self.guards, self.buffers = [], [], [], set()
        self._storage = 0

    def _value(self, kind, name, node, gradient, storage, shape=(4,)):
        if storage is None:
            self._storage += 1
            storage = self._storage
        spec = TensorSpec(shape, torch.float32, (1,), gradient)
        self.values.append(Value(kind, name, node, spec, storage))
        return len(self.values) - 1

    def given(self, kind, name, gradient=PLAIN, shape=(4,)):
        """An input, an attribute (a buffer unless it wants a gradient) or a constant."""
        if kind == "attribute" and not gradient:
            self.buffers.add(name)
        return self._value(kind, name, -1, gradient, None, shape)

    def node(self, name, reads, gradient=PLAIN, *, writes=(), view_of=None, flops=0, effect=False, target=None,
             results=1):
        """A step; ``writes`` are values whose memory it changes, its result lies in that of ``view_of``."""
        index = len(self.nodes)
        storage = None if view_of is None else self.values[view_of].storage
        made = tuple(self._value("result", "", index, gradient, storage) for _ in range(results))
        self.nodes.append(Node(name, target or torch.add, False, tuple(map(Ref, reads)), {}, made, ("",) * results, 0,
                               Modes(True, False, ()), frozenset(self.values[v].storage for v in writes), (), False,
                               effect, False, NodeCost(flops)))
        return made[0] if made else None

    def recording(self, loss, output=None):
        inputs = tuple(n for n, value in enumerate(self.values) if value.kind == "input")
        return Recording(tuple(self.values), tuple(self.nodes), (), tuple(self.guards), inputs,
                         Ref(loss) if output is None else output, loss, {}, {}, frozenset(self.buffers))

    def names(self, indices):
        return [self.nodes[index].name for index in sorted(indices)]


def analysed(written, loss, **options):
    return dataflow.analyse(written.recording(loss, **options), outputs=False)


def test_what_the_loss_does_not_need_is_dead():
    """A branch that only the output wants lives in evaluation alone."""
    w = Written()
    x, weight = w.given("input", "x"), w.given("attribute", "weight", GRAD)
    hidden = w.node("hidden", (x, weight), GRAD, flops=100)
    shown = w.node("shown", (hidden,), GRAD, flops=100)
    loss = w.node("loss", (hidden,), GRAD, flops=100)
    flow = analysed(w, loss)
    assert w.names(flow.live) == ["hidden", "loss"] == w.names(flow.placed)
    assert flow.wants_gradient == {weight, hidden, loss} and flow.before == {0: (), 1: (0,), 2: (0,)}
    whole = dataflow.analyse(w.recording(loss, output=(Ref(shown), Ref(loss))), outputs=True)
    assert whole.goals == (shown, loss) and w.names(whole.live) == ["hidden", "shown", "loss"]
    assert whole.wants_gradient == frozenset(), "nothing goes back in evaluation"


def test_no_loss_is_refused_with_what_to_pass():
    w = Written()
    w.node("hidden", (w.given("input", "x"),))
    with pytest.raises(CaptureError, match="pass loss_fn="):
        dataflow.analyse(w.recording(None, output=()), outputs=False)


def test_masks_and_positions_are_computed_wherever_they_are_needed():
    """From inputs, constants and small buffers, cheap and without gradient; what follows from a weight is not."""
    w = Written()
    x, weight = w.given("input", "x"), w.given("attribute", "weight", GRAD)
    table, fixed = w.given("attribute", "table"), w.given("constant", "")
    large = w.given("attribute", "large", shape=(1 << 23,))
    mask = w.node("mask", (x, table, fixed), flops=1)
    bias = w.node("bias", (mask,), flops=1)
    from_large = w.node("from large", (large,), flops=1)
    heavy = w.node("heavy", (x,), flops=500)
    hidden = w.node("hidden", (x, weight, bias, from_large, heavy), GRAD, flops=500)
    frozen = w.node("statistics", (hidden,), PLAIN, flops=1)
    loss = w.node("loss", (hidden, frozen), GRAD)
    flow = analysed(w, loss)
    assert w.names(flow.replicated) == ["mask", "bias"]
    assert w.names(flow.placed) == ["from large", "heavy", "hidden", "statistics", "loss"]


def test_an_effect_keeps_its_place():
    """A hook set on a tensor that matters, matters, though nobody reads what it returns; one on a dead one does not."""
    w = Written()
    x, weight = w.given("input", "x"), w.given("attribute", "weight", GRAD)
    hidden = w.node("hidden", (x, weight), GRAD)
    dead = w.node("dead", (x, weight), GRAD)
    w.node("hook", (hidden,), effect=True, results=0)
    w.node("hook on the dead", (dead,), effect=True, results=0)
    loss = w.node("loss", (hidden,), GRAD)
    flow = analysed(w, loss)
    assert w.names(flow.live) == ["hidden", "hook", "loss"]
    assert not flow.replicated


def test_who_changes_memory_stays_with_who_reads_it_until_then():
    """``y = x + w; z = y[:2]; y.add_(1)``: the reader of ``z`` before the change too; one after the last may leave."""
    w = Written()
    x, weight = w.given("input", "x"), w.given("attribute", "weight", GRAD)
    y = w.node("y", (x, weight), GRAD, flops=9)
    z = w.node("z", (y,), GRAD, view_of=y)
    early = w.node("early", (z, weight), GRAD, flops=9)
    changed = w.node("add_", (y,), GRAD, writes=(y,), view_of=y)
    late = w.node("late", (z, weight), GRAD, flops=9)
    loss = w.node("loss", (early, changed, late), GRAD, flops=9)
    flow = analysed(w, loss)
    assert [w.names(group) for group in flow.groups] == [["y", "z", "early", "add_"]]
    assert 3 in flow.before[4], "late sees the change, though it reads another name for the memory"
    assert 3 not in flow.before[2]


def test_who_touches_a_buffer_that_changes_stays_together():
    """Running statistics outlive the step: whoever reads them at all is in the stage of who writes."""
    w = Written()
    x, weight, mean = w.given("input", "x"), w.given("attribute", "weight", GRAD), w.given("attribute", "mean")
    w.node("update", (x, mean), writes=(mean,), flops=50)
    hidden = w.node("hidden", (x, weight), GRAD, flops=50)
    shifted = w.node("shifted", (hidden, mean), GRAD, flops=50)
    loss = w.node("loss", (shifted,), GRAD)
    flow = analysed(w, loss)
    assert "update" in w.names(flow.live), "nobody reads its result, but the next step reads the buffer"
    assert [w.names(group) for group in flow.groups] == [["update", "shifted"]]
    assert not flow.replicated, "a buffer that changes is not the same everywhere"


def test_what_a_placed_node_changes_is_not_repeated_elsewhere():
    """A mask from the input alone, into which a weight's value is written: nor is what was made from it."""
    w = Written()
    x, weight = w.given("input", "x"), w.given("attribute", "weight", GRAD)
    mask = w.node("mask", (x,))
    view = w.node("view", (mask,), view_of=mask)
    alone = w.node("alone", (x,))
    w.node("fill_", (mask, weight), GRAD, writes=(mask,), view_of=mask, flops=100)
    loss = w.node("loss", (view, alone, weight), GRAD, flops=100)
    flow = analysed(w, loss)
    assert w.names(flow.replicated) == ["alone"]
    assert [w.names(group) for group in flow.groups] == [["mask", "view", "fill_"]]


def test_an_input_that_a_placed_node_changes_holds_its_readers_together():
    w = Written()
    x, weight = w.given("input", "x"), w.given("attribute", "weight", GRAD)
    w.node("add_", (x, weight), writes=(x,), flops=100)
    hidden = w.node("hidden", (weight,), GRAD, flops=100)
    late = w.node("late", (x, hidden), GRAD, flops=100)
    loss = w.node("loss", (late,), GRAD)
    assert [w.names(group) for group in analysed(w, loss).groups] == [["add_", "late"]]


def clamp_(*_):
    """A clamp to fixed bounds, by its name."""


clamp_.__name__ = "clamp_"


def test_a_parameter_that_the_forward_changes_is_refused():
    """Other micro-batches need it as it was; clamping it to fixed bounds finds the second time what the first left."""
    for reads, target, allowed in (((), torch.Tensor.mul_, False), ((), clamp_, True), (("x",), clamp_, False)):
        w = Written()
        x, weight = w.given("input", "x"), w.given("attribute", "layer.weight", GRAD)
        w.node("change", (weight, *(x for _ in reads)), writes=(weight,), view_of=weight, target=target)
        loss = w.node("loss", (x, weight), GRAD)
        if allowed:
            assert analysed(w, loss).live
        else:
            with pytest.raises(CaptureError, match="changes the parameter layer.weight in place .at change"):
                analysed(w, loss)


def test_a_guard_on_a_buffer_that_changes_is_found_through_what_follows_from_it():
    w = Written()
    x, count = w.given("input", "x"), w.given("attribute", "count")
    doubled = w.node("doubled", (count,))
    guard = Guard(torch.Tensor.item, (Ref(doubled),), {}, 1.0, 1, "", "here")
    harmless = Guard(torch.Tensor.item, (Ref(x),), {}, 1.0, 1, "", "there")
    w.guards = [harmless, guard]
    assert dataflow.unstable_guard(w.recording(doubled)) is None, "nobody writes"
    w.node("add_", (count,), writes=(count,), view_of=count)
    assert dataflow.unstable_guard(w.recording(doubled)) is guard
    w.guards = [harmless]
    assert dataflow.unstable_guard(w.recording(doubled)) is None


# -- laws over drawn recordings ---------------------------------------------------------------------------------------


def drawn(seed):
    """Up to 14 nodes over inputs, weights and buffers, some views, some writes to results."""
    draw, w = random.Random(seed), Written()
    for number in range(3):
        w.given("input", f"x{number}")
    for number in range(3):
        w.given("attribute", f"p{number}", GRAD)
    w.given("attribute", "b0")
    for number in range(draw.randint(3, 14)):
        reads = draw.sample(range(len(w.values)), draw.randint(1, 3))
        results = [v for v in range(len(w.values)) if w.values[v].kind == "result"]
        changed = [draw.choice(results)] if results and draw.random() < 0.2 else []
        viewed = changed[0] if changed else draw.choice(reads) if draw.random() < 0.2 else None
        gradient = any(w.values[v].spec.requires_grad for v in (*reads, *changed)) and draw.random() < 0.9
        w.node(f"n{number}", (*reads, *changed), gradient, writes=changed, view_of=viewed,
               flops=draw.choice((0, 1, 99)))
    loss = w.node("loss", draw.sample(range(len(w.values) - 4, len(w.values)), 3), GRAD, flops=5)
    return w, loss


@pytest.mark.parametrize("seed", range(60))
def test_laws_of_any_recording(seed):
    w, loss = drawn(seed)
    recording = w.recording(loss)
    try:
        flow = dataflow.analyse(recording, outputs=False)
    except CaptureError as error:
        assert "in place" in str(error)
        return
    live, values = set(flow.live), recording.values
    for index in live:
        node = recording.nodes[index]
        assert set(flow.before[index]) <= live, "what a live node sees is live"
        assert all(earlier < index for earlier in flow.before[index])
        assert all(values[v].node in flow.before[index] for v in node_refs(node) if values[v].node >= 0)
    for index in flow.replicated:
        node = recording.nodes[index]
        assert set(flow.before[index]) <= flow.replicated, "what any stage repeats needs no stage"
        assert not any(values[v].kind == "attribute" and values[v].spec.requires_grad for v in node_refs(node))
        assert not any(values[v].spec.requires_grad for v in node.results)
    for group in flow.groups:
        assert len(group) > 1 and group <= live - flow.replicated
    for storage, indices in dataflow._writers(recording).items():
        placed = [i for i in indices if i in live and i not in flow.replicated]
        assert not placed or any(set(placed) <= group for group in flow.groups) or len(placed) == 1, storage
    assert loss in flow.wants_gradient
    for value in flow.wants_gradient - {loss}:
        assert values[value].spec.requires_grad
