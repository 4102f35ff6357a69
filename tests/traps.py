"""Constructs that a recorder of one forward gets wrong if it only writes down what it saw.

Each construct is one function ``(host, x, extra) -> x``, put in two places: in the glue of the model's own forward,
and inside a block. The first batch is the one a pipeline is made with; the second changes what a naive recording
froze. Constructs that need a shape of their own are whole models, at the end.
"""
import collections
import copy
import functools
import random
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

WIDTH = 8
ROWS = 8
LENGTH = 5


@dataclass(frozen=True)
class Trap:
    """A model around one construct.

    ``build()`` gives the model, always with the same weights; it takes a batch by keyword and returns a scalar loss.
    Train on the first batch, change the weights, train on the second: some recordings freeze the weights they saw.
    ``expect``: ``"exact"``: recorded right, or made one node, the same numbers as eager on both batches;
    ``"exact_or_refuse"``: or else a ``PipeEngineError`` that says why; ``"varies_or_refuse"``: the forward draws from
    Python's, NumPy's or torch's generator, and repeated steps on one batch must not all give one loss.
    """
    name: str
    build: Callable[[], nn.Module]
    batch: Mapping[str, object]
    second_batch: Mapping[str, object]
    expect: str = "exact"


@dataclass(frozen=True)
class Construct:
    """One construct, before it is put somewhere. ``glue`` and ``block`` say what to expect in each place."""
    apply: Callable
    setup: Callable[[nn.Module], None]
    extra: tuple[object, object] | None
    scale: float
    length: int
    glue: str
    block: str


CONSTRUCTS: dict[str, Construct] = {}
EXACT, REFUSE, VARIES = "exact", "exact_or_refuse", "varies_or_refuse"


def construct(setup: Callable = lambda host: None, extra=None, scale: float = 1.0, length: int = LENGTH,
              glue: str = EXACT, block: str = EXACT):
    """Register a construct. ``extra``: what the first and the second batch hold under that name; ``scale`` and
    ``length``: factor on the second batch's ``x``, and how long it is."""
    def register(function):
        CONSTRUCTS[function.__name__] = Construct(function, setup, extra, scale, length, glue, block)
        return function
    return register


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Host(nn.Module):
    """Where a construct lives: the weights it may use."""

    def __init__(self, construct: Construct):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.register_buffer("count", torch.ones(()))
        self.register_buffer("average", torch.zeros(WIDTH))
        self.construct = construct.apply
        construct.setup(self)

    def forward(self, x, extra):
        return self.construct(self, x, extra) + 0.0 * self.table.sum()


class InGlue(Host):
    """The construct between two pairs of blocks, in the model's own forward."""

    def __init__(self, construct: Construct):
        super().__init__(construct)
        self.before = nn.ModuleList(Block() for _ in range(2))
        self.after = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, y, extra=None):
        for block in self.before:
            x = block(x)
        x = self.construct(self, x, extra)
        for block in self.after:
            x = block(x)
        return F.mse_loss(x, y)


class InBlock(nn.Module):
    """The construct inside a block between two pairs of blocks."""

    def __init__(self, construct: Construct):
        super().__init__()
        self.before = nn.ModuleList(Block() for _ in range(2))
        self.middle = Host(construct)
        self.after = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, y, extra=None):
        for block in self.before:
            x = block(x)
        x = self.middle(x, extra)
        for block in self.after:
            x = block(x)
        return F.mse_loss(x, y)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_batch(seed: int, rows: int = ROWS, length: int = LENGTH, scale: float = 1.0, **extra) -> dict:
    return dict(x=noise(seed, rows, length, WIDTH) * scale, y=noise(seed + 5, rows, length, WIDTH), **extra)


