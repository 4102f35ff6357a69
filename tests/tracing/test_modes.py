"""What a loop switches on a model, looked at before every step."""
import torch
from torch import nn

from pipeengine.tracing import ModelFlags


def model() -> nn.Module:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    return nn.Sequential(first, nn.Dropout(0.1), second)


def test_flags_follow_the_model():
    net = model()
    flags = ModelFlags(net)
    before = flags.now()
    assert flags.now() == before and not flags.replaced
    net[1].eval()
    assert flags.now()[0] != before[0] and flags.now()[1:] == before[1:]
    net[1].train()
    net[2].bias.requires_grad_(False)
    assert flags.now()[1] != before[1] and flags.now()[::2] == before[::2]
    net[2].bias.requires_grad_()
    handle = net[0].register_forward_hook(lambda *_: None)
    assert flags.now()[2] != before[2]
    handle.remove()
    net[0].half()
    assert flags.now()[2] != before[2]


def test_hooked_parameters_are_those_that_stand_there_now():
    """Taken off, put on another one, and on one that takes a parameter's place; a shared one is told once."""
    net = model()
    flags = ModelFlags(net)
    flags.now()
    assert flags.hooked_parameters() == []
    shared = net[0].weight.register_hook(lambda grad: None)
    assert list(map(id, flags.hooked_parameters())) == [id(net[0].weight)]
    net[2].bias.register_post_accumulate_grad_hook(lambda parameter: None)
    assert list(map(id, flags.hooked_parameters())) == [id(net[0].weight), id(net[2].bias)]
    shared.remove()
    assert list(map(id, flags.hooked_parameters())) == [id(net[2].bias)]
    other = nn.Parameter(torch.zeros(2))
    other.register_hook(lambda grad: None)
    assert list(map(id, flags.hooked_parameters())) == [id(net[2].bias)]
    net[0].bias, net[2].bias = other, nn.Parameter(torch.zeros(2))
    flags.now()
    assert flags.replaced and list(map(id, flags.hooked_parameters())) == [id(other)]
