"""What training loops do: every parameter, gradient and number as in one plain process, or an error by name first."""
import re

import habits.losses
import habits.modules
import habits.optimizers  # noqa: F401
import pytest
import torch
from habits import HABITS, run, state

import pipeengine as pe

pytestmark = pytest.mark.usefixtures("quiet_and_seeded")


@pytest.fixture
def numbers(request):
    """Numbers of the type that a habit asks for: in double nothing is put down to rounding."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(HABITS[request.node.callspec.params["name"]].dtype)
    yield
    torch.set_default_dtype(before)


def differences(expected: dict, found: dict, tolerance: float) -> list[str]:
    """What differs by more than ``tolerance`` of the largest entry of a tensor; gradients by at least 1e-3 of the
    largest of all."""
    told = [f"{name} on one side only" for name in set(expected) ^ set(found)]
    largest = max((float(value.abs().max()) for name, value in expected.items() if "gradient" in name), default=1.0)
    for name in expected.keys() & found.keys():
        one, other = expected[name], found[name]
        scale = max(float(one.abs().max()) if one.numel() else 0.0, 1e-3 * largest if "gradient" in name else 0.0, 1e-9)
        off = float((one.double() - other.double()).abs().max()) / scale if one.shape == other.shape and one.numel() \
            else float(one.shape != other.shape)
        if not off <= tolerance:
            told.append(f"{name} by {off:.2g}")
    return sorted(told)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if number % 2 else name
                                  for number, name in enumerate(HABITS)])
def test_trains_as_one_process_or_says_so(name, numbers, capfd):
    habit = HABITS[name]
    if habit.refused:
        with pytest.raises(pe.PipeEngineError, match=habit.refused):
            run(habit, piped=True)
        return
    found = state(run(habit, piped=True))
    said = capfd.readouterr().err
    if habit.told:
        assert re.search(habit.told, said), said
        return
    expected = state(run(habit, piped=False))
    told = differences(expected, found, habit.tolerance)
    assert not told, told[:6]
    assert habit.truth == "micro" or "loss of the full batch" not in said, said