def seeded(factory: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            return factory().train()
    return build


# ----------------------------------------------------------------------------------------------------- modes and hooks

@construct()
def no_grad_region(host, x, extra):
    with torch.no_grad():
        scale = host.linear(x).mean(-1, keepdim=True)
    return x * scale


@construct()
def no_grad_function(host, x, extra):
    @torch.no_grad()
    def statistics(value):
        return host.linear(value).std(-1, keepdim=True)
    return x / (1 + statistics(x))


@construct()
def inference_mode_region(host, x, extra):
    with torch.inference_mode():
        index = host.linear(x).argmax(-1)
    return x + host.table[index.clone()]


@construct()
def grad_switched_back_on(host, x, extra):
    with torch.set_grad_enabled(False):
        stopped = host.linear(x)
        with torch.enable_grad():
            flowing = host.other(x)
    return x * stopped + flowing


@construct()
def autocast_region(host, x, extra):
    with torch.autocast("cpu", torch.bfloat16):
        h = host.other(host.linear(x))
    return x + h.float()


@construct()
def autocast_switched_off(host, x, extra):
    with torch.autocast("cpu", torch.bfloat16):
        h = host.linear(x)
        with torch.autocast("cpu", enabled=False):
            h = host.other(h.float() * 1.001)
    return x + h


class Triple(torch.autograd.Function):
    """The identity, with three times the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


bound_apply = Triple.apply


@construct()
def custom_function(host, x, extra):
    return Triple.apply(host.linear(x))


@construct()
def custom_function_bound_earlier(host, x, extra):
    return bound_apply(host.linear(x)) + x


@construct()
def tensor_hook(host, x, extra):
    h = host.linear(x)
    h.register_hook(lambda grad: 3 * grad)
    return x + h


def _inner(host):
    host.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def _backward_hook(host):
    _inner(host)
    host.inner.register_full_backward_hook(lambda module, inputs, outputs: tuple(2 * grad for grad in inputs))


@construct(setup=_backward_hook)
def full_backward_hook(host, x, extra):
    return x + host.inner(x)


def _forward_hooks(host):
    _inner(host)
    host.inner.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))
    host.inner.register_forward_hook(lambda module, inputs, output: output + inputs[0])


@construct(setup=_forward_hooks)
def forward_hooks(host, x, extra):
    return x + host.inner(x)


def _feature_hook(host):
    _inner(host)
    host.features = []
    host.inner[1].register_forward_hook(lambda module, inputs, output: host.features.append(output))


@construct(setup=_feature_hook, glue=REFUSE)
def features_from_a_hook(host, x, extra):
    host.features.clear()
    return host.inner(x) * host.features[0]


@construct(glue=REFUSE)
def saved_tensors_hooks(host, x, extra):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t.float()):
        h = host.linear(x).exp() * x
    return h


@construct()
def retained_grad(host, x, extra):
    h = host.linear(x)
    h.retain_grad()
    return h * 2


# ---------------------------------------------------------------------------------------------------------- randomness

@construct(glue=REFUSE)
def manual_seed(host, x, extra):
    torch.manual_seed(7)
    return x + torch.randn_like(x)


@construct(glue=REFUSE)
def forked_random_state(host, x, extra):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return x + torch.randn_like(x)


@construct(glue=REFUSE)
def random_state_put_back(host, x, extra):
    state = torch.get_rng_state()
    first = torch.rand_like(x)
    torch.set_rng_state(state)
    return host.linear(x) + first - torch.rand_like(x)


@construct(glue=REFUSE)
def own_generator(host, x, extra):
    return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(5))


def _generator(host):
    host.generator = torch.Generator().manual_seed(3)


@construct(setup=_generator, glue=REFUSE, block=REFUSE)
def kept_generator(host, x, extra):
    return x + torch.randn(x.shape, generator=host.generator)


@construct(glue=VARIES, block=VARIES)
def python_random(host, x, extra):
    return host.linear(x) if random.random() < 0.5 else x


@construct(glue=VARIES, block=VARIES)
def numpy_random(host, x, extra):
    mask = torch.from_numpy(np.random.rand(WIDTH) < 0.5)
    return host.linear(x).masked_fill(mask, 0.0)


@construct(glue=VARIES, block=VARIES)
def torch_random_branch(host, x, extra):
    return host.linear(x) if torch.rand(()) < 0.5 else x


@construct(glue=VARIES, block=VARIES)
def torch_random_order(host, x, extra):
    order = torch.randperm(WIDTH).tolist()
    return host.linear(x[..., order])


# -------------------------------------------------------------------------------------------------- state of the module

@construct(glue=REFUSE)
def buffer_reassigned(host, x, extra):
    host.count = host.count + 1
    return x * host.count


@construct(glue=REFUSE)
def buffer_data_replaced(host, x, extra):
    host.count.data = host.count + 1
    return x * host.count.clone()


@construct()
def buffer_counted_in_place(host, x, extra):
    """The copy is what later micro-batches, which run before this one's backward, must not change."""
    host.count.add_(1)
    return x * host.count.clone()


@construct(glue=REFUSE)
def buffer_from_activations(host, x, extra):
    host.average = 0.9 * host.average + 0.1 * x.detach().mean((0, 1))
    return x - host.average


def _counter(host):
    host.steps = 0


@construct(setup=_counter, glue=REFUSE)
def python_counter(host, x, extra):
    host.steps += 1
    return x * (1 + 0.1 * host.steps)


@construct(setup=_counter, glue=REFUSE)
def python_counter_branch(host, x, extra):
    host.steps += 1
    return host.linear(x) if host.steps % 2 else x


def _memory(host):
    host.memory = None


@construct(setup=_memory, glue=REFUSE)
def memory_of_the_last_call(host, x, extra):
    now = x.mean((0, 1))
    x = x if host.memory is None else x + host.memory
    host.memory = now.detach()
    return x


def _log(host):
    host.log = []


@construct(setup=_log, glue=REFUSE)
def list_that_grows(host, x, extra):
    host.log.append(x.detach().mean())
    return x * (1 + sum(host.log) / len(host.log))


@construct(setup=_memory, length=LENGTH + 2, glue=REFUSE)
def cached_mask(host, x, extra):
    length = x.shape[1]
    if host.memory is None or host.memory.shape[0] < length:
        host.memory = torch.ones(length, length).tril()
    return torch.einsum("ts,bsw->btw", host.memory[:length, :length], host.linear(x))


@functools.lru_cache
def _wave(length):
    return torch.sin(torch.arange(length, dtype=torch.float32))[:, None]


@construct(length=LENGTH + 2)
def cached_function(host, x, extra):
    return x + _wave(x.shape[1])


@construct(glue=REFUSE)
def stale_identity(host, x, extra):
    """Frees a buffer, then makes many tensors, one of which is likely to take its place in memory."""
    host.count = host.count.clone()
    for i in range(6):
        x = x + 0.1 * (x * i).tanh().mean()
    host.average = host.average.clone()
    return x * host.count + host.average


@construct(glue=REFUSE, block=REFUSE)
def parameter_changed_in_place(host, x, extra):
    with torch.no_grad():
        host.table.mul_(0.9)
    return x @ host.table.detach()


# ------------------------------------------------------------------------------------------- calling modules unusually

class Doubled(nn.Linear):
    """Wraps its own call."""

    def __call__(self, *args):
        return 2 * super().__call__(*args) + 1


def _doubled(host):
    host.doubled = Doubled(WIDTH, WIDTH)


@construct(setup=_doubled)
def call_overridden(host, x, extra):
    return x + host.doubled(x)


@construct()
def forward_called_directly(host, x, extra):
    return host.linear.forward(x) + nn.Linear.forward(host.other, x)


@construct(setup=_inner)
def weight_of_a_child(host, x, extra):
    return F.linear(x, host.inner[0].weight + host.inner[2].weight.T, host.inner[2].bias)


@construct(setup=_inner)
def slice_of_a_sequential(host, x, extra):
    return x + host.inner[:2](x)


@construct()
def functional_call(host, x, extra):
    changed = {"weight": host.linear.weight * 2, "bias": host.other.bias}
    return x + torch.func.functional_call(host.linear, changed, (x,))


@construct()
def module_built_in_forward(host, x, extra):
    return nn.Softsign()(host.linear(x)) + nn.LayerNorm(WIDTH, elementwise_affine=False)(x)


@construct(glue=REFUSE)
def weights_born_in_forward(host, x, extra):
    fresh = nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        fresh.weight.copy_(host.linear.weight)
        fresh.bias.zero_()
    return fresh(x) + host.linear(x)


@construct(glue=REFUSE)
def module_copied_in_forward(host, x, extra):
    return copy.deepcopy(host.linear)(x) + host.linear(x)


def _hidden(host):
    host.hidden = [nn.Linear(WIDTH, WIDTH)]


@construct(setup=_hidden, glue=REFUSE, block=REFUSE)
def unregistered_module(host, x, extra):
    return host.hidden[0](x)


def _scripted(host):
    host.scripted = torch.jit.script(nn.Linear(WIDTH, WIDTH))


@construct(setup=_scripted)
def scripted_module(host, x, extra):
    return x + host.scripted(x)


def _traced(host):
    host.traced = torch.jit.trace(nn.Linear(WIDTH, WIDTH), torch.zeros(2, LENGTH, WIDTH))


@construct(setup=_traced)
def traced_module(host, x, extra):
    return x + host.traced(x)


def _compiled(host):
    _inner(host)
    host.compiled = torch.compile(host.inner, backend="eager")


@construct(setup=_compiled)
def compiled_module(host, x, extra):
    return x + host.compiled(x)


def _spectral(host):
    host.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))


