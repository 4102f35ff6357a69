"""Weight gradients that wait, and forwards that run twice: the same bits as ever, nothing left over, less memory."""
import copy
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import zoo
from live import live
from reference import gradients, reference_step, worst_difference
from torch import nn

import pipeengine as pe
from pipeengine.autograd.deferral import Deferral, run
from pipeengine.autograd.deferral_rules import find_deferrable

WIDTH, ROWS, LENGTH = 16, 8, 6


pytestmark = pytest.mark.usefixtures("quiet_and_seeded")


# -- the functions that put off, against torch's own backward ---------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One way to put off: ``waits(deferral, x, *parameters)`` does what ``fused(x, *parameters)`` does."""
    waits: Callable
    fused: Callable
    x: tuple[int, ...] | torch.Tensor
    parameters: tuple[tuple[int, ...], ...]


INDICES = torch.randint(0, 11, (4, 7), generator=zoo.draws(3))
STRIDED = torch.convolution, ((2, 1), (1, 2), (1, 1), False, (0, 0), 2)
LAYERS = {
    "linear": Layer(Deferral.linear, F.linear, (4, 7, 5), ((3, 5), (3,))),
    "linear without bias": Layer(Deferral.linear, F.linear, (4, 7, 5), ((3, 5),)),
    "linear of a matrix": Layer(Deferral.linear, F.linear, (7, 5), ((3, 5), (3,))),
    "linear of a vector": Layer(Deferral.linear, F.linear, (5,), ((3, 5), (3,))),
    "linear of four axes": Layer(Deferral.linear, F.linear, (2, 3, 4, 5), ((3, 5), (3,))),
    "addmm": Layer(lambda d, x, w, b: d.addmm(b, x, w), lambda x, w, b: torch.addmm(b, x, w), (7, 5), ((5, 3), (3,))),
    "convolution": Layer(
        lambda d, x, w, b: d.convolution(x, w, b, *STRIDED[1]),
        lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 2), 1, 2),
        (3, 4, 8, 6),
        ((6, 2, 3, 3), (6,)),
    ),
    "transposed convolution": Layer(
        lambda d, x, w, b: d.convolution(x, w, b, (2,), (1,), (1,), True, (1,), 2),
        lambda x, w, b: F.conv_transpose1d(x, w, b, 2, 1, 1, 2),
        (3, 4, 9),
        ((4, 3, 3), (6,)),
    ),
    "convolution without bias": Layer(
        lambda d, x, w: d.convolution(x, w, None, (1,), (0,), (2,), False, (0,), 1),
        lambda x, w: F.conv1d(x, w, dilation=2),
        (3, 4, 9),
        ((5, 4, 3),),
    ),
    "embedding": Layer(lambda d, x, w: d.embedding(x, w, -1, False), F.embedding, INDICES, ((11, 5),)),
    "embedding with padding": Layer(
        lambda d, x, w: d.embedding(x, w, 2, False), lambda x, w: F.embedding(x, w, 2), INDICES, ((11, 5),)
    ),
    "embedding by frequency": Layer(
        lambda d, x, w: d.embedding(x, w, -1, True),
        lambda x, w: F.embedding(x, w, scale_grad_by_freq=True),
        INDICES,
        ((11, 5),),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_halves_are_the_whole(name):
    """I gives the input's gradient and no weight's; W gives those, micro-batch after micro-batch; every bit as
    fused."""
    layer, deferral = LAYERS[name], Deferral()
    mine = [torch.randn(shape, requires_grad=True) for shape in layer.parameters]
    theirs = [p.detach().clone().requires_grad_() for p in mine]
    for _ in range(3):
        x = layer.x if isinstance(layer.x, torch.Tensor) else torch.randn(layer.x)
        inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
        queue = deferral.begin()
        out, expected = layer.waits(deferral, inputs[0], *mine), layer.fused(inputs[1], *theirs)
        gradient, before = torch.randn(expected.shape), [p.grad if p.grad is None else p.grad.clone() for p in mine]
        out.backward(gradient)
        expected.backward(gradient)
        assert same([out, inputs[0].grad], [expected, inputs[1].grad])
        assert same([p.grad for p in mine], before)
        run(queue)
        assert same([p.grad for p in mine], [p.grad for p in theirs]) and not queue


def same(mine: list, theirs: list) -> bool:
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_parameters_stand_outside_the_graph():
    """Their hooks must not run in I; an input without gradient gets none."""
    deferral, weight, called = Deferral(), torch.randn(3, 5, requires_grad=True), []
    weight.register_hook(called.append)
    deferral.linear(torch.randn(7, 5), weight).sum().backward()
    assert not called and weight.grad is None
    run(deferral.queue)
    assert len(called) == 1 and torch.equal(called[0], weight.grad)


def test_a_weight_changed_after_its_forward_is_an_error():
    deferral, weight = Deferral(), torch.randn(3, 5, requires_grad=True)
    out = deferral.linear(torch.randn(7, 5, requires_grad=True), weight)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_what_waited_is_let_go_one_by_one():
    """When a layer's turn comes, nothing is kept for the layers before it."""
    kept, alive = [], []

    def layer(x: torch.Tensor) -> tuple:
        kept.append(weakref.ref(x))

        def later() -> tuple[torch.Tensor]:
            alive.append(sum(ref() is not None for ref in kept))
            return (x.sum(0),)
        return (torch.zeros(3, requires_grad=True),), later
    run(deque(layer(torch.randn(2, 3)) for _ in range(4)))
    assert alive == [4, 3, 2, 1]


# -- which layers wait ------------------------------------------------------------------------------------------------


def waiting(model: nn.Module, *inputs: torch.Tensor) -> set[str]:
    """Names of the parameters whose gradients are put off."""
    recording = pe.capture(model, inputs)
    waits = find_deferrable(recording, model)
    return {recording.values[v].name for node in recording.nodes if node.results and node.results[0] in waits
            for v in (*node.attributes, *(a.value for a in node.args if isinstance(a, tuple)))
            if recording.values[v].kind == "attribute"}


class Glue(nn.Module):
    """``torch.nn.functional.linear`` between modules, with a matrix and with a vector."""

    def __init__(self):
        super().__init__()
        self.matrix, self.vector = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return F.linear(F.linear(self.norm(x), self.matrix), self.vector).square().mean()


class Convolutions(nn.Module):
    """Four that wait, and two that do not: padding by reflection, and more on one side than on the other."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, stride=2, bias=False, groups=2),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            nn.Conv2d(4, 4, 4, padding="same"),
            nn.Conv2d(4, 4, 3, padding="same", dilation=2),
            nn.ConvTranspose2d(4, 2, 4, 2, 1),
        )

    def forward(self, x):
        return self.layers(x).square().mean()


class Penalised(zoo.Blocks):
    """A weight that is read once by its layer and once by a penalty."""

    def forward(self, x, y):
        for block in self.blocks:
            x = block(x)
        return self.loss(x, y) + self.blocks[0].up.weight.square().sum() + self.blocks[3].up.weight.square().sum()


class UsedTwice(zoo.Blocks):
    """Every layer runs twice, in one stage and in two."""

    def forward(self, x, y):
        for block in (*self.blocks, *self.blocks):
            x = block(x)
        return self.loss(x, y)


class TiedByAnotherName(zoo.Blocks):
    """A head whose weight is a parameter of the model itself."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.head.weight = self.table

    def forward(self, x, y):
        for block in self.blocks:
            x = block(x)
        return self.loss(F.linear(x, self.table), y)


def linears(*blocks: int) -> set[str]:
    return {f"blocks.{i}.{layer}.{kind}" for i in blocks for layer in ("up", "down") for kind in ("weight", "bias")}


HEAD = {"head.weight", "head.bias"}
X, Y = torch.randn(ROWS, LENGTH, WIDTH), torch.randn(ROWS, LENGTH, WIDTH)


def zoo_blocks() -> nn.Module:
    return zoo.AWKWARD["Positional"].build()


def test_linear_layers_wait():
    assert waiting(zoo_blocks(), X, Y) == linears(0, 1, 2, 3) | HEAD


def test_frozen_layers_do_not():
    model = zoo_blocks()
    model.blocks[0].requires_grad_(False)
    model.blocks[1].up.bias.requires_grad_(False)
    model.blocks[2].up.weight.requires_grad_(False)
    assert (
        waiting(model, X, Y)
        == linears(1, 2, 3) - {f"blocks.{i}.up.{k}" for i in (1, 2) for k in ("weight", "bias")} | HEAD
    )


def test_hooks_on_a_module_keep_it_whole():
    model = zoo_blocks()
    model.blocks[1].up.register_full_backward_hook(lambda module, inputs, outputs: None)
    model.blocks[2].up.register_forward_hook(lambda module, inputs, output: output * 2)
    model.blocks[3].up.forward = lambda x: F.linear(x, model.blocks[3].up.weight * 2)
    assert (
        waiting(model, X, Y)
        == linears(0, 1, 2, 3) - {f"blocks.{i}.up.{k}" for i in (1, 2, 3) for k in ("weight", "bias")} | HEAD
    )


def test_glue_convolutions_and_embeddings():
    assert waiting(Glue(), X) == {"matrix"}
    assert waiting(Convolutions(), torch.randn(2, 3, 9, 9)) == \
        {"layers.2.weight"} | {f"layers.{i}.{kind}" for i in (0, 5, 6) for kind in ("weight", "bias")}
    tied = zoo.AWKWARD["TiedHead"]
    assert waiting(tied.build(), *tied.batches[0].values()) == {"embedding.weight"} | linears(0, 1, 2, 3)
    bag = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Embedding(9, 4, max_norm=1.0))
    assert not find_deferrable(pe.capture(Looked(bag), (torch.arange(8),)), Looked(bag))


