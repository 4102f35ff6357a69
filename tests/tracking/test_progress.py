"""One line on a terminal, plain lines elsewhere."""
import io

import pytest

from pipeengine.tracking import Progress
from pipeengine.tracking.progress import duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def shown(stream, steps, *, first=0, seconds_per_step=1.0, every=10.0):
    clock = Clock()
    progress = Progress(first, steps, stream=stream, seconds=every, clock=clock)
    for step in range(first, steps):
        clock.now += seconds_per_step
        progress.show(step, 2.0 - step / 100, (1234.5, "tokens"))
    progress.close()
    return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    assert shown(io.StringIO(), 25).splitlines() == [
        "step 1 of 25   loss 2.0000   1,234 tokens/s   24 s left",
        "step 11 of 25   loss 1.9000   1,234 tokens/s   14 s left",
        "step 21 of 25   loss 1.8000   1,234 tokens/s   4 s left",
        "step 25 of 25   loss 1.7600   1,234 tokens/s   done"]


def test_time_left_counts_the_steps_of_this_start_only():
    assert shown(io.StringIO(), 1000, first=998, seconds_per_step=60).splitlines()[0].endswith("1 min left")


def test_time_left_is_at_most_what_was_given():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(0, 1000, stream=stream, limit=90.0, clock=clock)
    for step in range(2):
        clock.now += 11.0
        progress.show(step)
    assert [line.split("   ")[-1] for line in stream.getvalue().splitlines()] == ["1 min 19 s left", "1 min 8 s left"]


def test_a_terminal_has_one_line_that_is_written_over():
    text = shown(Terminal(), 4)
    assert text.count("\n") == 1 and text.endswith("\n")
    assert text.split("\r")[1].startswith("[#####...............]   step 1 of 4   loss 2.0000")
    assert "[####################]   step 4 of 4" in text.split("\r")[-1]


def test_a_terminal_is_not_written_more_than_ten_times_a_second():
    assert shown(Terminal(), 1000, seconds_per_step=0.001).count("\r") <= 12


@pytest.mark.parametrize("seconds, text", ((0, "0 s"), (59.4, "59 s"), (60, "1 min"), (200, "3 min 20 s"),
                                           (18600, "5 h 10 min"), (183600, "2 d 3 h"), (-3, "0 s")))
def test_durations(seconds, text):
    assert duration(seconds) == text