@construct(setup=_spectral)
def spectral_norm(host, x, extra):
    return x + host.spectral(x)


def _old_weight_norm(host):
    host.normed = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))


@construct(setup=_old_weight_norm)
def weight_norm_by_hook(host, x, extra):
    return x + host.normed(x)


def _pruned(host):
    host.pruned = prune.l1_unstructured(nn.Linear(WIDTH, WIDTH), "weight", 0.4)


@construct(setup=_pruned)
def pruned_module(host, x, extra):
    return x + host.pruned(x)


@construct()
def checkpointed_closure(host, x, extra):
    gate = x.sigmoid()
    return checkpoint(lambda value: host.other(host.linear(value).tanh()) * gate, x, use_reentrant=False)


@construct()
def checkpointed_closure_reentrant(host, x, extra):
    gate = x.detach().sigmoid()
    return checkpoint(lambda value: host.other(host.linear(value).tanh()) * gate, x, use_reentrant=True)


# ------------------------------------------------------------------------------ tensors turned into Python, from inputs

def _mask(short: int) -> torch.Tensor:
    """(ROWS, LENGTH) of ones, the last ``short`` columns of odd rows zero."""
    mask = torch.ones(ROWS, LENGTH)
    mask[1::2, LENGTH - short:] = 0
    return mask