class Looked(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return sum(layer(x).square().mean() for layer in self.layers)


def test_autocast_waits_where_each_weight_is_read_once():
    """Gradients of a weight that is cast once and read twice are added up before they are cast back."""
    with torch.autocast("cpu", torch.bfloat16):
        assert waiting(zoo_blocks(), X, Y) == linears(0, 1, 2, 3) | HEAD
        assert waiting(UsedTwice(), X, Y) == HEAD


class Autocast(zoo.Blocks):
    """Blocks, a convolution and a matrix under autocast, an embedding too."""

    def __init__(self):
        super().__init__()
        self.conv, self.matrix = nn.Conv1d(LENGTH, LENGTH, 3, padding=1), nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.table = nn.Embedding(7, WIDTH)

    def forward(self, x, y):
        x = x + self.table(torch.arange(LENGTH) % 7)
        with torch.autocast("cpu", torch.bfloat16):
            for block in self.blocks:
                x = block(x)
            x = self.conv(x) + F.linear(x, self.matrix)
            x = torch.addmm(self.blocks[0].up.bias[:WIDTH], x.flatten(0, 1), self.matrix).unflatten(0, (-1, LENGTH))
        return self.loss(x.float(), y)


def test_checkpoints_are_left_alone():
    """What they compute with comes to be in backward."""
    assert waiting(zoo.AWKWARD["Checkpointed"].build(), X, Y) == HEAD


def test_a_parameter_read_in_another_way_does_not_wait():
    assert (
        waiting(Penalised(), X, Y)
        == linears(0, 1, 2, 3) - {f"blocks.{i}.up.{k}" for i in (0, 3) for k in ("weight", "bias")} | HEAD
    )
    assert waiting(TiedByAnotherName(), X, Y) == linears(0, 1, 2, 3) | {"table", "head.bias"}


# -- whole models -----------------------------------------------------------------------------------------------------


def plain(factory: Callable[[], nn.Module], inputs: Callable[[int], tuple] = lambda seed: (X + seed, Y)) -> zoo.Case:
    return zoo.Case(factory.__name__, zoo.seeded(factory), tuple(inputs(seed) for seed in range(2)))


MODELS = {
    case.name: case
    for case in (
        plain(Penalised),
        plain(UsedTwice),
        plain(TiedByAnotherName),
        plain(Autocast),
        plain(Glue, lambda seed: (X + seed,)),
        plain(Convolutions, lambda seed: (torch.randn(ROWS, 3, 9, 9, generator=zoo.draws(seed)),)),
        *(
            zoo.AWKWARD[name]
            for name in (
                "TiedHead",
                "TiedNeighbours",
                "FrozenAndUnused",
                "GradientReversal",
                "Checkpointed",
                "CheckpointedReentrant",
                "GlueParameters",
                "MixedPrecision",
                "Recurrent",
                "Transformer",
                "UNet",
                "Classifier",
            )
        ),
        zoo.hugging_face("gpt2"),
        zoo.hugging_face("llama"),
        zoo.hugging_face("mixtral"),
    )
}


def pipeline(case: zoo.Case, model: nn.Module, **options: object) -> pe.Pipeline:
    example, target = case.split_target(case.batches[0])
    given = dict(num_microbatches=4, schedule="zb-h1", num_stages=2, costs="analytic", check=False)
    return pe.Pipeline(model, example, target=target, loss_fn=case.loss_fn, **{**given, **options})


def step(pipe: pe.Pipeline, case: zoo.Case, batch) -> torch.Tensor:
    inputs, target = case.split_target(copy.deepcopy(batch))
    return pipe.step(**inputs, target=target) if isinstance(inputs, dict) else pipe.step(*inputs, target=target)


def assert_invisible(case: zoo.Case, num_stages: int, exact: bool) -> None:
    model = case.build()
    pipe = pipeline(case, model, num_stages=num_stages)
    met = pipe.plan.ties or any(b.target != b.source + 1 for b in pipe.plan.boundaries)
    assert not (met and exact)
    for batch in case.batches[:2]:
        inputs, target = case.split_target(copy.deepcopy(batch))
        loss, expected = reference_step(case.build(), inputs, 4, loss_fn=case.loss_fn, target=target)
        model.zero_grad()
        assert torch.equal(step(pipe, case, batch), loss)
        worst = worst_difference(expected, gradients(model))
        assert worst[0] <= (1e-6 if met else 0), worst


@pytest.mark.parametrize("name", MODELS)
def test_putting_off_is_invisible(name):
    """Bit for bit as ``(w_i * loss_i).backward()`` in one process, when no gradient meets another on its way."""
    assert_invisible(MODELS[name], 2, exact=False)


@pytest.mark.parametrize("name", ["UsedTwice", "Penalised", "TiedHead", "TiedByAnotherName", "gpt2"])
def test_gradients_of_one_parameter_are_added_first(name):
    """As torch does when a parameter is used several times: added up, and only then accumulated. Otherwise bits
    differ."""
    assert_invisible(MODELS[name], 1, exact=True)


def test_both_halves_do_their_part():
    """After the first I of a stage its linear layers still wait; after the last W all gradients are there."""
    case = zoo.AWKWARD["Positional"]
    model, seen = case.build(), {}
    pipe = pipeline(case, model)
    act = pipe._runner.executor._do["I"]

    def watch(stage: int, *action: object) -> None:
        act(stage, *action)
        seen.setdefault(stage, {n for n, p in model.named_parameters() if p.grad is not None})
    pipe._runner.executor._do["I"] = watch
    step(pipe, case, case.batches[0])
    assert sorted(seen) == [0, 1] and all(".norm." in name for name in seen[1])
    assert gradients(model).keys() == dict(model.named_parameters()).keys()


def test_only_a_halved_backward_pays_for_it():
    """Where a schedule has both kinds, a micro-batch whose backward is one action runs the stage as it is without."""
    case, seen = zoo.AWKWARD["Positional"], {"B": set(), "I": set()}
    pipe = pipeline(case, case.build(), schedule="dualpipe-v", num_stages=4)
    executor = pipe._runner.executor
    for op in seen:
        def watch(stage: int, microbatch: int, peer: int, op=op, act=executor._do[op]) -> None:
            seen[op].add(executor._tasks[microbatch].stages[stage].deferral is not None)
            act(stage, microbatch, peer)
        executor._do[op] = watch
    step(pipe, case, case.batches[0])
    assert seen == {"B": {False}, "I": {True}}


def test_hooks_on_parameters_see_the_whole_batch():
    """Registered before the pipeline or after, a hook gets the gradient of all micro-batches, and may change it."""
    def hooked(model: nn.Module, log: list) -> None:
        weight, bias = model.blocks[0].up.weight, model.blocks[0].up.bias
        weight.register_hook(lambda g: log.append(("tensor", g.clone())) or g * 2)
        bias.register_post_accumulate_grad_hook(lambda p: log.append(("accumulated", p.grad.clone())))
    case = plain(UsedTwice)
    logs, models = ([], []), [case.build() for _ in range(3)]
    reference_step(models[0], case.batches[0], 4)
    truth = gradients(models[0])
    hooked(models[1], logs[0])
    pipes = [pipeline(case, model, num_stages=1) for model in models[1:]]
    hooked(models[2], logs[1])
    expected = {"tensor": truth["blocks.0.up.weight"].clone(), "accumulated": truth["blocks.0.up.bias"].clone()}
    truth["blocks.0.up.weight"] = 2 * truth["blocks.0.up.weight"]
    for pipe, model, log in zip(pipes, models[1:], logs):
        step(pipe, case, case.batches[0])
        assert worst_difference(truth, gradients(model))[0] == 0
        assert len(log) == 2 and all(torch.equal(value, expected[kind]) for kind, value in log)


@pytest.mark.parametrize("name", ["UsedTwice", "gpt2", "Checkpointed", "UNet"])
def test_nothing_is_left_waiting(name):
    """Once gradients exist, a step leaves nothing behind but the loss that it returns."""
    case = MODELS[name]
    model = case.build()
    pipe = pipeline(case, model, num_stages=2)
    for _ in range(2):
        step(pipe, case, case.batches[0])
    assert not pipe._runner.executor._waiting and not pipe._runner.executor._saved and not pipe._runner.executor._ready
    assert live(lambda: step(pipe, case, case.batches[0])).left == 4


# -- recomputation ----------------------------------------------------------------------------------------------------

DROPOUT = zoo.hugging_face("gpt2", dropout=0.2)


@pytest.mark.parametrize("schedule", [pytest.param("1f1b", marks=pytest.mark.slow), "zb-h1"])
@pytest.mark.parametrize("case", [DROPOUT, zoo.AWKWARD["Dropouts"], MODELS["UsedTwice"], MODELS["Checkpointed"]],
                         ids=lambda case: case.name)
def test_recomputing_changes_no_bit(case, schedule):
    """The second forward draws the same dropout masks: losses and gradients are equal, for all stages or for some."""
    found, plan = [], None
    paths = [path for path, module in case.build().named_modules() if path.count(".") == 1 or path.count(".") == 2]
    for recompute in (False, True, {1}, [0, 2], paths[1::2], [1, paths[0]]):
        model = case.build()
        pipe = pipeline(case, model, schedule=schedule, num_stages=3, recompute=recompute, plan=plan)
        plan = pipe.plan
        found.append([(step(pipe, case, batch), {n: g.clone() for n, g in gradients(model).items()})
                      for batch in case.batches[:2]])
    for other in found[1:]:
        for (loss, grads), (same_loss, same_grads) in zip(found[0], other, strict=True):
            assert torch.equal(loss, same_loss) and worst_difference(grads, same_grads)[0] == 0


def test_recomputing_saves_memory():
    """Stage by stage the peak falls: GPipe keeps the inputs of 8 micro-batches, not their activations."""
    case = zoo.hugging_face("gpt2")
    tokens = torch.randint(3, zoo.VOCAB, (8, 48))
    batch = dict(input_ids=tokens, labels=tokens)
    peaks = []
    for recompute in (False, [0], [0, 1], True):
        pipe = pe.Pipeline(
            case.build(),
            batch,
            num_microbatches=8,
            num_stages=3,
            schedule="gpipe",
            costs="analytic",
            check=False,
            recompute=recompute,
        )
        for _ in range(2):
            pipe.step(**batch)
        peaks.append(live(lambda: pipe.step(**batch)).peak)
    assert peaks[0] > peaks[1] > peaks[2] > peaks[3] and peaks[3] < peaks[0] / 3, peaks


def test_recomputing_blocks_saves_memory_as_predicted():
    """Block by block the peak falls as predicted, lower than for the whole stage, whose activations all come back at
    once."""
    case = zoo.hugging_face("gpt2")
    tokens = torch.randint(3, zoo.VOCAB, (8, 48))
    batch = dict(input_ids=tokens, labels=tokens)
    blocks = [path for path, module in case.build().named_modules() if path.count(".") == 2 and ".h." in path]
    peaks, spans = [], []
    for recompute in ([], blocks[:1], blocks, True):
        pipe = pe.Pipeline(
            case.build(),
            batch,
            num_microbatches=8,
            num_stages=1,
            schedule="gpipe",
            costs="analytic",
            check=False,
            recompute=recompute,
        )
        pipe.step(**batch)
        for parameter in pipe.parameters():
            parameter.grad = None
        measured, predicted = live(lambda: pipe.step(**batch)).peak, pipe.predicted_timeline()
        assert measured == pytest.approx(predicted.peak_bytes[0], rel=0.1), recompute
        peaks.append(measured)
        spans.append(predicted.makespan)
    assert peaks[0] > peaks[1] > peaks[3] > peaks[2] and spans == sorted(set(spans)), (peaks, spans)


class Counting(nn.Module):
    """A block that counts its calls in a buffer, behind one that does not."""

    def __init__(self):
        super().__init__()
        self.plain, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(LENGTH)

    def forward(self, x):
        return self.norm(self.plain(x)).square().mean()


@pytest.mark.parametrize(("recompute", "what"), [(True, "stage 0"), (["norm"], "module norm")])
def test_what_would_change_twice_is_refused(recompute, what):
    with pytest.raises(pe.InputError, match=f"{what} cannot be recomputed: norm changes norm"):
        pe.Pipeline(Counting(), (X,), num_stages=1, num_microbatches=2, recompute=recompute)
    pe.Pipeline(Counting(), (X,), num_stages=1, num_microbatches=2, recompute=["plain"]).step(X)


def test_recompute_names_stages_and_modules_that_exist():
    case = zoo.AWKWARD["Positional"]
    with pytest.raises(
        pe.InputError, match="recompute names 'blocks.9', which is no module of the model; its modules are"
    ):
        pipeline(case, case.build(), recompute=["blocks.9"])
    with pytest.raises(pe.InputError, match=r"recompute names stages \[2\]; there are stages 0 to 1"):
        pipeline(case, case.build(), recompute=[0, 2])
