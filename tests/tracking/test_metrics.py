"""metrics.jsonl is whole whatever happens, and a step stands in it once."""
import json
import math

import numpy as np
import pytest
import torch

from pipeengine import InputError
from pipeengine.tracking import MetricsFile, plain_values, read_metrics, series


def write(path, first, *records):
    file = MetricsFile(path)
    gone = file.go_on(first)
    for record in records:
        file.write(record)
    return gone


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    records = [{"step": 0, "loss": 0.1 + 0.2, "text": "a\nb"}, {"step": 1, "loss": 1e-300}]
    write(path, 0, *records)
    assert read_metrics(path) == records
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_numbers_that_json_has_no_word_for_come_back(tmp_path):
    write(tmp_path / "m.jsonl", 0, {"step": 0, "a": math.nan, "b": math.inf, "c": -math.inf})
    text = (tmp_path / "m.jsonl").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    (record,) = read_metrics(tmp_path / "m.jsonl")
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_torn_last_line_is_dropped_wherever_it_was_cut(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, {"step": 0, "loss": 1.0}, {"step": 1, "loss": 2.0})
    path.write_bytes(path.read_bytes()[:-cut])
    write(path, 1, {"step": 1, "loss": 3.0})
    assert read_metrics(path) == [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 3.0}]


def test_steps_that_are_trained_again_stand_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, *({"step": step, "loss": float(step)} for step in range(7)))
    assert write(path, 4, {"step": 4, "loss": 40.0}) == {step: {"step", "loss"} for step in (4, 5, 6)}
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3, 4]
    assert series(read_metrics(path), "loss")[-1] == (4, 40.0)


def test_what_is_no_record_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\nnonsense\n[1]\n{"loss": 1}\n{"step": "x"}\n\xff\xfe\n{"step": 1}\n')
    assert [record["step"] for record in read_metrics(path)] == [0, 1]
    assert read_metrics(tmp_path / "nothing") == []


def test_a_series_takes_numbers_by_step():
    records = [{"step": 2, "a": 1.0}, {"step": 0, "a": "text"}, {"step": 1, "a": True}, {"step": 2, "a": 3},
               {"step": 0, "b": 1.0}]
    assert series(records, "a") == ((2, 3.0),)


def test_values_of_one_element_are_numbers():
    values = {"tensor": torch.tensor(2.5), "row": torch.tensor([[3]]), "numpy": np.float32(0.5), "int": 3, "text": "x",
              "grad": torch.tensor(1.0, requires_grad=True), "array": np.array([4.0])}
    assert plain_values(values) == {"tensor": 2.5, "row": 3, "numpy": 0.5, "int": 3, "text": "x", "grad": 1.0,
                                    "array": 4.0}


@pytest.mark.parametrize("value, told", ((torch.zeros(2, 3), "Tensor of 6 elements"), (None, "NoneType"),
                                         ([1.0], "list"), ({}, "dict")))
def test_other_values_are_refused_by_name(value, told):
    with pytest.raises(InputError, match=f"accuracy is a {told}; log a number"):
        plain_values({"accuracy": value})