MASKS = (_mask(0), _mask(2))
LENGTHS = (torch.tensor([5, 4, 5, 3, 5, 5, 2, 5]), torch.tensor([3, 4, 2, 3, 2, 4, 2, 4]))


@construct(extra=MASKS)
def mask_dropped_when_full(host, x, extra):
    if extra.all():
        return host.linear(x)
    return host.linear(x) * extra[..., None]


@construct(extra=MASKS)
def mask_dropped_by_equal(host, x, extra):
    if torch.equal(extra, torch.ones_like(extra)):
        return host.linear(x)
    return host.linear(x) * extra[..., None]


@construct(extra=LENGTHS)
def trimmed_to_the_longest(host, x, extra):
    longest = int(extra.max())
    return host.linear(x)[:, :longest].mean(1, keepdim=True) + x


@construct(extra=LENGTHS)
def item(host, x, extra):
    return x * extra.max().item()


@construct(extra=(noise(1, ROWS), noise(2, ROWS)))
def float_of_an_input(host, x, extra):
    return host.linear(x) * float(extra.sum())


@construct(extra=LENGTHS, block=REFUSE)
def tensor_as_index(host, x, extra):
    return x * (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)[extra.min()] + sum(x[:, i % LENGTH].sum() for i in range(extra.max()))


@construct(extra=LENGTHS)
def tolist(host, x, extra):
    return torch.stack([host.linear(row) / n for row, n in zip(x, extra.tolist(), strict=True)])


@construct(extra=LENGTHS, glue=REFUSE)
def numpy_of_an_input(host, x, extra):
    weights = torch.from_numpy(1.0 / extra.numpy()).float()
    return host.linear(x) * weights[:, None, None]


@construct(extra=LENGTHS)
def tensor_from_list(host, x, extra):
    return x * torch.tensor([0.5 * n for n in extra.tolist()])[:, None, None]


@construct(extra=LENGTHS)
def while_loop(host, x, extra):
    left = extra.clone()
    while (left > 0).any():
        x = 0.9 * x + 0.1 * host.linear(x)
        left = left - 1
    return x


@construct(extra=LENGTHS)
def shape_of_a_selection(host, x, extra):
    return x * (extra > 3).nonzero().shape[0]


@construct(extra=LENGTHS)
def unique_values(host, x, extra):
    return host.linear(x) / len(torch.unique(extra))


@construct(extra=LENGTHS)
def membership(host, x, extra):
    return host.linear(x) if 5 in extra else host.other(x)


@construct(extra=LENGTHS)
def maximum_by_python(host, x, extra):
    return host.linear(x) * max(extra)


@construct(extra=LENGTHS, glue=REFUSE)
def packed_sequence(host, x, extra):
    packed = nn.utils.rnn.pack_padded_sequence(x, extra, batch_first=True, enforce_sorted=False)
    packed = packed._replace(data=host.linear(packed.data))
    return nn.utils.rnn.pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0]


def _lstm(host):
    host.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)


@construct(setup=_lstm, extra=LENGTHS, glue=REFUSE)
def packed_sequence_through_a_module(host, x, extra):
    packed = nn.utils.rnn.pack_padded_sequence(x, extra, batch_first=True, enforce_sorted=False)
    out, (hidden, _) = host.lstm(packed)
    out, lengths = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
    return x + out / lengths[:, None, None] + hidden[0][:, None]


# ------------------------------------------------------------------------- tensors turned into Python, from activations

@construct(scale=10.0, glue=REFUSE)
def branch_on_activations(host, x, extra):
    if x.detach().abs().mean() > 3:
        return host.other(x)
    return host.linear(x)


