"""The arrows of a trace are the micro-batches' ways between workers, each once."""
import pytest

import pipeengine as pe
from pipeengine.report import chrome_trace


@pytest.mark.parametrize("schedule, back", (("1f1b", "B"), ("zb-h1", "I")))
def test_arrows_lead_from_action_to_action(schedule, back):
    workers, parts = 3, 4
    timeline = pe.simulate(pe.build(schedule, num_workers=workers, num_microbatches=parts))
    events = chrome_trace(timeline)["traceEvents"]
    actions = {(e["cat"], e["args"]["stage"], e["args"]["microbatch"]): e for e in events if e["ph"] == "X"}
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys() and len(starts) == 2 * (workers - 1) * parts
    ways = set()
    for number, start in starts.items():
        end = ends[number]
        (source,) = [key for key, e in actions.items() if e["tid"] == start["tid"] and key[0] in ("F", back)
                     and f"micro-batch {key[2]}" == start["name"] and e["ts"] + e["dur"] == pytest.approx(start["ts"])]
        (target,) = [key for key, e in actions.items() if e["tid"] == end["tid"] and key[0] in ("F", back)
                     and f"micro-batch {key[2]}" == end["name"] and e["ts"] == pytest.approx(end["ts"])]
        assert source[0] == target[0] and start["ts"] <= end["ts"] + 1e-6
        ways.add((source, target))
    assert ways == {((op, s, m), (op, s + (1 if op == "F" else -1), m)) for m in range(parts)
                    for op, stages in (("F", range(workers - 1)), (back, range(1, workers))) for s in stages}
