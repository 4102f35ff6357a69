"""Tensors inside nested objects: found in one order, replaced, and put back as they were."""
import dataclasses
from collections import OrderedDict, namedtuple

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

from pipeengine.tracing.modes import current_modes, switch
from pipeengine.tracing.module_state import difference, python_state, restore
from pipeengine.tracing.pytree import leaves, tensors, tree_encode, tree_map
from pipeengine.tracing.recording import Ref, fill

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Box:
    content: object
    label: str = "box"


A, B = torch.ones(2), torch.zeros(3)
NESTED = {
    "tensor": A,
    "tuple": (A, 1, "text", None),
    "list of dicts": [{"a": A}, {"b": B, "c": [A]}],
    "named tuple": Pair(A, (B, 2)),
    "dataclass": Box([A, Box(B)]),
    "ordered dict": OrderedDict(x=A, y=(B,)),
    "slice": (slice(0, A), B),
    "model output": CausalLMOutput(loss=A.sum(), logits=B),
    "nothing": (1, 2.0, [], {}),
}


@pytest.mark.parametrize("name", NESTED)
def test_mapping_keeps_the_structure(name):
    """Replaced by themselves, tensors leave an equal object of the same types; the first one stays as it is."""
    value = NESTED[name]
    again = tree_map(value, lambda leaf: leaf)
    assert type(again) is type(value)
    assert [id(t) for t in tensors(again)] == [id(t) for t in tensors(value)]
    doubled = tree_map(value, lambda leaf: leaf * 2 if isinstance(leaf, torch.Tensor) else leaf)
    assert all(torch.equal(two, 2 * one) for one, two in zip(tensors(value), tensors(doubled), strict=True))
    assert [id(t) for t in tensors(value)] == [id(t) for t in tensors(NESTED[name])]


@pytest.mark.parametrize("name", NESTED)
def test_encoding_can_be_filled_again(name):
    """Encoded with a number for every leaf and filled with the leaves by number: an object of the same kind."""
    value = NESTED[name]
    found: list = []

    def number(leaf: object) -> Ref:
        found.append(leaf)
        return Ref(len(found) - 1)
    again = fill(tree_encode(value, number), found.__getitem__)
    assert type(again) is type(value) and [id(leaf) for leaf in leaves(again)] == [id(leaf) for leaf in leaves(value)]


def test_unknown_objects_are_leaves():
    thing = object()
    assert leaves([thing, (A, {"k": thing})]) == [thing, A, thing] and tensors([thing, A]) == [A]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_modes_are_told_and_set_again(grad, autocast):
    """What ``current_modes`` tells inside is what ``switch`` sets elsewhere; outside nothing changes."""
    before = current_modes()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=autocast or torch.bfloat16,
                                                      enabled=autocast is not None):
        seen = current_modes()
    assert seen.grad == grad and dict(seen.autocast) == ({} if autocast is None else {"cpu": autocast})
    context = switch(seen)
    for _ in range(2):
        with context:
            assert current_modes() == seen
            with switch(before):
                assert current_modes() == before
    assert current_modes() == before


def test_python_state_notices_and_puts_back():
    """Attributes, the contents of containers, and attributes that are new or gone."""
    module = torch.nn.Linear(2, 2)
    module.calls, module.history, module.table = 0, [1], {"a": 1}
    before = python_state(module)
    assert difference(before, python_state(module)) == ""
    for change, name in ((lambda: setattr(module, "calls", 3), "calls"), (lambda: module.history.append(2), "history"),
                         (lambda: module.table.update(b=2), "table"), (lambda: setattr(module, "new", 5), "new"),
                         (lambda: delattr(module, "calls"), "calls")):
        change()
        assert difference(before, python_state(module)) == name
        restore(module, before)
        assert difference(before, python_state(module)) == ""
    assert (module.calls, module.history, module.table) == (0, [1], {"a": 1}) and not hasattr(module, "new")
