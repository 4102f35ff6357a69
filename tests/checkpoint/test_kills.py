"""A kill at every call that changes the disk leaves a whole checkpoint, the old one or the new."""
from pathlib import Path

import kills
import pytest
import threads
import torch

import pipeengine as pe
from pipeengine.checkpoint import load_stage, save_weights


def _save(folder: Path, size: int, step: int, background: bool = False, keep: int = 1) -> None:
    """Workers that hold ``step`` everywhere, in weights and moments, save as ``step``."""
    def work(workers):
        fake = threads.Fake(threads.model(float(step)), threads.owners(size), workers)
        optimizer = torch.optim.SGD(fake.parameters(), lr=0.1, momentum=0.9)
        for parameter in fake.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, float(step))
        fake.numbers["step"] = step
        checkpoints = pe.Checkpoints(folder, fake, keep=keep, background=background, optimizer=optimizer)
        checkpoints.save(step)
        checkpoints.wait()
    threads.as_threads(size, work)


def _load(folder: Path) -> int:
    """The step of what one worker loads, once every tensor has been looked at; 0 where nothing is there."""
    def work(workers):
        fake = threads.Fake(threads.model(-1.0), threads.owners(1), workers)
        optimizer = torch.optim.SGD(fake.parameters(), lr=0.1, momentum=0.9)
        step = pe.Checkpoints(folder, fake, optimizer=optimizer).load()
        for parameter in fake.parameters() if step else ():
            assert (parameter == step).all() and (optimizer.state[parameter]["momentum_buffer"] == step).all()
        assert fake.numbers["step"] == step
        return step
    return threads.as_threads(1, work)[0]


@pytest.mark.parametrize("size, background", [
    (1, False), (3, True), pytest.param(1, True, marks=pytest.mark.slow),
    pytest.param(3, False, marks=pytest.mark.slow)])
def test_a_kill_anywhere_leaves_the_old_or_the_new(size, background, tmp_path):
    """Over an older checkpoint, which goes once the new one is there."""
    before, folder = tmp_path / "before", tmp_path / "run"
    _save(before, size, 100)
    seen = []

    def look(number: int) -> None:
        seen.append(_load(folder))
    count = kills.every_kill(lambda: _save(folder, size, 200, background), before, folder, look)
    assert count > 30 and set(seen) == {100, 200} and seen[-1] == 200
    assert [path.name for path in folder.iterdir()] == ["step-000200"], "what is older goes, and nothing is left behind"


def test_a_kill_while_a_step_is_saved_again(tmp_path):
    """The one checkpoint there is makes way for another of the same step, and never is there none."""
    before, folder = tmp_path / "before", tmp_path / "run"
    _save(before, 1, 100)

    def look(number: int) -> None:
        assert _load(folder) == 100
    assert kills.every_kill(lambda: _save(folder, 1, 100), before, folder, look) > 20
    assert [path.name for path in folder.iterdir()] == ["step-000100"]


@pytest.mark.parametrize("size", [1, 3])
def test_a_kill_after_a_kill(size, tmp_path):
    """What one save has left half done is no obstacle for the next, which removes it."""
    folder = tmp_path / "run"
    _save(folder, size, 100)
    for number in range(1, 40, 3):
        def killed(number=number) -> None:
            kills.die_at(number)
            _save(folder, size, 200)
        assert kills.in_fork(killed) in (kills.KILLED, 0)
        assert _load(folder) in (100, 200)
    _save(folder, size, 300)
    assert _load(folder) == 300 and [path.name for path in folder.iterdir()] == ["step-000300"]


@pytest.mark.parametrize("old, new", [
    (1, 1), (3, 3), (1, 3), (3, 1), pytest.param(2, 3, marks=pytest.mark.slow),
    pytest.param(0, 3, marks=pytest.mark.slow)])
def test_a_kill_while_weights_are_saved_again(old, new, tmp_path):
    """Over weights of other numbers of workers: 10 of 30 kills once left a mixture of two saves."""
    def save(folder: Path, size: int, value: float) -> None:
        def work(workers):
            owned = {name for name, rank in threads.owners(size).items() if rank == workers.rank}
            save_weights(threads.model(value), owned, folder, workers)
        threads.as_threads(size, work)

    def look(number: int) -> None:
        model = threads.model(-1.0)
        try:
            load_stage(model, set(threads.owners(1)), torch.device("cpu"), weights=folder, seed=0)
        except pe.InputError as error:
            assert not old and "neither" in str(error), error
            seen.append(None)
            return
        values = {float(value) for parameter in model.parameters() for value in parameter.detach().flatten()}
        assert len(values) == 1, f"after {number} calls the folder holds a mixture"
        seen.append(values.pop())
    seen: list[float | None] = []
    before, folder = tmp_path / "before", tmp_path / "weights"
    before.mkdir()
    if old:
        save(before, old, 1.0)
    assert kills.every_kill(lambda: save(folder, new, 2.0), before, folder, look) > 10
    assert set(seen) == {1.0 if old else None, 2.0} and seen[-1] == 2.0
    left = {path.name for path in folder.iterdir()}
    assert len(left) == (1 if new == 1 else new + 1), left