@construct(scale=10.0, glue=REFUSE)
def item_of_activations(host, x, extra):
    return x / x.detach().abs().max().item()


@construct(scale=10.0, glue=REFUSE)
def empty_expert_skipped(host, x, extra):
    choice = x.detach().abs().mean(-1) > 3
    out = torch.zeros_like(x)
    for expert, chosen in ((host.linear, ~choice), (host.other, choice)):
        rows = chosen.nonzero(as_tuple=True)
        if rows[0].numel() == 0:
            continue
        out[rows] = expert(x[rows])
    return out


@construct(scale=10.0, glue=REFUSE)
def size_of_a_selection(host, x, extra):
    chosen = x[x.detach().abs() > 3]
    return x * (1 + chosen.shape[0])


@construct(scale=10.0, glue=REFUSE)
def selection_without_its_size(host, x, extra):
    return host.linear(x) + x[x > 0].mean() + x[x.abs() > 2].sum()


@construct(scale=10.0, glue=REFUSE)
def checks_for_overflow(host, x, extra):
    x = host.linear(x)
    if torch.isinf(x).any() or (x.abs() > 5).any():
        x = x.clamp(-2, 2)
    return x


@construct(scale=10.0, glue=REFUSE, block=REFUSE)
def condition_operator(host, x, extra):
    large = x.detach().abs().mean() > 3
    return torch.cond(large, lambda value: host.other(value), lambda value: host.linear(value), (x,))


@construct(scale=10.0)
def both_branches_and_where(host, x, extra):
    return torch.where(x.detach().abs().mean() > 3, host.other(x), host.linear(x))


# ------------------------------------------------------------------------------------------------- transforms and types

@construct(glue=REFUSE)
def vmap(host, x, extra):
    return torch.vmap(lambda row: torch.tanh(row) * row.sum())(host.linear(x))


@construct(glue=REFUSE)
def gradient_by_func(host, x, extra):
    return x + torch.func.grad(lambda value: (torch.tanh(value) @ host.table).square().sum())(x)


@construct(glue=REFUSE)
def forward_derivative(host, x, extra):
    return host.linear(x) + torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))[1]


@construct()
def gradient_penalty(host, x, extra):
    inner = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(host.linear(inner).tanh().sum(), inner, create_graph=True)
    return x + slope


@construct(glue=REFUSE, block=REFUSE)
def asks_for_the_gradient_of_a_constant(host, x, extra):
    offset = torch.zeros_like(x).requires_grad_()
    h = host.linear(x + offset)
    (slope,) = torch.autograd.grad(h.square().sum(), offset, retain_graph=True)
    return h + slope


@construct()
def gradient_of_an_activation(host, x, extra):
    energy = host.linear(x).tanh().sum()
    (slope,) = torch.autograd.grad(energy, x, create_graph=True)
    return x - slope


