"""What training loops do, as data: each habit runs in one plain process and over stages, and is compared.

A habit is a function of ``start``: ``start(model, example, ...)`` gives a ``Trainer``, which is one plain process or a
pipeline, and the habit cannot tell which. Everything else is the loop that a user writes.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from reference import reference_parts, row_weights, split_batch
from torch import nn

import pipeengine as pe

ROWS, WIDTH, MICROBATCHES, STAGES = 4, 6, 2, 3


class Trainer(Protocol):
    """What a loop asks of what trains its model."""

    model: nn.Module
    notes: list

    def step(self, *args: object, target: object = None, **kwargs: object) -> torch.Tensor:
        """Forward and backward; the loss."""

    def evaluate(self, *args: object, **kwargs: object) -> object:
        """Forward only; the model's output."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those to be updated."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those to be updated, and their names."""

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """All gradients scaled to a norm; the norm before."""


@dataclass
class Plain:
    """One process. ``parts`` micro-batches, one after the other: 1 is the whole batch at once."""

    model: nn.Module
    loss_fn: Callable | None
    parts: int
    notes: list = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parameters, self.named_parameters = self.model.parameters, self.model.named_parameters

    def step(self, *args, target=None, **kwargs):
        parts = split_batch(args or kwargs, self.parts)
        targets = None if target is None else [part["target"] for part in split_batch({"target": target}, len(parts))]
        loss = reference_parts(self.model, parts, row_weights(args or kwargs, self.parts), self.loss_fn, targets)
        self.notes.append(loss)
        return loss

    def evaluate(self, *args, **kwargs):
        with torch.no_grad():
            return self.model(*args, **kwargs)

    def clip_grad_norm_(self, max_norm):
        return nn.utils.clip_grad_norm_(self.parameters(), max_norm)


class Piped:
    """A pipeline in this process."""

    def __init__(self, model: nn.Module, example: object, **options):
        self.model, self.notes = model, []
        self.pipe = pe.Pipeline(model, example, costs="analytic", **options)
        for name in ("parameters", "named_parameters", "clip_grad_norm_", "evaluate"):
            setattr(self, name, getattr(self.pipe, name))

    def step(self, *args, target=None, **kwargs):
        loss = self.pipe.step(*args, target=target, **kwargs)
        self.notes.append(loss)
        return loss


@dataclass(frozen=True)
class Habit:
    """``truth``: what a pipeline is compared with: ``"full"`` (one process, whole batches), ``"micro"`` (one process,
    its micro-batches in order) or ``"one stage"`` (a pipeline of one stage: random numbers are the engine's own).
    ``told``: what is said at construction, where the full batch's numbers cannot be given; ``refused``: the error
    before the first wrong number."""

    name: str
    loop: Callable
    truth: str = "full"
    told: str = ""
    refused: str = ""
    tolerance: float = 1e-9
    dtype: torch.dtype = torch.float64
    options: dict = field(default_factory=dict)


HABITS: dict[str, Habit] = {}


def habit(name: str, **options) -> Callable:
    """Put a loop into the table."""
    def add(loop: Callable) -> Callable:
        assert name not in HABITS, name
        HABITS[name] = Habit(name, loop, **options)
        return loop
    return add


def run(one: Habit, piped: bool) -> list[Trainer]:
    """The habit in a pipeline or in what it is compared with; what it has started."""
    started: list[Trainer] = []
    stages = STAGES if piped else 1

    def start(model: nn.Module, example: object = None, *, loss_fn: Callable | None = None, target: object = None,
              **options) -> Trainer:
        if piped or one.truth == "one stage":
            trainer: Trainer = Piped(model, batch(0) if example is None else example, loss_fn=loss_fn, target=target,
                                     **dict(num_microbatches=MICROBATCHES, num_stages=stages) | one.options | options)
        else:
            trainer = Plain(model, loss_fn, MICROBATCHES if one.truth == "micro" else 1)
        started.append(trainer)
        return trainer
    torch.manual_seed(0)
    one.loop(start)
    return started


def state(trainers: list[Trainer]) -> dict[str, torch.Tensor]:
    """Everything that two runs must have alike: notes, parameters, their gradients, buffers."""
    found: dict[str, object] = {}
    for number, trainer in enumerate(trainers):
        found |= {f"{number}: note {n}": torch.as_tensor(note).detach() for n, note in enumerate(trainer.notes)}
        for name, parameter in trainer.model.named_parameters():
            found[f"{number}: {name}"] = parameter.detach()
            if parameter.grad is not None:
                found[f"{number}: gradient of {name}"] = parameter.grad.to_dense()
        found |= {f"{number}: buffer {name}": buffer for name, buffer in trainer.model.named_buffers()}
    return {name: value.clone() for name, value in found.items()}


# -- what habits train ------------------------------------------------------------------------------------------------


def batch(number: int, rows: int = ROWS, width: int = WIDTH) -> dict[str, torch.Tensor]:
    """The batch of this number, always the same one."""
    generator = torch.Generator().manual_seed(100 + number)
    return {name: torch.randn(rows, width, generator=generator, dtype=torch.get_default_dtype()) for name in "xy"}


class Block(nn.Module):
    """A residual block that a loop can reach into."""

    def __init__(self, width: int = WIDTH, norm: Callable | None = None, drop: float = 0.0):
        super().__init__()
        self.linear, self.drop = nn.Linear(width, width), nn.Dropout(drop)
        self.norm = nn.Identity() if norm is None else norm(width)

    def forward(self, x):
        return x + self.drop(torch.tanh(self.norm(self.linear(x))))


class Net(nn.Module):
    """Blocks and a head; the mean squared error where there is a target."""

    def __init__(self, block: Callable = Block, depth: int = 4, **options):
        super().__init__()
        self.blocks = nn.ModuleList(block(**options) for _ in range(depth))
        self.head = nn.Linear(WIDTH, WIDTH)

    def body(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def forward(self, x, y=None):
        x = self.body(x)
        return x if y is None else F.mse_loss(x, y)


def train(trainer: Trainer, optimizer=None, steps: int = 3, before: Callable | None = None,
          after: Callable | None = None, scheduler=None) -> None:
    """An ordinary loop; ``before(number)`` and ``after(number)`` stand around each step."""
    optimizer = optimizer or torch.optim.SGD(trainer.parameters(), 0.1, momentum=0.9)
    for number in range(steps):
        if before:
            before(number)
        optimizer.zero_grad()
        trainer.step(**batch(number))
        if after:
            after(number)
        optimizer.step()
        if scheduler:
            scheduler.step()


def twin(model: nn.Module) -> nn.Module:
    """A copy that is not trained."""
    return copy.deepcopy(model).requires_grad_(False)
