"""Plans: exact small pictures, the round trip, and a verifier that notices every lie."""
from dataclasses import replace

import networkx as nx
import pytest

from partitioners import InfeasibleError, PartitionError, PlanError, partition
from partitioners.graph import parameter_factor
from partitioners.plan import Plan, Tie, gap_above, verify
from partitioners.reporting import draw
from partitioners.reporting.explanation import explain


def chain(times, **more) -> nx.DiGraph:
    graph = nx.DiGraph()
    for index, time in enumerate(times):
        graph.add_node(
            f"n{index}", forward=float(time), output_bytes=100, param_bytes=4, gradient=True, order=index, **more
        )
    nx.add_path(graph, list(graph))
    return graph


def test_chain_with_free_links():
    plan = partition(chain([3, 1, 1, 3]), 2)
    assert dict(plan.stage_of) == {"n0": 0, "n1": 0, "n2": 1, "n3": 1}
    assert (plan.bottleneck, plan.lower_bound, plan.gap) == (4.0, 4.0, 0.0)
    assert [(b.source, b.target, b.values, b.bytes, b.gradient_bytes) for b in plan.boundaries] == [
        (0, 1, ("n1",), 100, 100)]


def test_link_is_paid_by_both_sides_there_and_back():
    plan = partition(chain([3, 1, 1, 3]), 2, bandwidth=200.0, latency=0.25)
    assert [stage.communication for stage in plan.stages] == [1.5, 1.5]
    assert plan.bottleneck == 5.5


def test_overlap_takes_the_larger():
    plan = partition(chain([3, 1, 1, 3]), 2, bandwidth=200.0, objective="overlap")
    assert plan.bottleneck == 4.0
    assert partition(chain([3, 1, 1, 3]), 2, bandwidth=20.0, objective="overlap").bottleneck == 10.0


def test_every_stage_holds_parameters():
    graph = chain([5, 1, 1, 1])
    for node in ("n0", "n1", "n3"):
        del graph.nodes[node]["param_bytes"]
    with pytest.raises(PartitionError, match="has 1 .*2 stages.*num_stages=1"):
        partition(graph, 2)
    graph.nodes["n3"]["shared"] = {"w": 4}
    assert partition(graph, 2).stage_of["n2"] == 0


def test_tie_is_priced_and_listed():
    graph = chain([2, 2, 2, 2])
    for node in ("n0", "n3"):
        graph.nodes[node]["shared"] = {"w": 1000}
    plan = partition(graph, 2, bandwidth=1000.0, num_microbatches=4)
    assert plan.ties == (Tie("w", (0, 1), 1000),)
    assert plan.stages[0].load == pytest.approx(4 + 0.2 + 0.5)
    assert plan.stages[0].param_bytes == 1008


def test_single_tensor_within_five_percent():
    graph = chain([100, 3, 1, 100])
    graph.add_edge("n0", "n3")
    graph.add_edge("n1", "n3")
    balanced = partition(graph, 2, prefer_single_tensor=0)
    single = partition(graph, 2)
    assert balanced.bottleneck == 103 or len(balanced.boundaries[0].values) == 2
    assert [len(boundary.values) for boundary in single.boundaries] == [1]
    assert single.bottleneck <= 1.05 * balanced.bottleneck
    assert single.lower_bound <= balanced.bottleneck


def test_json_round_trip(tmp_path):
    plan = partition(chain([3, 1, 1, 3]), 2, bandwidth=200.0)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("text", ["", "not json", "{}", "[1]", '{"format": "pipeline-plan/1"}', '{"format": "other"}'])
def test_file_that_is_no_plan(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match="no plan"):
        Plan.load(tmp_path / "plan.json")


def test_verify_notices_lies():
    graph = chain([3, 1, 1, 3])
    plan = partition(graph, 2, bandwidth=200.0)
    verify(plan, graph)
    lies = [dict(bottleneck=1.0), dict(lower_bound=99.0), dict(boundaries=()), dict(gap=0.5), dict(graph_digest="x"),
            dict(stage_of={**plan.stage_of, "n1": 1}), dict(stage_of={**plan.stage_of, "n0": 1}),
            dict(stages=(replace(plan.stages[0], load=0.0), plan.stages[1])),
            dict(stages=(replace(plan.stages[0], memory_bytes=0.0), plan.stages[1])),
            dict(ties=(Tie("w", (0, 1), 3),))]
    for lie in lies:
        with pytest.raises(PlanError):
            verify(replace(plan, **lie), graph)


