"""How an output is put together follows from layouts and shares: each kind by a value of its own, without a model."""
from functools import partial

import pytest
import torch

from pipeengine.errors import InputError
from pipeengine.stages.merging import Join, _close, _entry_per_row, join_of, paths
from pipeengine.stages.row_layout import Free, Mixed, Reduced, Rows
from pipeengine.tracing import Dataflow, Rebuilt, Recording, Ref
from pipeengine.tracing.modes import Modes
from pipeengine.tracing.recording import Node, NodeCost, TensorSpec, Value


def flow(loss_adds=True, dtype=torch.float32):
    """``loss = part + other`` (or ``part * 0`` beside it), each a number of an input."""
    spec = TensorSpec((), dtype, (), True)
    values = (Value("input", "x", -1, TensorSpec((4,), torch.float32, (1,), False), 0),
              *(Value("result", name, number, spec, number + 1)
                for number, name in enumerate(("part", "other", "loss"))))

    def node(name, target, reads, result):
        return Node(name, target, False, tuple(map(Ref, reads)), {}, (result,), ("",), 0, Modes(True, False, ()),
                    frozenset(), (), False, False, False, NodeCost())
    last = node("loss", torch.add if loss_adds else torch.cat, (1, 2), 3)
    nodes = (node("part", torch.sum, (0,), 1), node("other", torch.sum, (0,), 2), last)
    recording = Recording(values, nodes, (), (), (0,), (Ref(1), Ref(3)), 3, {})
    return Dataflow(recording, (1, 3), (0, 1, 2), frozenset(), {0: (), 1: (), 2: (0, 1)}, (), frozenset())


PLAIN = (Rows(0), Reduced(), Reduced(), Reduced())
ROWS = (3, 1)


def joined(layout, shares=None, *, layouts=PLAIN, micro=None, where="logits"):
    return join_of(where, 1, layout, micro or flow(loss_adds=False), layouts, lambda: shares, ROWS)


def test_rows_stand_one_after_another_and_what_is_the_same_is_taken_once():
    assert joined(Rows(1, outer=2)) == Join("rows", 1, 2) and joined(Free()) == Join("same")


@pytest.mark.parametrize("shares, expected", [
    ([(1.0,), (1.0,)], Join("total")),
    ([(0.75,), (0.25,)], Join("mean of rows", shares=(0.75, 0.25))),
    ([(0.5, 0.5), (0.5, 0.5)], Join("weighted", shares=(0.5, 0.5)))])
def test_a_number_is_added_up_by_what_each_micro_batch_counts_for(shares, expected):
    """Sums as they are; means by rows; others by targets or whatever their terms are weighed with."""
    assert joined(Reduced(), shares) == expected


def test_terms_of_one_number_that_count_differently_have_no_common_weight():
    with pytest.raises(InputError, match="output logits cannot be merged.*neither a sum nor a mean over them"):
        joined(Reduced(), [(0.75, 0.5), (0.25, 0.5)])


def test_an_integer_that_is_no_total_is_refused():
    """A count may be added up; a weighted one would be rounded."""
    whole = flow(loss_adds=False, dtype=torch.int64)
    assert joined(Reduced(), [(1.0,), (1.0,)], micro=whole) == Join("total")
    with pytest.raises(InputError, match="has no dimension of rows and depends on the rows"):
        joined(Reduced(), [(0.75,), (0.25,)], micro=whole)


def test_a_part_of_the_loss_is_computed_by_micro_batch_whatever_it_is():
    """Of ``loss = part + other`` the part has what the loss has: the mean by rows, though nothing is known of it."""
    assert joined(Reduced(), None, micro=flow(loss_adds=True)) == Join("mean of rows", shares=(0.75, 0.25))
    with pytest.raises(InputError):
        joined(Reduced(), None, micro=flow(loss_adds=False))


def test_what_mixes_rows_on_its_way_is_refused_with_the_reason():
    mixed = Mixed("has no dimension of rows and normalises over the batch")
    with pytest.raises(InputError, match="output logits .* it has no dimension of rows and normalises over the batch; "
                                         "evaluate a batch of as many rows as a micro-batch has"):
        joined(Reduced(), [(1.0,), (1.0,)], layouts=(Rows(0), mixed, Reduced(), Reduced()))
    with pytest.raises(InputError, match="normalises over the batch"):
        joined(mixed)


@pytest.mark.parametrize("shape, doubled, expected", [
    ((4, 7), (8, 7), Rows(0)), ((7, 4), (7, 8), Rows(1)), ((4, 4), (8, 8), None), ((4,), (4,), None),
    ((2, 7), (4, 7), None), ((4, 7), (8,), None), ((4, 7), (9, 7), None)])
def test_rows_are_told_by_the_one_dimension_that_doubles_with_them(shape, doubled, expected):
    """Of four rows: a dimension of another length, or two that move, tell nothing."""
    assert _entry_per_row(shape, doubled, 4) == expected


def test_outputs_are_named_as_their_user_would_write_them():
    structure = {"loss": Ref(0), "hidden_states": (Ref(1), [Ref(2), 5]), 7: Ref(3),
                 "cache": Rebuilt(_kept("keys", "values"), (Ref(4), Ref(5)))}
    assert list(paths(structure)) == [
        ("loss", Ref(0)), ("hidden_states[0]", Ref(1)), ("hidden_states[1][0]", Ref(2)), ("hidden_states[1][1]", 5),
        ("[7]", Ref(3)), ("cache.keys", Ref(4)), ("cache.values", Ref(5))]
    assert list(paths(Ref(3))) == [("of the model", Ref(3))] and list(paths((Ref(1),))) == [("[0]", Ref(1))]
    unnamed = Rebuilt(list, (Ref(4),))
    assert list(paths({"past": unnamed})) == [("past[0]", Ref(4))]
    assert list(paths(Rebuilt(_kept("loss"), (Ref(4),)))) == [("loss", Ref(4))]


def _kept(*names):
    """A function that makes an object again, and tells the names of its parts as ``functools.partial`` does."""
    return partial(dict.fromkeys, names)


def test_shares_are_compared_beyond_rounding():
    assert _close((0.1 + 0.2, 0.7), (0.3, 0.7)) and not _close((0.3, 0.7), (0.3001, 0.6999))