class Tagged(torch.Tensor):
    """A tensor subclass that adds 1 whenever it is multiplied."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out + 1 if func is torch.Tensor.mul else out


@construct(glue=REFUSE)
def tensor_subclass(host, x, extra):
    return (host.linear(x).as_subclass(Tagged) * 2).as_subclass(torch.Tensor)


@construct(glue=REFUSE)
def attribute_on_a_tensor(host, x, extra):
    h = host.linear(x)
    h.origin = x
    return h * h.origin


@construct()
def dictionary_keyed_by_tensor(host, x, extra):
    h = host.linear(x)
    table = {x: host.other, h: host.linear}
    return table[h](x) + table[x](h)


@construct(glue=REFUSE)
def thread(host, x, extra):
    found = []
    worker = threading.Thread(target=lambda: found.append(host.linear(x)))
    worker.start()
    worker.join()
    return x + found[0]


@construct()
def sparse_product(host, x, extra):
    adjacency = torch.eye(x.shape[1]).roll(1, 0).to_sparse()
    flat = host.linear(x).transpose(0, 1).flatten(1)
    return torch.sparse.mm(adjacency, flat).view(x.shape[1], x.shape[0], -1).transpose(0, 1)


@construct(glue=REFUSE, block=REFUSE)
def nested_tensor(host, x, extra):
    jagged = torch.nested.nested_tensor_from_jagged(x.flatten(0, 1), torch.arange(x.shape[0] + 1) * x.shape[1])
    return (host.linear(jagged) * 2).values().view_as(x)


@construct()
def written_to_out(host, x, extra):
    out = torch.empty_like(x)
    with torch.no_grad():
        torch.mul(x, 2, out=out)
    return host.linear(x) + out


def _bag(host):
    host.bag = nn.EmbeddingBag(16, WIDTH)


@construct(setup=_bag, extra=(torch.arange(ROWS * 3).view(ROWS, 3) % 16, torch.arange(ROWS * 3).view(ROWS, 3) % 7))
def embedding_bag(host, x, extra):
    offsets = torch.arange(0, extra.numel(), extra.shape[1])
    return x + host.bag(extra.flatten(), offsets)[:, None]


@construct()
def named_tuple(host, x, extra):
    Pair = collections.namedtuple("Pair", "first second")
    pair = Pair(host.linear(x), host.other(x))
    return pair._replace(first=pair.first * 2).first + pair.second


@construct()
def rows_one_by_one(host, x, extra):
    return torch.stack([host.linear(row) * (i + 1) for i, row in enumerate(x)])


@construct()
def default_dtype(host, x, extra):
    torch.set_default_dtype(torch.float64)
    try:
        steps = torch.linspace(0, 1, WIDTH)
    finally:
        torch.set_default_dtype(torch.float32)
    return (x * steps).float()


# ------------------------------------------------------------------------------------------------- aliases and in place

@construct()
def changed_through_a_view(host, x, extra):
    x = host.linear(x)
    view = x.view(-1)
    view[::2].add_(1)
    x.transpose(0, 1)[0].mul_(2)
    return x * 1.0


@construct()
def changed_through_detach(host, x, extra):
    x = host.linear(x) * 1.0
    x.detach().mul_(2)
    return x + 1


@construct()
def changed_through_data(host, x, extra):
    x = host.linear(x) * 1.0
    x.data.clamp_(-0.3, 0.3)
    x.data = x.data * 2
    return x + 1


@construct(glue=REFUSE, block=REFUSE)
def detached_in_place(host, x, extra):
    h = host.linear(x) * 2
    h.detach_()
    return x + h


@construct()
def masked_assignment(host, x, extra):
    h = host.linear(x).clone()
    h[h.detach() > 0] = 0.25
    h[:, [0, 2]] += x[:, [1, 3]]
    h.index_put_((torch.tensor([0]),), torch.ones(WIDTH), accumulate=True)
    return h


@construct()
def constants_filled_in_place(host, x, extra):
    positions = torch.empty(x.shape[1], WIDTH)
    for i in range(x.shape[1]):
        positions[i].fill_(0.1 * i)
    positions[1:, 0] = 3.0
    return host.linear(x + positions)


@construct(extra=(noise(3, ROWS, LENGTH, WIDTH), noise(4, ROWS, LENGTH, WIDTH)))
def input_changed_in_place(host, x, extra):
    extra.mul_(2)
    return x + host.linear(extra)


# ------------------------------------------------------------------------------------------------ whole models of traps

MODELS: dict[str, tuple[type[nn.Module], Mapping, Mapping, str]] = {}


def whole(batch: Mapping | None = None, second: Mapping | None = None, expect: str = EXACT):
    """Register a whole model and its two batches."""
    def register(cls):
        MODELS[cls.__name__] = (cls, batch or plain_batch(0), second or plain_batch(1), expect)
        return cls
    return register


class Stack(nn.Module):
    """Four blocks."""

    def __init__(self, block: Callable[[], nn.Module] = Block):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(4))


class StoresAux(Block):
    def forward(self, x):
        out = super().forward(x)
        self.aux = out.square().mean()
        return out


@whole(expect=REFUSE)
class AuxStoredByBlocks(Stack):
    """Blocks keep a loss in an attribute; the model adds them up at the end."""

    def __init__(self):
        super().__init__(StoresAux)

    def forward(self, x, y):
        for block in self.blocks:
            x = block(x)
        return F.mse_loss(x, y) + 0.1 * sum(block.aux for block in self.blocks)


class Skips(Block):
    def forward(self, x):
        return super().forward(x) if random.random() < 0.5 else x


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Skips() for _ in range(3))
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


@whole(expect=VARIES)
class LayersSkippedAtRandom(nn.Module):
    """Layers two levels down are skipped by Python's random numbers; only they need to stay whole."""

    def __init__(self):
        super().__init__()
        self.encoder = Layers()
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y):
        return F.mse_loss(self.head(self.encoder(x)), y)


class Appends(Block):
    def forward(self, x, seen):
        out = super().forward(x)
        seen.append(out.mean((1, 2)))
        return out


@whole(expect=REFUSE)
class ListFilledByBlocks(Stack):
    """Blocks append to a list that the model made."""

    def __init__(self):
        super().__init__(Appends)

    def forward(self, x, y):
        seen = []
        for block in self.blocks:
            x = block(x, seen)
        return F.mse_loss(x, y) + torch.stack(seen).square().mean()


