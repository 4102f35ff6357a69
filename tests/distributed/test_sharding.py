"""Which parameters are sharded, which rows a replica has, and what is gathered together: without a process beside."""
import itertools
import warnings

import pytest
import torch
from torch import nn

from pipeengine.distributed import Copies, Sharding, held_elsewhere, is_sharded, own_part, put_whole, reason_to_keep
from pipeengine.distributed.sharded_tensors import rows_of
from pipeengine.distributed.sharding import Unit, make_units


@pytest.mark.parametrize("members", range(1, 7))
def test_rows_are_dealt_as_torch_chunks_them(members):
    for rows in range(1, 20):
        parts = [torch.arange(rows)[slice(*rows_of(rows, members, member))] for member in range(members)]
        chunks = torch.arange(rows).chunk(members)
        assert torch.equal(torch.cat(parts), torch.arange(rows))
        assert [part.tolist() for part in parts if len(part)] == [chunk.tolist() for chunk in chunks]


def test_plain_tensors_are_their_own_part():
    tensor = torch.zeros(3, 2)
    assert not is_sharded(tensor) and own_part(tensor) is tensor
    put_whole(tensor, torch.ones(3, 2))
    assert tensor.sum() == 6


def test_units_keep_the_order_and_the_limit():
    """Parameters of one stage and one dtype, in runs of at most so many bytes; a larger one alone."""
    sizes = {"a": 4, "b": 4, "c": 30, "d": 1, "e": 2, "f": 3}
    stages = {"a": 0, "b": 0, "c": 0, "d": 0, "e": 1, "f": -1}
    tensors = {name: torch.zeros(size, dtype=torch.float64 if name == "d" else torch.float32)
               for name, size in sizes.items()}
    units = make_units([Copies(name, (0, 1), stages[name]) for name in sizes], tensors, most=40)
    assert units == (Unit(-1, ("f",)), Unit(0, ("a", "b")), Unit(0, ("c",)), Unit(0, ("d",)), Unit(1, ("e",)))
    assert sorted(itertools.chain.from_iterable(unit.names for unit in units)) == sorted(sizes)


def test_what_fsdp_cannot_shard_has_a_reason():
    linear = nn.Linear(3, 2)
    own = [(linear, "weight")]
    assert reason_to_keep(linear.weight, own) is None
    assert "single numbers" in reason_to_keep(nn.Parameter(torch.tensor(1.0)), own)
    assert "contiguous" in reason_to_keep(nn.Parameter(torch.zeros(3, 2).t()), own)
    assert "class of their own" in reason_to_keep(torch.zeros(3), own)
    hooked = nn.Parameter(torch.zeros(3, 2))
    hooked.register_post_accumulate_grad_hook(lambda one: None)
    assert "hooks" in reason_to_keep(hooked, own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # scripting goes away one day
        compiled = torch.jit.script(nn.Linear(3, 2))
    assert "compiled code" in reason_to_keep(linear.weight, [(compiled, "weight")])


def test_parameters_in_other_attributes_are_found():
    """Alone, in a list, in a dict; what stands in tables of modules alone is not."""
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    object.__setattr__(model[1], "alias", model[0].weight)
    model[1].several = [model[1].bias]
    model[2].named = {"own": model[2].weight}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert held_elsewhere(model.modules(), names) == {"0.weight", "1.bias", "2.weight"}
    lstm = nn.LSTM(2, 2)
    assert not held_elsewhere(lstm.modules(), {id(one): name for name, one in lstm.named_parameters()})


def test_what_stays_whole_is_told_by_reason():
    kept = {"scale": "they are single numbers", **{f"tied{i}": "several hold them" for i in range(5)}}
    told = Sharding({}, kept).told({"scale": 1, **{f"tied{i}": 1000 for i in range(5)}})
    assert told == ("5 parameters of 5,000 entries stay whole in every replica, since several hold them: tied0, tied1, "
                    "tied2, ...; 1 parameters of 1 entries stay whole in every replica, since they are single numbers: "
                    "scale")
    assert not Sharding({}).told({})
