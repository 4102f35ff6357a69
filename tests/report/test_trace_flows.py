"""A trace, event by event against its timeline: arrows, waits, what a worker holds, and the step's marker."""
from collections import defaultdict

import pytest

import pipeengine as pe
from pipeengine.report import chrome_trace


@pytest.mark.parametrize("schedule, back", (("1f1b", "B"), ("zb-h1", "I")))
def test_arrows_lead_from_action_to_action(schedule, back):
    workers, parts = 3, 4
    timeline = pe.simulate(pe.build(schedule, num_workers=workers, num_microbatches=parts))
    events = chrome_trace(timeline)["traceEvents"]
    actions = {(e["cat"], e["args"]["stage"], e["args"]["microbatch"]): e for e in events
               if e["ph"] == "X" and e["cat"] in "FBIW"}
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


@pytest.mark.parametrize("schedule", ("gpipe", "1f1b", "zb-h1", "interleaved-1f1b", "dualpipe-v"))
def test_waits_fill_what_actions_leave(schedule):
    """On every worker actions and waits follow each other without a gap from the marker's begin to its end."""
    timeline = pe.simulate(pe.build(schedule, num_workers=3, num_microbatches=6))
    events = [e for e in chrome_trace(timeline, step=41)["traceEvents"] if e["ph"] == "X"]
    (marker,) = [e for e in events if e["cat"] == "step"]
    assert (marker["name"], marker["ts"], marker["dur"]) == ("step 41", 0, pytest.approx(timeline.makespan * 1e6))
    for worker in range(3):
        own = sorted((e["ts"], -e["dur"], e["cat"], e["name"], e["args"]) for e in events if e["tid"] == 2 * worker)
        reached, waited = 0.0, 0.0
        for i, (start, length, kind, _, arguments) in enumerate(own):
            assert start <= reached + 1e-3, "a gap that is no wait"
            if kind == "wait":
                assert start == pytest.approx(reached, abs=1e-3)
                waited -= length
                assert arguments["for"] == (own[i + 1][3] if i + 1 < len(own) else "the end of the step")
            reached = max(reached, start - length)
        assert reached == pytest.approx(marker["dur"])
        if schedule != "dualpipe-v":            # whose blocks run side by side
            assert waited == pytest.approx(1e6 * (timeline.makespan - timeline.busy[worker]), abs=1e-3)


@pytest.mark.parametrize("schedule", ("gpipe", "1f1b", "zb-h1", "interleaved-1f1b"))
def test_counters_tell_what_a_worker_holds(schedule):
    """Recounted at every change from all actions; the end is nothing, the peak of micro-batches the schedule's own."""
    order = pe.build(schedule, num_workers=3, num_microbatches=6)
    timeline = pe.simulate(order)
    held = {stage: (100.0 + stage, 10.0 + stage) for stage in range(order.topology.num_stages)}
    events = [e for e in chrome_trace(timeline, held=held)["traceEvents"] if e["ph"] == "C"]
    actions = list(zip(timeline.worker.tolist(), ["FBIW"[op] for op in timeline.op.clip(0, 3)],
                       timeline.computes.tolist(), timeline.stage.tolist(), timeline.microbatch.tolist(),
                       (timeline.start * 1e6).tolist(), (timeline.end * 1e6).tolist()))
    last = defaultdict(float)
    for event in events:
        worker, name, time = event["tid"] // 2, *event["args"], event["ts"]
        state = {}
        for at, op, computes, stage, m, start, end in actions:
            if at == worker and computes and (start if op == "F" else end) <= time + 1e-6:
                state[stage, m] = max(state.get((stage, m), ""), {"F": "1", "I": "2", "B": "3", "W": "3"}[op])
        count = sum(value < "3" for value in state.values())
        size = sum({"1": held[stage][0], "2": held[stage][1], "3": 0.0}[value] for (stage, _), value in state.items())
        expected = count if name == "micro-batches" else size
        last[worker, name, time] = event["args"][name]
        final = [e for e in events if (e["tid"] // 2, *e["args"], e["ts"]) == (worker, name, time)][-1]
        assert final["args"][name] == pytest.approx(expected), "after all that happens at this moment"
    for worker in range(3):
        values = [e["args"]["activation bytes"] for e in events if e["tid"] == 2 * worker and "bytes" in e["name"]]
        assert values[-1] == 0 and max(values) > 0
