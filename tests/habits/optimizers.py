"""Habits around optimizers: which, over which groups, and what a loop does to gradients and settings in between."""
import copy
from functools import partial

import torch
from torch import nn, optim

from habits import Net, batch, habit, train

OPTIMIZERS = {
    "SGD": partial(optim.SGD, lr=0.1), "Nesterov": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": optim.Adam, "AdamW foreach": partial(optim.AdamW, foreach=True),
    "AdamW fused": partial(optim.AdamW, fused=True),
    "AMSGrad": partial(optim.Adam, amsgrad=True), "RMSprop": partial(optim.RMSprop, centered=True),
    "Adagrad": optim.Adagrad, "Adadelta": optim.Adadelta, "Adamax": optim.Adamax, "NAdam": optim.NAdam,
    "RAdam": optim.RAdam, "Rprop": optim.Rprop, "ASGD": optim.ASGD, "Adafactor": optim.Adafactor,
    "gradient ascent": partial(optim.SGD, lr=0.01, maximize=True),
}
for _name, _make in OPTIMIZERS.items():
    def _loop(start, make=_make):
        trainer = start(Net())
        train(trainer, make(trainer.parameters()))
    habit(_name)(_loop)


@habit("L-BFGS with a closure")
def lbfgs(start):
    trainer = start(Net())
    optimizer = optim.LBFGS(trainer.parameters(), max_iter=4, history_size=3)

    def closure():
        optimizer.zero_grad()
        return trainer.step(**batch(0))
    for _ in range(2):
        trainer.notes.append(optimizer.step(closure))


@habit("SAM: two gradients a step")
def sam(start):
    trainer = start(Net())
    optimizer = optim.SGD(trainer.parameters(), 0.1)
    for number in range(3):
        optimizer.zero_grad()
        trainer.step(**batch(number))
        norm = torch.sqrt(sum(p.grad.square().sum() for p in trainer.parameters()))
        moved = {p: 0.05 * p.grad / norm for p in trainer.parameters()}
        with torch.no_grad():
            for parameter, by in moved.items():
                parameter.add_(by)
        optimizer.zero_grad()
        trainer.step(**batch(number))
        with torch.no_grad():
            for parameter, by in moved.items():
                parameter.sub_(by)
        optimizer.step()


@habit("Lookahead")
def lookahead(start):
    trainer = start(Net())
    slow = {name: p.detach().clone() for name, p in trainer.named_parameters()}

    def back(number):
        if number % 2:
            with torch.no_grad():
                for name, parameter in trainer.named_parameters():
                    slow[name] += 0.5 * (parameter - slow[name])
                    parameter.copy_(slow[name])
    train(trainer, steps=4, after=back)


@habit("an optimizer by hand")
def by_hand(start):
    trainer = start(Net())
    for number in range(3):
        trainer.model.zero_grad()
        trainer.step(**batch(number))
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter -= 0.1 * parameter.grad.sign()


@habit("an optimizer over all parameters flattened")
def flattened(start):
    """Parameters become views of one vector, as ZeRO and some natural-gradient code do."""
    trainer = start(Net())
    flat = nn.utils.parameters_to_vector(trainer.parameters()).detach().clone()
    nn.utils.vector_to_parameters(flat, trainer.parameters())
    for number in range(3):
        trainer.model.zero_grad()
        trainer.step(**batch(number))
        flat -= 0.1 * torch.cat([p.grad.flatten() for p in trainer.parameters()])


@habit("layer-wise learning rates")
def layer_wise(start):
    trainer = start(Net())
    groups = [{"params": [p for name, p in trainer.named_parameters() if name.startswith(f"blocks.{i}.")],
               "lr": 0.1 * 0.8 ** (3 - i)} for i in range(4)]
    train(trainer, optim.AdamW([group for group in groups if group["params"]], weight_decay=0.1))


@habit("no weight decay for biases")
def decay_exclusions(start):
    trainer = start(Net())
    named = list(trainer.named_parameters())
    train(trainer, optim.AdamW([{"params": [p for n, p in named if p.dim() > 1], "weight_decay": 0.1},
                                {"params": [p for n, p in named if p.dim() < 2], "weight_decay": 0.0}]))


@habit("param_groups edited every step")
def edited_groups(start):
    trainer = start(Net())
    optimizer = optim.SGD(trainer.parameters(), 0.1, momentum=0.5)

    def edit(number):
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = 0.1 / (number + 1), 0.5 + 0.1 * number
    train(trainer, optimizer, before=edit)


@habit("add_param_group when a layer is unfrozen")
def added_group(start):
    model = Net()
    model.blocks[0].requires_grad_(False)
    trainer = start(model)
    optimizer = optim.SGD([p for p in trainer.parameters() if p.requires_grad], 0.1, momentum=0.9)
    train(trainer, optimizer, 2)
    model.blocks[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model.blocks[0].parameters()), "lr": 0.01})
    train(trainer, optimizer, 2)


