"""What devices can do, by name: rates, memory and links. Bytes, seconds, operations per second. No torch.

Peaks, memory and links are those of the makers' public datasheets (dense, without sparsity). Achieved rates of the
named cards are *estimates*: the share of the peak that training of large transformers commonly reaches, not measured by
this project. ``pipeengine profile --device-card`` measures a machine and writes a card that says so.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from pipeengine.errors import InputError

FORMAT = "pipeline-device/1"
_MATRIX_SHARE, _MEMORY_SHARE = 0.5, 0.8
_ESTIMATE = "achieved rates estimated at 50 % of the peak FLOP/s and 80 % of the peak bytes/s"


@dataclass(frozen=True)
class DeviceCard:
    """One kind of device. Rates per second, sizes in bytes.

    ``peak_flops`` and ``flops`` (achieved by large matrix products) are by precision (``"bfloat16"``, ``"float32"``);
    ``peak_memory_rate`` and ``memory_rate`` are bytes per second of the device's own memory. ``link_inside`` is what a
    device sends to another of its node in one direction, ``link_between`` to one of another node; None where a machine
    has no such link. ``operation_seconds`` is what starting one operation costs. ``source`` says where the figures are
    from, and ``measured`` whether the achieved ones were measured.
    """

    name: str
    peak_flops: Mapping[str, float]
    flops: Mapping[str, float]
    peak_memory_rate: float
    memory_rate: float
    memory: float
    link_inside: float | None = None
    link_between: float | None = None
    link_latency: float = 1e-5
    operation_seconds: float = 5e-6
    measured: bool = False
    source: str = ""

    def achieved(self, precision: str) -> float:
        """FLOP/s that matrix products reach in ``precision``; half precisions count alike, others as float32."""
        return self.flops[_kind(precision)]

    def peak(self, precision: str) -> float:
        """FLOP/s of the datasheet in ``precision``."""
        return self.peak_flops[_kind(precision)]

    def to_json(self) -> dict:
        """One JSON object; ``from_json`` reads it back."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, obj: object) -> DeviceCard:
        """The card that ``to_json`` wrote. Raises ``InputError`` for anything else."""
        if not isinstance(obj, Mapping) or obj.get("format") != FORMAT:
            raise InputError(f"this is no device card: a card has \"format\": \"{FORMAT}\"; write one with "
                             "pipeengine profile --device-card FILE")
        names = {field.name for field in fields(cls)}
        try:
            card = cls(**{name: value for name, value in obj.items() if name in names})
            rates = (*card.flops.values(), *card.peak_flops.values(), card.memory_rate, card.memory)
            if not all(rate > 0 for rate in rates) or set(card.flops) != {"bfloat16", "float32"}:
                raise ValueError(f"rates and memory are {min(rates):g} or more; each must be over 0, for bfloat16 and "
                                 "float32")
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"the device card is damaged: {error}") from error
        return card


def _kind(precision: str) -> str:
    return "bfloat16" if precision.removeprefix("torch.") in ("bfloat16", "float16") else "float32"


def _card(name: str, half: float, single: float, memory_rate: float, memory: float, inside: float | None,
          between: float | None, source: str, link_latency: float = 1e-5) -> DeviceCard:
    peak = {"bfloat16": half, "float32": single}
    return DeviceCard(name, peak, {kind: _MATRIX_SHARE * rate for kind, rate in peak.items()}, memory_rate,
                      _MEMORY_SHARE * memory_rate, memory, inside, between,
                      link_latency, source=f"{source}; {_ESTIMATE}")


# float32 is what torch does by default for matrix products: without TF32, but on CDNA 3 with its matrix cores.
CARDS = {card.name: card for card in (
    _card("h100", 989.4e12, 66.9e12, 3.35e12, 80e9, 450e9, 50e9,
          "NVIDIA H100 SXM datasheet: 989.4 TFLOP/s BF16, 67 FP32, 3.35 TB/s, 80 GB, NVLink 900 GB/s both ways; one "
          "400 Gb/s network port per device as in DGX H100"),
    _card("h200", 989.4e12, 66.9e12, 4.8e12, 141e9, 450e9, 50e9,
          "NVIDIA H200 SXM datasheet: 989.4 TFLOP/s BF16, 67 FP32, 4.8 TB/s, 141 GB, NVLink 900 GB/s both ways; one "
          "400 Gb/s network port per device as in DGX H200"),
    _card("a100", 312e12, 19.5e12, 2.039e12, 80e9, 300e9, 25e9,
          "NVIDIA A100 80GB SXM datasheet: 312 TFLOP/s BF16, 19.5 FP32, 2.039 TB/s, 80 GB, NVLink 600 GB/s both ways; "
          "one 200 Gb/s network port per device as in DGX A100"),
    _card("rtx4090", 165.2e12, 82.6e12, 1.008e12, 24e9, 32e9, 1.25e9,
          "NVIDIA Ada architecture paper: RTX 4090, 165.2 TFLOP/s BF16 with FP32 accumulation, 82.6 FP32, 1,008 GB/s, "
          "24 GB, PCIe 4.0 x16 (32 GB/s each way, through the host); between machines 10 Gb/s Ethernet assumed"),
    _card("l4", 121e12, 30.3e12, 300e9, 24e9, 32e9, 12.5e9,
          "NVIDIA L4 datasheet: 121 TFLOP/s BF16 without sparsity, 30.3 FP32, 300 GB/s, 24 GB, PCIe 4.0 x16 "
          "(32 GB/s each way); between machines 100 Gb/s assumed"),
    _card("mi300x", 1307.4e12, 163.4e12, 5.3e12, 192e9, 64e9, 50e9,
          "AMD Instinct MI300X datasheet: 1,307.4 TFLOP/s BF16, 163.4 FP32, 5.3 TB/s, 192 GB, Infinity Fabric "
          "128 GB/s both ways to each peer; one 400 Gb/s network port per device assumed"),
    _card("cpu", 1e11, 1e11, 2e10, 16e9, 1e9, 1e9,
          "no datasheet: one process of a few cores, rates and links guessed; measure yours with "
          "pipeengine profile --device-card FILE", link_latency=4e-4),
)}


def device_card(name: str | Path) -> DeviceCard:
    """The card called ``name`` (one of ``CARDS``), or the one in a JSON file. Raises ``InputError`` for neither."""
    if str(name).lower() in CARDS:
        return CARDS[str(name).lower()]
    path = Path(name)
    if path.suffix != ".json" and not path.is_file():
        nearest = get_close_matches(str(name).lower(), CARDS, 1, 0.5)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise InputError(f"no device is called {str(name)!r}; {hint}known: {', '.join(CARDS)}, or the file of a card "
                         "written by pipeengine profile --device-card FILE")
    try:
        return DeviceCard.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read the device card {path}: {error}") from error
