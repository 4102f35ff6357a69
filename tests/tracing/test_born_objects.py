"""What a forward makes for itself: tensors out of lists of tensors, functions that vmap has mapped, caches."""

import pytest
import torch
import zoo
from reference import assert_same_step, gradients, reference_step
from torch import nn

import pipeengine as pe
from pipeengine.tracing.born_objects import MappedFunction, NotMappable, tensor_of

WIDTH = 8


pytestmark = pytest.mark.usefixtures("quiet_and_seeded")


def train(model: nn.Module, plain: nn.Module, batches, **options) -> pe.Pipeline:
    """Every batch on three stages against one process."""
    plain.load_state_dict(model.state_dict())
    usual = dict(num_stages=3, num_microbatches=2, costs="analytic")
    pipe = pe.Pipeline(model, batches[0], **(usual | options))
    for batch in batches:
        model.zero_grad()
        expected = reference_step(plain, batch, 2)
        assert_same_step(expected, (pipe.step(**batch), gradients(model)), 1e-6)
    return pipe


LISTS = ([1, torch.tensor(2)], [[torch.tensor(1.5), 2], [3, torch.tensor(4)]],
         (torch.tensor(True), torch.tensor(False)),
         [torch.tensor(1), torch.tensor(2.5)], [torch.tensor(3, dtype=torch.int32), torch.tensor(4, dtype=torch.int32)],
         [torch.arange(3).sum(), 7], [torch.tensor(2.0, dtype=torch.float64)])


@pytest.mark.parametrize("data", LISTS, ids=str)
@pytest.mark.parametrize("options", ({}, {"dtype": torch.float32}, {"device": "cpu"}), ids=str)
def test_a_tensor_of_lists_of_tensors_is_torchs(data, options):
    expected, found = torch.tensor(data, **options), tensor_of(data, **options)
    assert expected.dtype == found.dtype and torch.equal(expected, found) and not found.requires_grad


class Grid(nn.Module):
    """Makes a tensor of two sums over its inputs, as vision models do of heights and widths."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, grid):
        size = torch.tensor([grid[:, 0].sum(), grid.prod()])
        for block in self.blocks:
            x = x + torch.tanh(block(x)) * size[0] / size[1]
        return x.square().mean()


def test_a_tensor_of_sums_follows_the_batch():
    train(Grid(), Grid(), [dict(x=torch.randn(4, WIDTH), grid=torch.randint(1, 5, (4, 2))) for _ in range(2)])


class Mapped(nn.Module):
    """A mask made by vmap over a function that reads inputs through its closure, and through another's."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, kind):
        def same(row, a, b):
            return kind[row, a] == kind[row, b]

        def allowed(row, a, b):
            return same(row, a, b) & (a >= b)
        mask = allowed
        for dims in ((None, None, 0), (None, 0, None), (0, None, None)):
            mask = torch.vmap(mask, in_dims=dims)
        rows, length = kind.shape
        weights = mask(torch.arange(rows), torch.arange(length), torch.arange(length)).float()
        for block in self.blocks:
            x = x + weights @ torch.tanh(block(x)) / length
        return x.square().mean()


def test_a_mapped_function_is_one_node_and_reads_the_batch():
    batches = [dict(x=torch.randn(4, 5, WIDTH), kind=torch.randint(0, 2, (4, 5))) for _ in range(3)]
    pipe = train(Mapped(), Mapped(), batches)
    assert not pipe._assembly.placement.leaf_modules and pipe._assembly.specializations.recorded == 1


def test_a_mapped_function_keeps_no_tensor_of_the_recording():
    kind = torch.tensor([1, 2, 3])
    mapped = MappedFunction(torch.vmap(lambda i: kind[i] * 2))
    assert len(mapped.captured) == 1 and mapped.captured[0] is kind
    assert torch.equal(mapped((torch.tensor([5, 6, 7]),), torch.arange(3)), torch.tensor([10, 12, 14]))


def test_a_mapped_function_that_reads_a_module_is_not_followed():
    layer = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(NotMappable):
        MappedFunction(torch.vmap(lambda x: layer(x)))


class MapsALayer(Grid):
    def forward(self, x, grid):
        class_of = torch.vmap(lambda row: self.blocks[0](row))
        return (class_of(x) * grid.sum()).square().mean() + self.blocks[3](self.blocks[1](x)).mean()


def test_a_mapped_layer_at_the_root_is_refused_by_name():
    with pytest.raises(pe.CaptureError, match="vmap"):
        pe.Pipeline(MapsALayer(), dict(x=torch.randn(4, WIDTH), grid=torch.ones(4, 2)), num_stages=2, costs="analytic")


def test_a_hook_on_a_layer_that_is_given_a_cache():
    """The common way to look inside a Llama, whose layers share a cache by default."""
    case, seen = zoo.hugging_face("llama"), []
    model, plain = case.build(), case.build()
    assert model.config.use_cache
    model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    pipe = train(model, plain, case.batches[:2])
    assert "model.layers.1" in pipe._assembly.placement.leaf_modules and seen
    with torch.no_grad():
        expected = plain(**case.batches[1])
    found = pipe.evaluate(**case.batches[1])
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)


def test_a_model_kept_whole_that_returns_a_cache():
    """Its layers cannot be cut, but the head can: the cache it returns is nobody's."""
    case = zoo.hugging_face("llama")
    model, plain = case.build(), case.build()
    model.model.register_forward_hook(lambda *_: None)
    train(model, plain, case.batches[:2], num_stages=2)