def test_table_reads_well():
    text = str(partition(chain([3, 1, 1, 3]), 2))
    assert "bottleneck 4 s" in text and "proved optimal" in text and len(text.splitlines()) == 4


@pytest.mark.parametrize("bottleneck, lower_bound, expected", [
    (1.1, 1.0, 0.1), (3.0, 3.0, 0.0), (2.0, 0.0, float("inf")), (0.0, 0.0, 0.0), (1.0, 1.0 + 1e-12, 0.0)])
def test_the_gap_is_above_the_bound(bottleneck, lower_bound, expected):
    assert gap_above(bottleneck, lower_bound) == pytest.approx(expected)


def test_a_gap_reads_the_same_everywhere(tmp_path):
    """In the plan, its text, its JSON and its picture: what the bottleneck is above the bound."""
    graph = chain([3, 1, 2, 2, 3, 1])
    exact = partition(graph, 3)
    plan = replace(exact, lower_bound=exact.bottleneck / 1.25, gap=0.25)
    verify(plan, graph)
    assert "at most 25.00 % above the best" in str(plan)
    assert Plan.from_json(plan.to_json()).gap == 0.25
    assert "at most 25.00 % above the best" in draw(plan, graph)


@pytest.mark.parametrize("options, factor", [
    (dict(optimizer="adamw"), 4), (dict(optimizer="sgd"), 2), (dict(optimizer="sgd-momentum"), 3),
    (dict(optimizer="adamw", bytes_per_weight=2), 4),
    (dict(optimizer="adamw", bytes_per_weight=2, master_weights=True), 8),
    (dict(optimizer="adafactor", bytes_per_weight=2, master_weights=True), 4)])
def test_memory_of_an_optimizer(options, factor):
    """bf16 with fp32 copies: 2 + 2 bytes of weight and gradient, 4 of the copy, 4 + 4 of Adam's moments."""
    assert parameter_factor(**options) == factor


@pytest.mark.parametrize("shared", [False, True])
def test_frozen_weights_count_once(shared):
    graph = chain([1, 1, 1, 1])
    for node in ("n1", "n3"):
        graph.nodes[node].update({"shared": {"w": 400.0}, "frozen": ("w",)} if shared else
                                 {"param_bytes": 404, "frozen_bytes": 400})
    plan = partition(graph, 2, prefer_single_tensor=0, bandwidth=1e3)
    verify(plan, graph)
    assert [stage.memory_bytes for stage in plan.stages] == [4 * 8 + 400] * 2
    assert [stage.frozen_bytes for stage in plan.stages] == [400, 400]
    assert all(not tie.trained for tie in plan.ties) and len(plan.ties) == shared
    free = partition(chain([1, 1, 1, 1]), 2, prefer_single_tensor=0, bandwidth=1e3)
    assert plan.bottleneck == free.bottleneck, "nothing of a frozen tie travels"
    assert partition(graph, 2, memory=433, prefer_single_tensor=0).num_stages == 2
    with pytest.raises(InfeasibleError):
        partition(graph, 2, memory=431, prefer_single_tensor=0)


def test_many_cuts_that_say_the_same_are_one_finding():
    """Fifteen cuts of a chain of equal blocks: one range, one list of places, one line of second choices."""
    graph = nx.DiGraph()
    for number in range(48):
        graph.add_node(f"block{number}", forward=1.0, backward=2.0, output_bytes=8, gradient=True)
        if number:
            graph.add_edge(f"block{number - 1}", f"block{number}")
    text = explain(partition(graph, 16), graph)
    assert "cuts 0 | 1 to 14 | 15: loads 9 s to 9 s, 1 tensor of 8 B at each" in text
    assert text.count("second choice") == 1 and text.count("block44") == 1 and "cut 3" not in text
    assert explain(partition(graph, 8), graph).count("second choice: ") == 7
