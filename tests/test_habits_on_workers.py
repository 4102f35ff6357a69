"""Habits on two workers, all in one launch: the same numbers as one process, or the same error on both."""
import re

import habits
import habits.losses
import habits.modules
import habits.optimizers
import pytest
import torch
from test_habits import differences
from workers import launch

pytestmark = pytest.mark.usefixtures("quiet_and_seeded")
# One is left out: torch itself stops at weights of the other worker's, which are on meta.
REFUSED = [name for name, habit in habits.HABITS.items() if habit.refused and name != "pruning made permanent"]
EQUAL = ["SGD", "AdamW fused", "Adafactor", "learning rate: one cycle", "clipping by value",
         "a number given to every step", "a buffer of the loss filled", "a context variable read by the forward",
         "batches of changing size", "mixup", "autocast around some steps", "gradient reversal annealed",
         "checkpointing switched on and off", "layers frozen half way",
         "a hook on all modules", "gradients accumulated over batches",
         "a hook that changes gradients", "the gradient of a parameter hooked"]


def _work(report):
    habits.STAGES = 2
    for name in (*REFUSED, *EQUAL):         # in one process group: whoever comes after an error shows that it goes on
        habit = habits.HABITS[name]
        torch.set_default_dtype(habit.dtype)
        try:
            held = habits.state(habits.run(habit, piped=True))
            report(name, {key: value for key, value in held.items() if not value.is_meta})
        except Exception as error:
            report(name, f"{type(error).__name__}: {error}".replace(" (on worker 0)", ""))


@pytest.fixture(scope="module")
def reports():
    return launch(2, _work, limit=240.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_the_same_error_on_both(name, reports):
    one, other = (report[name] for report in reports)
    assert one == other
    assert isinstance(one, str) and re.search(habits.HABITS[name].refused, one)
    assert one.split(":")[0] in ("CaptureError", "InputError")


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_the_same_numbers_on_both(name, reports):
    habit, before = habits.HABITS[name], torch.get_default_dtype()
    torch.set_default_dtype(habit.dtype)
    try:
        expected = habits.state(habits.run(habit, piped=False))
    finally:
        torch.set_default_dtype(before)
    found: dict[str, torch.Tensor] = {}
    for report in reports:
        assert isinstance(report[name], dict), report[name]
        told = differences({key: expected[key] for key in report[name].keys() & expected.keys()}, report[name],
                           habit.tolerance)
        assert not told, told[:6]
        found |= report[name]
    assert found.keys() == expected.keys()