@habit("another optimizer half way")
def swapped(start):
    trainer = start(Net())
    train(trainer, optim.Adam(trainer.parameters()))
    train(trainer, optim.SGD(trainer.parameters(), 0.05))


@habit("the optimizer's state loaded again")
def reloaded(start):
    trainer = start(Net())
    optimizer = optim.Adam(trainer.parameters())
    train(trainer, optimizer, 2)
    kept = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(trainer.model.state_dict())
    train(trainer, optimizer, 2)
    optimizer.load_state_dict(kept[0]), trainer.model.load_state_dict(kept[1])
    train(trainer, optimizer, 2)


@habit("an optimizer made before the pipeline")
def made_before(start):
    model = Net()
    optimizer = optim.Adam(model.parameters())
    train(start(model), optimizer)


@habit("two optimizers, one for each half")
def halves(start):
    trainer = start(Net())
    one, two = (optim.SGD(half.parameters(), rate) for half, rate in ((trainer.model.blocks[:2], 0.1),
                                                                       (trainer.model.blocks[2:], 0.01)))
    for number in range(3):
        one.zero_grad(), two.zero_grad()
        trainer.step(**batch(number))
        one.step(), two.step()


@habit("Muon: an orthogonal update of every matrix")
def muon(start):
    def orthogonal(_):
        for parameter in trainer.parameters():
            if parameter.dim() == 2:
                x = parameter.grad / parameter.grad.norm()
                for _ in range(5):
                    x = 1.5 * x - 0.5 * x @ x.T @ x
                parameter.grad = x
    trainer = start(Net())
    train(trainer, optim.SGD(trainer.parameters(), 0.01), after=orthogonal)


SCHEDULERS = {
    "cosine": partial(optim.lr_scheduler.CosineAnnealingLR, T_max=4),
    "warm restarts": partial(optim.lr_scheduler.CosineAnnealingWarmRestarts, T_0=2),
    "one cycle": partial(optim.lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=5),
    "lambda warm-up": partial(optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: min(1.0, (step + 1) / 3)),
    "cyclic with momentum": partial(optim.lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2),
}
for _name, _schedule in SCHEDULERS.items():
    def _scheduled(start, make=_schedule):
        trainer = start(Net())
        optimizer = optim.SGD(trainer.parameters(), 0.1, momentum=0.9)
        train(trainer, optimizer, 4, scheduler=make(optimizer))
    habit(f"learning rate: {_name}")(_scheduled)


@habit("learning rate: reduced on a plateau of the evaluation")
def plateau(start):
    trainer = start(Net())
    optimizer = optim.SGD(trainer.parameters(), 0.5)
    scheduler = optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(4):
        train(trainer, optimizer, 1)
        trainer.model.eval()
        scheduler.step(nn.functional.mse_loss(trainer.evaluate(batch(8)["x"]), batch(8)["y"]))
        trainer.model.train()
        trainer.notes.append(optimizer.param_groups[0]["lr"])


@habit("learning rate finder, then everything put back")
def finder(start):
    trainer = start(Net())
    optimizer = optim.SGD(trainer.parameters(), 1e-4)
    kept = copy.deepcopy((trainer.model.state_dict(), optimizer.state_dict()))
    for _ in range(5):
        optimizer.param_groups[0]["lr"] *= 3
        train(trainer, optimizer, 1)
    trainer.model.load_state_dict(kept[0]), optimizer.load_state_dict(kept[1])
    train(trainer, optimizer)


# -- gradients between the step and the optimizer ---------------------------------------------------------------------


def around(name: str, after=None, **options):
    """A habit that changes gradients after each step."""
    def loop(start):
        trainer = start(Net())
        train(trainer, after=lambda number: after(trainer, number))
    habit(name, **options)(loop)


def each(change):
    def apply(trainer, number):
        for parameter in trainer.parameters():
            change(parameter, number)
    return apply


around("clipping by the norm", lambda t, n: t.notes.append(t.clip_grad_norm_(0.1)))
around("clipping by torch's norm", lambda t, n: t.notes.append(nn.utils.clip_grad_norm_(t.parameters(), 0.1)))
around("clipping by value", lambda t, n: nn.utils.clip_grad_value_(t.parameters(), 0.01))
around("the norm taken, gradients clipped with it", lambda t, n: nn.utils.clip_grads_with_norm_(
    t.parameters(), 0.1, nn.utils.get_total_norm([p.grad for p in t.parameters()])))
around("adaptive clipping of each parameter", each(lambda p, n: p.grad.mul_(
    (0.01 * p.detach().norm().clamp(min=1e-3) / p.grad.norm()).clamp(max=1))))
