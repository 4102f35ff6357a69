"""Batches of ever new shapes: what is kept for them is bounded, here and in torch."""
import gc

import pytest
import torch
from torch import nn

import pipeengine as pe
from pipeengine.stages import cache, loss_weight, merging
from pipeengine.torch_private import FakeTensorMode, bound_fake_cache
from pipeengine.tracing import capturing


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Tanh()) for _ in range(3))
        self.head.weight = self.table.weight

    def forward(self, ids):
        hidden = self.table(ids) + torch.arange(ids.shape[1], device=ids.device)[None, :, None] * 0.01
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), ids.flatten())


def objects_over_steps(lengths: list[int], looks: list[int]) -> list[int]:
    """How many objects there are after so many steps with batches of these lengths."""
    torch.manual_seed(0)
    pipe = pe.Pipeline(Model(), {"ids": torch.zeros(4, 3, dtype=torch.int64)}, num_microbatches=2, num_stages=3,
                       costs="analytic")
    optimizer, counts = torch.optim.AdamW(pipe.parameters()), []
    for number, length in enumerate(lengths, 1):
        pipe.step(ids=torch.randint(0, 9, (4, length)))
        optimizer.step()
        optimizer.zero_grad()
        if number % 10 == 0:
            pipe.evaluate(ids=torch.randint(0, 9, (4, length)))
        if number in looks:
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert pipe._assembly.specializations.recorded > len(lengths) - 5, "each length is new"
    return counts


def test_objects_do_not_grow_with_shapes(monkeypatch):
    """500 steps of random shapes left half a million objects and 160 MB behind, most of them in torch's cache of calls
    on fake tensors. Bounds are lowered, so that few steps reach them."""
    for module in (cache, loss_weight, merging):
        monkeypatch.setattr(module, "_MOST", 4)
    monkeypatch.setattr(capturing, "_MOST_FAKE_CALLS", 0)
    first, second = objects_over_steps(list(range(4, 20)), [6, 16])
    # One shape's recording is some 300 objects, its calls on fakes as many; four of them are kept at most.
    assert second - first < 1500, f"{second - first} objects more after 10 more shapes"
    assert FakeTensorMode.cache_info().size == 0


@pytest.mark.slow
def test_objects_do_not_grow_with_shapes_for_long():
    """The same with the bounds as they are."""
    counts = objects_over_steps(list(range(4, 504)), [200, 300, 400, 500])
    assert max(counts) - min(counts) < 40_000, counts         # what torch keeps comes and goes
    assert FakeTensorMode.cache_info().size < capturing._MOST_FAKE_CALLS + 500


def test_only_too_much_is_forgotten():
    FakeTensorMode.cache_clear()
    with FakeTensorMode() as mode:
        for length in range(1, 11):
            mode.from_tensor(torch.ones(length)) + 1
        full = FakeTensorMode.cache_info().size
        assert full >= 10
        bound_fake_cache(full)
        assert FakeTensorMode.cache_info().size == full
        bound_fake_cache(full - 1)
        assert FakeTensorMode.cache_info().size == 0
