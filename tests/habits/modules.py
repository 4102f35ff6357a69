"""Habits around the model: frozen, switched, changed by hand, hooked, copied, saved and loaded while it trains."""
import copy
import io

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.nn.utils import parametrizations, parametrize, prune

from habits import WIDTH, Block, Net, batch, habit, train, twin


def between(name: str, change, model=Net, steps: int = 2, **options):
    """Train, ``change(trainer)``, train on."""
    def loop(start):
        trainer = start(model())
        train(trainer, steps=steps)
        change(trainer)
        train(trainer, steps=steps)
    habit(name, **options)(loop)


def no_grad(change):
    def apply(trainer):
        with torch.no_grad():
            change(trainer.model)
    return apply


class Normed(Net):
    def __init__(self):
        super().__init__(norm=nn.BatchNorm1d)


class Buffered(Net):
    """With a buffer, a tensor that is none, and numbers beside them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(WIDTH))
        self.register_buffer("unsaved", torch.ones(WIDTH), persistent=False)
        self.mask = torch.ones(WIDTH)
        self.options = {"masks": [torch.ones(WIDTH)], "rates": [1.0, 2.0]}

    def forward(self, x, y=None):
        x = x * self.scale * self.mask * self.options["masks"][0] * self.options["rates"][0]
        return super().forward(x * self.unsaved, y)


# -- frozen and switched ----------------------------------------------------------------------------------------------

between("layers frozen half way", lambda t: t.model.blocks[:2].requires_grad_(False))
between("the head frozen half way", lambda t: t.model.head.requires_grad_(False))
between("one tensor frozen half way", lambda t: t.model.blocks[1].linear.bias.requires_grad_(False))


@habit("layers unfrozen one by one")
def unfrozen(start):
    model = Net()
    model.blocks.requires_grad_(False)
    trainer = start(model)
    for block in reversed(model.blocks):
        train(trainer, steps=1)
        block.requires_grad_(True)
    train(trainer)


@habit("frozen and unfrozen in turns")
def in_turns(start):
    trainer = start(Net())
    halves = trainer.model.blocks[:2], trainer.model.blocks[2:]
    optimizers = [optim.SGD(half.parameters(), 0.1) for half in halves]
    for number in range(4):
        halves[number % 2].requires_grad_(True), halves[1 - number % 2].requires_grad_(False)
        train(trainer, optimizers[number % 2], 1)


between("batch norm in evaluation mode while training", lambda t: [
    m.eval() for m in t.model.modules() if isinstance(m, nn.BatchNorm1d)], Normed, truth="micro")
between("another momentum of batch norm", lambda t: [
    setattr(m, "momentum", 0.5) for m in t.model.modules() if isinstance(m, nn.BatchNorm1d)], Normed, truth="micro")
between("running statistics reset", lambda t: [
    m.reset_running_stats() for m in t.model.modules() if isinstance(m, nn.BatchNorm1d)], Normed, truth="micro")
between("batch norm without statistics of its own", lambda t: [
    setattr(m, "track_running_stats", False) for m in t.model.modules() if isinstance(m, nn.BatchNorm1d)], Normed,
    truth="micro")
between("synchronised batch norm put in", lambda t: nn.SyncBatchNorm.convert_sync_batchnorm(t.model), Normed,
        truth="micro")


@habit("evaluation between steps")
def evaluated(start):
    trainer = start(Net(drop=0.3))
    for number in range(3):
        trainer.model.eval()
        trainer.notes.append(trainer.evaluate(batch(8)["x"]))
        trainer.notes.append(trainer.evaluate(**batch(8)))
        trainer.step(**batch(number))
    with torch.inference_mode():
        trainer.notes.append(trainer.evaluate(batch(9)["x"]).clone())
    train(trainer, steps=1)


@habit("the model called by itself between steps")
def called(start):
    trainer = start(Net())
    for _ in range(2):
        with torch.no_grad():
            trainer.notes.append(trainer.model(**batch(8)))
        with torch.inference_mode():
            trainer.notes.append(trainer.model(batch(8)["x"]).clone())
        train(trainer, steps=1)
        trainer.model(**batch(7)).backward()        # onto the same gradients


@habit("dropout switched off and on", truth="one stage")
def dropouts(start):
    trainer = start(Net(drop=0.5))
    for rate in (0.5, 0.0, 0.2, 1.0, 0.5):
        for module in trainer.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = rate
        train(trainer, steps=1)


@habit("a seed set in the loop", truth="one stage")
def seeded(start):
    trainer = start(Net(drop=0.5))
    for number in range(3):
        torch.manual_seed(number)
        noise = torch.rand(())
        trainer.step(batch(number)["x"] + noise, batch(number)["y"])
        trainer.notes.append(noise)


# -- changed by hand --------------------------------------------------------------------------------------------------

between("weights clipped", no_grad(lambda m: [p.clamp_(-0.1, 0.1) for p in m.parameters()]))
between("weights of the data attribute replaced", lambda t: [setattr(p, "data", p.data * 0.5)
                                                             for p in t.model.parameters()])
between("a layer initialised again", lambda t: t.model.head.reset_parameters())
between("weights copied from another layer", no_grad(lambda m: m.blocks[0].linear.weight.copy_(m.head.weight)))
between("another parameter in its place", lambda t: setattr(
    t.model.head, "weight", nn.Parameter(t.model.head.weight.detach() * 0.5)))
between("a layer replaced", lambda t: setattr(t.model, "head", nn.Linear(WIDTH, WIDTH)))
between("a block replaced", lambda t: t.model.blocks.__setitem__(1, Block()))
between("an activation replaced", lambda t: setattr(t.model.blocks[1], "drop", nn.ReLU()))
between("a layer replaced by nothing", lambda t: setattr(t.model, "head", nn.Identity()))
between("a layer taken out", lambda t: t.model.blocks.__delitem__(1))
between("layers in another order", lambda t: setattr(t.model, "blocks", nn.ModuleList(reversed(t.model.blocks))))
between("a layer added", lambda t: t.model.blocks.append(Block()), refused="blocks.4")
between("a buffer filled", no_grad(lambda m: m.scale.fill_(0.5)), Buffered)
between("a buffer put in its place", lambda t: setattr(t.model, "scale", torch.full((WIDTH,), 0.5)), Buffered)
between("a buffer that is not saved changed", lambda t: t.model.unsaved.mul_(0.5), Buffered)
between("a buffer of another shape in its place", lambda t: setattr(t.model, "scale", torch.full((4, 1), 0.5)[:1]),
        Buffered)
between("a tensor that is no buffer filled", lambda t: t.model.mask.fill_(0.5), Buffered)
between("a tensor that is no buffer replaced", lambda t: setattr(t.model, "mask", torch.full((WIDTH,), 0.5)), Buffered)
between("a tensor in a list filled", lambda t: t.model.options["masks"][0].fill_(0.5), Buffered)
between("a tensor in a list replaced", lambda t: t.model.options.update(masks=[torch.full((WIDTH,), 0.5)]), Buffered)
between("a number in a list", lambda t: t.model.options["rates"].__setitem__(0, 0.5), Buffered)
between("a forward replaced on an object", lambda t: setattr(
    t.model.blocks[1], "forward", lambda x: torch.relu(x)))
between("tied in the middle", lambda t: setattr(t.model.blocks[0].linear, "weight", t.model.blocks[3].linear.weight),
        refused="were two when")
between("untied in the middle", lambda t: setattr(
    t.model.head, "weight", nn.Parameter(t.model.head.weight.detach().clone())),
    lambda: _tied(Net()), refused="were one when")
between("the whole model in another precision and back", lambda t: t.model.float().double(), tolerance=1e-9)


def _tied(model):
    model.head.weight = model.blocks[0].linear.weight
    return model


# -- parametrizations -------------------------------------------------------------------------------------------------

class Symmetric(nn.Module):
    def forward(self, weight):
        return (weight + weight.T) / 2


def made(change):
    def build():
        model = Net()
        for block in model.blocks:
            change(block.linear)
        return model
    return build


PARAMETRIZED = {
    "weight norm": parametrizations.weight_norm, "weight norm of old": nn.utils.weight_norm,
    "orthogonal weights": parametrizations.orthogonal,
    "a parametrization of one's own": lambda m: parametrize.register_parametrization(m, "weight", Symmetric()),
    "pruned weights": lambda m: prune.l1_unstructured(m, "weight", 0.3),
}
for _name, _change in PARAMETRIZED.items():
    def _loop(start, change=_change):
        train(start(made(change)()))
    habit(_name)(_loop)
habit("spectral norm", truth="micro")(lambda start: train(start(made(parametrizations.spectral_norm)())))
habit("spectral norm of old", truth="micro")(lambda start: train(start(made(nn.utils.spectral_norm)())))
between("pruned in the middle", lambda t: prune.l1_unstructured(t.model.head, "weight", 0.3), refused="weight_orig")
between("pruning made permanent", lambda t: [prune.remove(b.linear, "weight") for b in t.model.blocks],
        made(PARAMETRIZED["pruned weights"]), refused=r"blocks\.0\.linear\.weight")
between("a parametrization put on in the middle", lambda t: parametrize.register_parametrization(
    t.model.head, "weight", Symmetric()), refused="original")
between("parametrizations taken off", lambda t: [parametrize.remove_parametrizations(b.linear, "weight")
                                                 for b in t.model.blocks],
        made(PARAMETRIZED["a parametrization of one's own"]), refused=r"blocks\.0\.linear\.weight")
between("pruned again with another mask", lambda t: [b.linear.weight_mask.copy_(torch.eye(WIDTH))
                                                     for b in t.model.blocks], made(PARAMETRIZED["pruned weights"]))


# -- hooks ------------------------------------------------------------------------------------------------------------

@habit("a hook that looks at activations", truth="micro")
def looked_at(start):
    """It sees one micro-batch at a time, and made-up tensors while the model is recorded."""
    model, seen = Net(), {}
    model.blocks[1].register_forward_hook(lambda module, args, output: seen.update(last=output.detach()))
    trainer = start(model)
    for _ in range(2):
        train(trainer, steps=1)
        trainer.notes.append(seen["last"])


between("a hook that changes an output", lambda t: t.model.blocks[1].register_forward_hook(
    lambda module, args, output: output * 2))
between("a hook before a forward", lambda t: t.model.blocks[2].register_forward_pre_hook(
    lambda module, args: (args[0] + 1,)))
between("a hook on the model", lambda t: t.model.register_forward_hook(lambda module, args, output: output * 2),
        refused="the model itself has forward hooks")
between("a hook that changes gradients", lambda t: t.model.blocks[1].register_full_backward_hook(
    lambda module, into, out: (into[0] * 2,)))


@habit("hooks taken off again")
def taken_off(start):
    model = Net()
    handles = [model.blocks[1].register_forward_hook(lambda m, a, o: o * 2),
               model.blocks[2].register_forward_pre_hook(lambda m, a: (a[0] * 2,))]
    trainer = start(model)
    for handle in handles:
        train(trainer, steps=1)
        handle.remove()
    train(trainer, steps=1)


@habit("a hook on all modules")
def global_hook(start):
    trainer = start(Net())
    train(trainer, steps=1)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if isinstance(module, Block) else None)
    try:
        train(trainer, steps=1)
    finally:
        handle.remove()
    train(trainer, steps=1)


# -- copied, averaged, saved, loaded ----------------------------------------------------------------------------------

@habit("an exponential moving average")
def ema(start):
    trainer = start(Net())
    average = optim.swa_utils.AveragedModel(trainer.model, multi_avg_fn=optim.swa_utils.get_ema_multi_avg_fn(0.9))
    train(trainer, after=lambda number: average.update_parameters(trainer.model))
    trainer.notes += [p.detach() for p in average.parameters()]


@habit("stochastic weight averaging", truth="micro")
def swa(start):
    trainer = start(Normed())
    average = optim.swa_utils.AveragedModel(trainer.model)
    train(trainer, after=lambda number: average.update_parameters(trainer.model))
    optim.swa_utils.update_bn([batch(n)["x"] for n in range(3)], average)
    trainer.notes += [*(p.detach() for p in average.parameters()), *average.buffers()]
    trainer.model.load_state_dict(average.module.state_dict())
    train(trainer)


@habit("the best weights come back")
def best(start):
    trainer = start(Net())
    train(trainer)
    kept = copy.deepcopy(trainer.model.state_dict())
    train(trainer)
    trainer.model.load_state_dict(kept)
    train(trainer)


between("weights loaded by assignment", lambda t: t.model.load_state_dict(
    {name: value * 0.5 for name, value in t.model.state_dict().items()}, assign=True))


@habit("saved and loaded in the middle")
def saved(start):
    trainer = start(Buffered())
    optimizer = optim.AdamW(trainer.parameters())
    train(trainer, optimizer)
    file = io.BytesIO()
    torch.save((trainer.model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file)
    model = Buffered()
    model.load_state_dict(weights)
    again = start(model)
    optimizer = optim.AdamW(again.parameters())
    optimizer.load_state_dict(state)
    train(again, optimizer)


@habit("a copy goes on by itself")
def copied(start):
    trainer = start(Net())
    train(trainer)
    other = copy.deepcopy(trainer.model)
    train(trainer)
    other(**batch(3)).backward()
    trainer.notes += [p.grad for p in other.parameters()]
    again = start(other)
    train(again)
    train(trainer)


@habit("two models that train together")
def together(start):
    one, two = start(Net()), start(Net(depth=3))
    optimizer = optim.SGD([*one.parameters(), *two.parameters()], 0.1)
    for number in range(3):
        optimizer.zero_grad()
        one.step(**batch(number))
        target = one.evaluate(batch(number)["x"])
        two.step(batch(number)["x"], target)
        optimizer.step()


@habit("a teacher beside the model")
def teacher(start):
    model = Net()
    guide = twin(model)
    trainer = start(model)
    optimizer = optim.SGD(trainer.parameters(), 0.1)
    for number in range(3):
        optimizer.zero_grad()
        with torch.no_grad():
            target = guide(batch(number)["x"])
        trainer.step(batch(number)["x"], target)
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(guide.parameters(), trainer.model.parameters()):
                old.lerp_(new, 0.1)


class Distilled(nn.Module):
    """The teacher is a part of the model, and a moving average of the student."""

    def __init__(self):
        super().__init__()
        self.student = Net()
        self.teacher = twin(self.student)

    def forward(self, x, y):
        with torch.no_grad():
            target = self.teacher(x)
        output = self.student(x)
        return F.mse_loss(output, target) + 0.1 * F.mse_loss(output, y)


@habit("a teacher inside the model")
def mean_teacher(start):
    trainer = start(Distilled())

    def average(_):
        with torch.no_grad():
            for old, new in zip(trainer.model.teacher.parameters(), trainer.model.student.parameters()):
                old.lerp_(new, 0.5)
    train(trainer, optim.SGD(trainer.model.student.parameters(), 0.1), after=average)