class Cache:
    """What a decoder keeps of the past: keys by layer."""

    def __init__(self):
        self.keys = {}
        self.length = 0

    def update(self, layer, key):
        self.length = max(self.length, key.shape[1])
        self.keys[layer] = torch.cat([self.keys[layer], key], 1) if layer in self.keys else key
        return self.keys[layer]


class Remembers(Block):
    def forward(self, x, layer, cache):
        return super().forward(x) + cache.update(layer, self.linear(x)).mean(1, keepdim=True)


@whole(expect=REFUSE)
class CacheBornInForward(Stack):
    """A fresh cache in every forward, filled by the blocks."""

    def __init__(self):
        super().__init__(Remembers)

    def forward(self, x, y, cache=None):
        cache = Cache() if cache is None else cache
        for layer, block in enumerate(self.blocks):
            x = block(x, layer % 2, cache=cache)
        return F.mse_loss(x, y) + sum(key.mean() for key in cache.keys.values())


class Box:
    """An opaque object around a tensor."""

    def __init__(self, value):
        self.value = value


class Boxed(Block):
    def forward(self, box):
        return Box(super().forward(box.value))


@whole(expect=REFUSE)
class OpaqueObjects(Stack):
    """Blocks take and return objects nobody knows."""

    def __init__(self):
        super().__init__(Boxed)

    def forward(self, x, y):
        box = Box(x)
        for block in self.blocks:
            box = block(box)
        return F.mse_loss(box.value, y)


@dataclass
class Carried:
    """Registered nowhere."""
    hidden: torch.Tensor
    history: list = field(default_factory=list)


class Carries(Block):
    def forward(self, carried):
        hidden = super().forward(carried.hidden)
        return Carried(hidden, [*carried.history, hidden.mean()])


@whole()
class Dataclasses(Stack):
    """Blocks take and return a dataclass with a list in it."""

    def __init__(self):
        super().__init__(Carries)

    def forward(self, x, y):
        carried = Carried(x)
        for block in self.blocks:
            carried = block(carried)
        return F.mse_loss(carried.hidden, y) + sum(carried.history)


class Consumes(Block):
    def forward(self, parts):
        return super().forward(sum(parts))


@whole(expect=REFUSE)
class Generators(Stack):
    """A generator over activations is consumed inside a block."""

    def __init__(self):
        super().__init__(Consumes)

    def forward(self, x, y):
        for block in self.blocks:
            x = block(x * scale for scale in (0.5, 0.75))
        return F.mse_loss(x, y)


class Calls(Block):
    def forward(self, x, function):
        return super().forward(function(x))


@whole(expect=REFUSE)
class Closures(Stack):
    """A function that holds on to an activation is called inside a block."""

    def __init__(self):
        super().__init__(Calls)

    def forward(self, x, y):
        for block in self.blocks:
            gate = torch.sigmoid(x)
            x = block(x, lambda value, gate=gate: value * gate)
        return F.mse_loss(x, y)


class Updates(Block):
    def forward(self, state):
        state["hidden"] = super().forward(state["hidden"])
        state["seen"] = state.get("seen", 0) + state["hidden"].mean()


@whole(expect=REFUSE)
class DictionaryChangedByBlocks(Stack):
    """Blocks return nothing and change a dictionary."""

    def __init__(self):
        super().__init__(Updates)

    def forward(self, x, y):
        state = {"hidden": x}
        for block in self.blocks:
            block(state)
        return F.mse_loss(state["hidden"], y) + state["seen"]


class WritesInto(Block):
    def forward(self, x, out):
        x = super().forward(x)
        out[..., :2] += x[..., 2:4]
        return x


@whole()
class TensorChangedByBlocks(Stack):
    """Blocks write into a tensor that the model handed them, and do not return it."""

    def __init__(self):
        super().__init__(WritesInto)

    def forward(self, x, y):
        out = torch.zeros_like(x)
        for block in self.blocks:
            x = block(x, out)
        return F.mse_loss(out + x, y)


class InPlaceBlock(Block):
    def forward(self, x):
        return x.add_(torch.tanh(self.linear(x.clone())))


@whole(expect=REFUSE)
class BlocksChangeTheirInput(Stack):
    """Blocks add to their input in place and return it; the model keeps the old name."""

    def __init__(self):
        super().__init__(InPlaceBlock)

    def forward(self, x, y):
        x = x * 1.0
        for block in self.blocks:
            block(x)
        return F.mse_loss(x, y)


_same = noise(0, ROWS, LENGTH, WIDTH)


