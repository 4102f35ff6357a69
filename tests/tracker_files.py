"""What trackers leave on disk where there is no connection, read without their own programs."""
import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path


def comet_offline(folder: Path, metric: str) -> tuple[set[str], dict[int, float]]:
    """The keys of the experiments in Comet's archives, and the last value of a metric per step, oldest first."""
    keys, points = set(), {}
    for archive in sorted(folder.glob("*.zip"), key=lambda path: path.stat().st_mtime_ns):
        with zipfile.ZipFile(archive) as opened:
            keys.add(json.loads(opened.read("experiment.json"))["offline_id"])
            for line in opened.read("messages.json").decode().splitlines():
                message = json.loads(line)
                told = message["payload"].get("metric") if message["type"] == "metric_msg" else None
                if told and told["metricName"] == metric:
                    points[told["step"]] = float(told["metricValue"])
    return keys, points


def wandb_offline(folder: Path) -> tuple[list[str], list[dict]]:
    """The ids of the runs below a folder of Weights & Biases, one for each start, and all rows of their histories."""
    from wandb.proto import wandb_internal_pb2
    starts = sorted(folder.glob("offline-run-*"))
    rows = []
    for file in (next(start.glob("*.wandb")) for start in starts):
        for data in _log_records(file.read_bytes()[7:], first=7):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows += [row] if row else []
    return [start.name.rpartition("-")[2] for start in starts], rows


def _log_records(data: bytes, first: int) -> Iterator[bytes]:
    """The records of LevelDB's log format (its doc/log_format.md), after a header of ``first`` bytes in block 0."""
    record, place = b"", first
    while place - first < len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place - first)
        record += data[place - first + 7:place - first + 7 + length]
        place += 7 + length
        if kind in (1, 4):          # full, last
            yield record
            record = b""
