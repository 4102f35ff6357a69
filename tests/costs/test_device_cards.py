"""Devices by name, and the card of the machine at hand."""
import json

import pytest

from pipeengine.cli.main import main
from pipeengine.costs import DeviceDescription, describe, measure_device
from pipeengine.device_cards import CARDS, DeviceCard, device_card
from pipeengine.errors import InputError


@pytest.mark.parametrize("name", CARDS)
def test_a_card_reaches_less_than_its_peak_and_says_so(name):
    card = device_card(name.upper())
    kinds = ("bfloat16", "torch.float16", "float32", "float64")
    assert all(0 < card.achieved(kind) <= card.peak(kind) for kind in kinds)
    assert 0 < card.memory_rate <= card.peak_memory_rate and card.memory >= 16e9
    assert not card.measured and "estimated" in card.source
    assert DeviceCard.from_json(json.loads(json.dumps(card.to_json()))) == card


def test_half_precisions_have_the_half_precision_rate():
    card = device_card("a100")
    assert card.peak("torch.bfloat16") == 312e12 and card.peak("torch.float32") == 19.5e12
    assert describe(card, "torch.float16") == DeviceDescription(156e12, 0.8 * 2.039e12, 5e-6)


def test_the_command_measures_this_machine_and_other_commands_read_it(tmp_path, capsys):
    file = tmp_path / "mine.json"
    assert main(["profile", "--device-card", str(file), "--device", "cpu", "--format", "json"]) == 0
    card = device_card(file)
    assert card == DeviceCard.from_json(json.loads(capsys.readouterr().out))
    assert card.measured and card.name.startswith("cpu") and card.memory > 1e8
    assert card.achieved("float32") > 1e8 and 1e-8 < card.operation_seconds < 1e-2
    assert card.achieved("float32") < 100 * measure_device("cpu").achieved("float32"), "not off by orders of magnitude"


@pytest.mark.parametrize("name, says", (("h10", "did you mean 'h100'"), ("no/such.json", "cannot read")))
def test_unknown_devices_are_refused(name, says):
    with pytest.raises(InputError, match=says):
        device_card(name)


@pytest.mark.parametrize("text", ('{"format": "pipeline-device/1"}', "{}", "[1]", '{"format": "pipeline-device/1", '
                         '"name": "x", "peak_flops": {}, "flops": {"bfloat16": -1, "float32": 1}, '
                         '"peak_memory_rate": 1, "memory_rate": 1, "memory": 1}'))
def test_damaged_cards_are_refused(tmp_path, text):
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(InputError, match="device card"):
        device_card(tmp_path / "card.json")


def test_nothing_to_profile_is_an_error(capsys):
    assert main(["profile", "--format", "json"]) == 2
    assert "nothing to measure" in json.loads(capsys.readouterr().out)["error"]