around("gradient noise", each(lambda p, n: p.grad.add_(0.01 * torch.randn(p.shape, generator=torch.Generator()
                                                                           .manual_seed(n)))))
around("gradient centralization", each(lambda p, n: p.grad.sub_(p.grad.mean(-1, keepdim=True))))
around("the sign of gradients", each(lambda p, n: setattr(p, "grad", p.grad.sign())))
around("gradients of one layer dropped", lambda t, n: [setattr(p, "grad", None)
                                                       for p in t.model.blocks[1].parameters()])


@habit("gradients accumulated over batches")
def accumulated(start):
    trainer = start(Net())
    optimizer = optim.Adam(trainer.parameters())
    for number in range(6):
        trainer.step(**batch(number))
        if number % 3 == 2:
            for parameter in trainer.parameters():
                parameter.grad /= 3
            optimizer.step(), optimizer.zero_grad()
    trainer.step(**batch(7))


@habit("gradients set to zero, not to None")
def zeroed(start):
    trainer = start(Net())
    optimizer = optim.SGD(trainer.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for number in range(3):
        optimizer.zero_grad(set_to_none=False)
        trainer.step(**batch(number))
        optimizer.step()


@habit("gradients that are views of one buffer")
def viewed(start):
    trainer = start(Net())
    parameters = list(trainer.parameters())
    flat = torch.zeros(sum(p.numel() for p in parameters))
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad = part.view_as(parameter)
    for number in range(3):
        flat.zero_()
        trainer.step(**batch(number))
        nn.utils.parameters_to_vector(parameters)
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters).detach() - 0.1 * flat, parameters)
    trainer.notes.append(flat)


@habit("gradients kept and given back")
def given_back(start):
    trainer = start(Net())
    trainer.step(**batch(0))
    kept = [p.grad for p in trainer.parameters()]
    for parameter in trainer.parameters():
        parameter.grad = None
    trainer.step(**batch(1))
    for parameter, gradient in zip(trainer.parameters(), kept):
        parameter.grad = parameter.grad + gradient
    trainer.step(**batch(2))
    trainer.notes += kept


@habit("gradients of a layer frozen while they accumulate")
def frozen_while(start):
    trainer = start(Net())
    trainer.step(**batch(0))
    trainer.model.blocks[1].requires_grad_(False)
    trainer.step(**batch(1))
    trainer.model.blocks[1].requires_grad_(True)
    trainer.step(**batch(2))


@habit("a step skipped whose loss is not finite")
def skipped(start):
    trainer = start(Net())
    optimizer = optim.SGD(trainer.parameters(), 0.1)
    for number in range(4):
        given = batch(number)
        if number == 1:
            given["x"][0] = float("inf")
        optimizer.zero_grad()
        if trainer.step(**given).isfinite():
            optimizer.step()
    del trainer.notes[1]


@habit("the gradient of a parameter hooked")
def hooked(start):
    model = Net()
    handles = [p.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01)) for p in model.blocks[1].parameters()]
    trainer = start(model)
    train(trainer, steps=2)
    for handle in handles:
        handle.remove()
    model.head.weight.register_hook(lambda gradient: 2 * gradient)
    train(trainer, steps=2)


@habit("an optimizer in the backward")
def in_backward(start):
    """Each parameter is updated as soon as its gradient is there, which then is freed."""
    model = Net()
    for parameter in model.parameters():
        optimizer = optim.SGD([parameter], 0.1)

        def update(parameter, optimizer=optimizer):
            optimizer.step(), optimizer.zero_grad()
        parameter.register_post_accumulate_grad_hook(update)
    trainer = start(model)
    for number in range(3):
        trainer.step(**batch(number))


@habit("a hook on what has accumulated, put on between steps")
def hooked_between(start):
    trainer = start(Net())
    train(trainer, steps=1)
    handle = trainer.model.head.weight.register_post_accumulate_grad_hook(
        lambda parameter: trainer.notes.append(parameter.grad.clone()))
    train(trainer, steps=2)
    handle.remove()
    train(trainer, steps=1)


@habit("sparse embeddings with SparseAdam")
def sparse(start):
    class Tokens(Net):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(9, 6, sparse=True)

        def forward(self, ids, y):
            return super().forward(self.embedding(ids).mean(1), y)
    given = {"ids": torch.randint(9, (4, 3)), "y": batch(0)["y"]}
    trainer = start(Tokens(), given)
    sparse = list(trainer.model.embedding.parameters())
    dense = [p for p in trainer.parameters() if p is not sparse[0]]
    optimizers = optim.SparseAdam(sparse), optim.Adam(dense)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        trainer.step(**given)
        for optimizer in optimizers:
            optimizer.step()
