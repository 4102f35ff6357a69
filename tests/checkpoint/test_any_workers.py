"""What any number of workers saves, any number reads: parameters, moments and the way on, bit for bit."""
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import nn
from workers import launch

import pipeengine as pe

VOCAB, WIDTH, ROWS, LENGTH = 61, 16, 6, 10
BEFORE, AFTER = 3, 10


class Language(nn.Module):
    """An embedding, four blocks with dropout, a head; tied, the first and the last stage share the largest tensor."""

    def __init__(self, tied: bool):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(),
                                                  nn.Dropout(0.2), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(4))
        self.register_buffer("seen", torch.arange(3.0))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids, labels):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def in_groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict]:
    """Matrices decay, the rest does not and learns faster."""
    matrices, rest = [], []
    for _, parameter in named:
        (matrices if parameter.dim() > 1 else rest).append(parameter)
    return [dict(params=matrices, weight_decay=0.1), dict(params=rest, weight_decay=0.0, lr=3e-3)]


OPTIMIZERS: dict[str, Callable[[pe.Pipeline], torch.optim.Optimizer]] = {
    "AdamW": lambda pipe: torch.optim.AdamW(in_groups(pipe.named_parameters()), lr=1e-3),
    "SGD": lambda pipe: torch.optim.SGD(pipe.parameters(), lr=1e-2, momentum=0.9, nesterov=True),
    "RMSprop": lambda pipe: torch.optim.RMSprop(pipe.named_parameters(), lr=1e-3, centered=True, momentum=0.5),
    "Adafactor": lambda pipe: torch.optim.Adafactor(pipe.parameters(), lr=1e-2),
}
CASES = [(name, tied) for name in OPTIMIZERS for tied in (True, False)]


def batch(step: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
    return dict(input_ids=tokens, labels=tokens.roll(1, 1))


def pipeline(tied: bool, seed: int) -> pe.Pipeline:
    torch.manual_seed(seed)
    return pe.Pipeline(Language(tied), batch(0), num_microbatches=3, schedule="1f1b", costs="analytic", seed=7)


class Run:
    """A training of one case; ``folder`` takes its checkpoints."""

    def __init__(self, pipe: pe.Pipeline, name: str, folder: Path, scale: float, **options: object):
        self.pipe, self.optimizer = pipe, OPTIMIZERS[name](pipe)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 40)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        self.checkpoints = pe.Checkpoints(folder, self.pipe, optimizer=self.optimizer, scheduler=self.scheduler,
                                          scaler=self.scaler, **options)

    def train(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses.append(float(self.pipe.step(**batch(step))))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
        return losses

    def state(self) -> dict[str, object]:
        """Every tensor of the training that this worker has, by name; settings too."""
        state: dict[str, object] = {name: p.detach().clone() for name, p in self.pipe.named_parameters()}
        for name, p in self.pipe.named_parameters():
            state |= {f"{name}/{key}": value.clone() if isinstance(value, torch.Tensor) else value
                      for key, value in self.optimizer.state[p].items()}
        groups = [{key: value for key, value in group.items() if key not in ("params", "param_names")}
                  for group in self.optimizer.param_groups]
        return state | {"groups": groups, "scale": self.scaler.get_scale(), "lr": self.scheduler.get_last_lr()}


def save(report: Callable, folder: Path) -> None:
    """Train every case a little, save, and go on."""
    for tied in (True, False):
        pipe = pipeline(tied, seed=0)
        for number, name in enumerate(OPTIMIZERS):
            run = Run(pipe, name, folder / name / str(tied), scale=32.0, background=number % 2 == 0)
            run.train(range(BEFORE))
            run.checkpoints.save(BEFORE)
            report(("state", name, tied), run.state())
            report(("losses", name, tied), run.train(range(BEFORE, BEFORE + AFTER)))
            run.checkpoints.wait()
        pipe.close()


def load(report: Callable, folders: dict[int, Path]) -> None:
    """Go on from what others have saved, with a model that has other values."""
    for tied in (True, False):
        pipe = pipeline(tied, seed=1)
        for saved_by, folder in folders.items():
            for name in OPTIMIZERS:
                run = Run(pipe, name, folder / name / str(tied), scale=64.0)
                report(("step", saved_by, name, tied), run.checkpoints.load())
                report(("state", saved_by, name, tied), run.state())
                report(("losses", saved_by, name, tied), run.train(range(BEFORE, BEFORE + AFTER)))
        pipe.close()


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def check(saved: dict[int, list[dict]], loaded: list[dict]) -> None:
    """What each of K' workers has is what some of K had, and every tensor of the model is there."""
    for saved_by, reports in saved.items():
        for case in CASES:
            truth = {key: value for report in reports for key, value in report[("state", *case)].items()}
            seen = set()
            for report in loaded:
                assert report[("step", saved_by, *case)] == BEFORE
                for key, value in report[("state", saved_by, *case)].items():
                    assert same(truth[key], value), (saved_by, case, key)
                    seen.add(key)
                expected, losses = reports[0][("losses", *case)], report[("losses", saved_by, *case)]
                if len(loaded) == saved_by:
                    assert losses == expected, (saved_by, case)
                else:
                    assert losses == pytest.approx(expected, rel=1e-6), (saved_by, case)
            assert seen == set(truth), (saved_by, case)


@pytest.mark.parametrize("counts", [(1, 3), pytest.param((4, 1, 2, 3), marks=pytest.mark.slow)], ids=str)
def test_any_number_of_workers_reads_what_any_other_wrote(counts, tmp_path):
    folders = {count: tmp_path / str(count) for count in counts}
    saved = {count: launch(count, save, folders[count], limit=200) for count in counts}
    for count in counts:
        check(saved, launch(count, load, folders, limit=200))