@whole(batch=dict(x=_same, y=_same), second=plain_batch(1))
class OneTensorUnderTwoNames(Stack):
    """In the first batch x and y are one tensor; in the second they are not."""

    def forward(self, x, y):
        target = y * 0.5
        for block in self.blocks:
            x = block(x)
        return F.mse_loss(x, target)


@whole(plain_batch(0, scale_by=2.0), plain_batch(0, scale_by=3.0))
class PythonNumber(Stack):
    """A Python number among the inputs."""

    def forward(self, x, y, scale_by):
        for block in self.blocks:
            x = block(x) * scale_by / 2
        return F.mse_loss(x, y)


@whole(plain_batch(0, mode="sum"), plain_batch(0, mode="mean"))
class PythonString(Stack):
    """A string among the inputs chooses the loss."""

    def forward(self, x, y, mode):
        for block in self.blocks:
            x = block(x)
        return F.mse_loss(x, y, reduction=mode) if mode == "mean" else F.l1_loss(x, y)


@whole(plain_batch(0), plain_batch(0, mask=MASKS[1]))
class NoneThenTensor(Stack):
    """An optional input that the first batch lacks."""

    def forward(self, x, y, mask=None):
        for block in self.blocks:
            x = block(x)
        return F.mse_loss(x, y) if mask is None else ((x - y).square().mean(-1) * mask).mean()


@whole(plain_batch(0), plain_batch(1, rows=5, length=9))
class SizesInArithmetic(Stack):
    """Rows and length enter the numbers."""

    def forward(self, x, y):
        rows, length, width = x.shape
        for i, block in enumerate(self.blocks):
            x = block(x) + torch.arange(length)[:, None] / (length + i)
        return (x - y).square().sum() / (rows * length * width) * x.size(1) ** 0.5


@whole(plain_batch(0), plain_batch(1) | dict(x=noise(1, ROWS, WIDTH, LENGTH).transpose(1, 2)))
class Strides(Stack):
    """The forward asks for contiguity; the second batch is a transposed view."""

    def forward(self, x, y):
        scale = 1.0 if x.is_contiguous() else 2.0
        for block in self.blocks:
            x = block(x) * scale
        return F.mse_loss(x, y)


@whole(plain_batch(0), {name: value.double() for name, value in plain_batch(1).items()})
class DtypeOfTheInput(Stack):
    """The second batch comes in double precision."""

    def forward(self, x, y):
        eps = 1e-3 if x.dtype == torch.float32 else 0.5
        x = x.float()
        for block in self.blocks:
            x = block(x) + eps
        return F.mse_loss(x, y.float())


@whole(plain_batch(0, parts=[noise(1, ROWS, WIDTH)]), plain_batch(1, parts=[noise(2, ROWS, WIDTH)] * 2))
class InputsInAList(Stack):
    """A list of tensors among the inputs, longer in the second batch."""

    def forward(self, x, y, parts):
        for block in self.blocks:
            x = block(x + sum(parts)[:, None])
        return F.mse_loss(x, y)


@whole(plain_batch(0), plain_batch(1) | dict(x=noise(1, ROWS, LENGTH, WIDTH).requires_grad_()), expect=REFUSE)
class InputWithGradient(Stack):
    """The second batch's input wants a gradient, and the forward asks."""

    def forward(self, x, y):
        scale = 2.0 if x.requires_grad else 1.0
        for block in self.blocks:
            x = block(x) * scale
        return F.mse_loss(x, y)


def _place(name: str, construct: Construct, where: type[nn.Module], expect: str) -> Trap:
    first, second = construct.extra or (None, None)
    extras = ({}, {}) if construct.extra is None else (dict(extra=first), dict(extra=second))
    return Trap(f"{name}-{where.__name__}", seeded(lambda: where(construct)), plain_batch(0, **extras[0]),
                plain_batch(1, length=construct.length, scale=construct.scale, **extras[1]), expect)


def all_traps() -> tuple[Trap, ...]:
    """Every construct in the glue and in a block, and the whole models. Batches are fresh: some models change them."""
    found = [_place(name, one, InGlue, one.glue) for name, one in CONSTRUCTS.items()]
    found += [_place(name, one, InBlock, one.block) for name, one in CONSTRUCTS.items()]
    found += [Trap(name, seeded(cls), *batches, expect) for name, (cls, *batches, expect) in MODELS.items()]
    return tuple(copy_batches(trap) for trap in found)


def copy_batches(trap: Trap) -> Trap:
    """The trap with batches of its own; tensors that are one stay one."""
    return Trap(trap.name, trap.build, *copy.deepcopy((trap.batch, trap.second_batch)), trap.expect)
