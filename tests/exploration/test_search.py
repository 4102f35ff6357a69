"""``pe.search`` and ``pipeengine search``: what is told is what the parts say, and ``Pipeline`` runs it."""
import json
import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn
from workers import launch

import pipeengine as pe
from partitioners import Cluster, Device, Link, MemoryModel, Setting
from partitioners.graph import parameter_factor
from partitioners.pricing import build_plan
from pipeengine.cli.main import main
from pipeengine.costs import DeviceDescription
from pipeengine.device_cards import device_card
from pipeengine.errors import InputError
from pipeengine.exploration import Configuration
from pipeengine.exploration.chain import Chain
from pipeengine.exploration.training_state import state_factor, update_bytes
from pipeengine.report import step_bytes
from pipeengine.synthesis import build

FACTORY = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
                                    for _ in range(4))
        self.head = nn.Linear(32, 50)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())

def made():
    torch.manual_seed(0)
    return Model(), {"ids": torch.arange(8 * 6).reshape(8, 6) % 50}
"""


@pytest.fixture(scope="module")
def factory(tmp_path_factory):
    file = tmp_path_factory.mktemp("searched") / "searched_model.py"
    file.write_text(FACTORY)
    return f"{file}:made"


@pytest.fixture
def made(factory):
    from pipeengine.object_path import named
    return named(factory)()


ALONE = dict(num_devices=2, replicas=1, bandwidth=1e9, latency=1e-5, microbatch_rows=2, stages_per_worker=1,
             schedule=("1f1b", "zb-h1"), effort=400_000)


def test_the_pipeline_runs_what_was_found(made, tmp_path):
    """As it is, from the object and from its file; the numbers are those of one process."""
    model, example = made
    search = pe.search(model, example, memory=210e3, **ALONE)
    best, told = search.best, search.best.configuration
    assert told.num_workers == 2 and max(best.peak_bytes) <= 210e3
    best.save(tmp_path / "plan.json")
    assert pe.Plan.load(tmp_path / "plan.json") == best.plan
    expected = model(**example)
    for plan in (best, tmp_path / "plan.json"):
        pipe = pe.Pipeline(model, example, plan=plan, costs="analytic")
        assert torch.allclose(pipe.step(**example), expected, atol=1e-6)
        assert pipe.plan.stage_of == best.plan.stage_of
        assert len(pipe.timeline().to_dict()["op"]) > 0 and pipe.timeline().num_microbatches == told.num_microbatches
        pipe.close()
    with pytest.raises(InputError, match="num_microbatches is 3, and the plan was found for"):
        pe.Pipeline(model, example, plan=best, num_microbatches=3, costs="analytic")


def run_found(report, made, plan):
    """Every worker makes the pipeline from the plan alone, its replica's rows in hand."""
    warnings.simplefilter("ignore")
    model, example = made
    pipe = pe.Pipeline(model, {"ids": example["ids"][:4]}, plan=plan, costs="analytic")
    mine = {"ids": example["ids"].tensor_split(2)[pipe.replica]}
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss = pipe.step(**mine)
        optimizer.step()
    report("told", (pipe.num_replicas, len(list(pipe.parameters())), float(loss)))
    weights = pipe.full_state_dict()
    report("weights", {name: value.tolist() for name, value in weights.items()} if weights else None)
    pipe.close()
    for wrong in (dict(num_replicas=1), dict(shard=None, num_replicas=4)):
        try:
            pe.Pipeline(model, {"ids": example["ids"][:4]}, plan=plan, costs="analytic", **wrong)
        except InputError as error:
            report(str(wrong), str(error))
    chosen = pe.Pipeline(deepcopy(model), mine, num_replicas=2, num_microbatches="auto", schedule="1f1b",
                         costs="analytic")
    report("chosen", (chosen.num_replicas, chosen.plan.num_stages, float(chosen.step(**mine))))
    chosen.close()
    try:
        pe.Pipeline(model, mine, num_replicas=2, num_microbatches="auto", recompute=[0], costs="analytic")
    except InputError as error:
        report("refused", str(error))


def test_replicas_and_shards_run_as_they_are_found(made, tmp_path):
    """Two pipelines of two workers, from the plan's file: the weights after two updates are those of one process."""
    model, example = made
    search = pe.search(model, example, num_devices=4, replicas=2, stages=2, stages_per_worker=1, microbatch_rows=2,
                       shard="optimizer", bandwidth=1e9, effort=400_000)
    told = search.best.configuration
    assert (told.num_replicas, told.num_workers, told.shard, told.num_microbatches) == (2, 2, "optimizer", 2)
    search.best.save(tmp_path / "plan.json")
    with pytest.raises(InputError, match="for 2 workers in each of 2 replicas, there are 1; start 4"):
        pe.Pipeline(model, example, plan=search.best, costs="analytic")
    plain = deepcopy(model)         # workers share the memory of what they are handed
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**example)
        loss.backward()
        optimizer.step()
    reports = launch(4, run_found, (plain, example), tmp_path / "plan.json", limit=120)
    for report in reports:
        assert report["told"][0] == 2 and report["told"][2] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert report["chosen"][:2] in ((2, 2), (2, 4)) and "not with chosen modules" in report["refused"]
        assert report["chosen"] == reports[0]["chosen"]
        assert "num_replicas is 1, and the plan was found for 2" in report["{'num_replicas': 1}"]
    assert sum(report["told"][1] for report in reports) == len(list(model.parameters()))
    weights = next(report["weights"] for report in reports if report["weights"])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(torch.tensor(weights[name]), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grain", ["none", "stages", "blocks"])
def test_a_sketch_is_priced_as_the_planner_prices_it(made, grain):
    """The chain's own sums are those of ``build_plan``, in every figure that is used."""
    model, example = made
    graph = pe.profile(model, example, num_microbatches=4, costs="analytic")
    chain = Chain.of(graph, whole_blocks=grain == "blocks", most_stages=2)
    cuts = (0, len(chain) // 2, len(chain))
    stage_of = dict(zip(chain.order, chain.stage_of(cuts).tolist()))
    memory = None if grain != "blocks" else 1.0
    setting = Setting("overlap", Cluster((Device(count=2, memory=memory),), links=(Link(),)), (0, 0),
                      MemoryModel(schedule="none"), 4, recompute=grain == "blocks")
    plan = build_plan(graph, stage_of, setting, lower_bound=0.0, proof="")
    again = grain == "stages"
    sketch = chain.price(cuts, cuts[grain == "blocks":][:2], grain)
    if again:
        assert chain.price(cuts, (cuts[1], cuts[1]), grain).stages[0].backward > sketch.stages[0].backward
    for name in ("forward", "backward", "weight_grad", "param_bytes", "frozen_bytes", "activation_bytes", "kept_bytes"):
        assert [getattr(s, name) for s in sketch.stages] == pytest.approx([getattr(s, name) for s in plan.stages]), name
    assert sketch.boundaries == plan.boundaries and sketch.ties == plan.ties
    schedule = build("zb-h1", num_workers=2, num_microbatches=4)
    if grain != "blocks":       # the planner knows a block's scratch more closely
        assert step_bytes(sketch, schedule) == pytest.approx(step_bytes(plan, schedule))


def test_the_answer_is_the_same_again_and_a_time_limit_only_caps(made):
    model, example = made
    one, two = (pe.search(model, example, **ALONE) for _ in range(2))
    assert one.to_json() == two.to_json()
    capped = pe.search(model, example, **ALONE, time_limit=0.0)
    assert "time limit" in capped.stopped and capped.lower_bound <= one.lower_bound * (1 + 1e-9)


def test_the_fewest_devices_are_proved(made):
    """One less is refused in every configuration."""
    model, example = made
    options = dict(memory=210e3, bandwidth=1e9, rows=8, stages_per_worker=1, microbatch_rows=1, schedule="1f1b")
    search = pe.search(model, example, num_devices=2, **options)
    fewest = search.fewest
    assert fewest.num_devices > 1 and fewest.proved and "% of the memory" in fewest.why
    assert pe.search(model, example, num_devices=fewest.num_devices - 1, **options).best is None


def test_more_of_everything_is_worth_something(made):
    model, example = made
    changes = {margin.change: margin.gain for margin in pe.search(model, example, memory=210e3, **ALONE).margins}
    assert set(changes) == {"25 % more memory", "links twice as fast", "twice the rows per step"}
    assert all(gain >= -1e-9 for gain in changes.values()) and changes["twice the rows per step"] > 0


def test_the_command_answers_in_text_and_json(factory, capsys, tmp_path):
    words = ["search", factory, "--devices", "2", "--replicas", "1", "--bandwidth", "1GB/s", "--microbatch-rows", "2",
             "--schedule", "gpipe,1f1b,zb-h1", "--stages-per-worker", "1"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert text.startswith("seconds are a guess") and "\nstep  " not in text and "best of all configurations" in text
    assert main([*words, "--device", "l4", "--format", "json", "-o", str(tmp_path / "plan.json")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["format"] == "pipeline-search/1" and not told["seconds_are_a_guess"]
    assert told["lower_bound"] <= told["best"]["predicted"]["seconds"] and len(told["candidates"]) == 5
    assert all(each["why"] for each in told["candidates"])
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert Configuration.from_json(saved["configuration"]).num_workers == 2
    assert main([*words, "--replicas", "3", "--format", "json"]) == 2
    assert "no configuration uses 2 devices" in json.loads(capsys.readouterr().out)["error"]


def test_a_cost_graph_is_searched_without_torch(made, tmp_path, capsys):
    import subprocess
    import sys

    from partitioners.graph import to_json
    model, example = made
    graph = pe.profile(model, example, num_microbatches=8, costs="analytic")
    (tmp_path / "graph.json").write_text(json.dumps(to_json(graph)))
    code = (f"import sys, pipeengine.cli as cli; status = cli.main(['search', {str(tmp_path / 'graph.json')!r}, "
            "'--devices', '2', '--replicas', '1', '--schedule', '1f1b', '--format', 'json']); "
            "sys.exit(status or 3 * ('torch' in sys.modules))")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["best"]["configuration"]["rows"] in (1, 2, 4, 8)


@pytest.mark.parametrize("options, says", (
    (dict(num_devices=0), "num_devices is 0"), (dict(num_devices=2, schedule="fast"), "schedule 'fast' is none of"),
    (dict(num_devices=3, replicas=2), "no configuration uses 3"), (dict(num_devices=2, optimizer="x"), "none of"),
    (dict(num_devices=2, shard="everything"), "none of None,"),
    (dict(num_devices=2, device="h1000"), "did you mean")))
def test_what_makes_no_space_is_refused(made, options, says):
    with pytest.raises(InputError, match=says):
        pe.search(*made, **options)


def test_nothing_fits_is_an_answer(made):
    search = pe.search(*made, num_devices=2, memory=1e3, effort=200_000)
    assert search.best is None and search.fewest is None and "% of the memory" in str(search)


def test_modules_named_in_the_plan_exist(made):
    model, example = made
    search = pe.search(model, example, memory=205e3, **ALONE | {"recompute": "blocks"})
    assert search.best and set(search.best.configuration.recompute) <= {f"blocks.{i}" for i in range(4)}
    assert isinstance(model, nn.Module)


def test_auto_is_searched_for_and_told(made, capsys):
    """Micro-batches, schedule and recomputation for what is at hand; the numbers stay those of one process."""
    model, example = made
    expected = model(**example)
    pipe = pe.Pipeline(model, example, num_microbatches="auto", schedule="auto", recompute="auto", num_stages=2,
                       costs="analytic")
    told = capsys.readouterr().err
    assert "chosen: " in told and " micro-batches" in told and "above the best" in told
    assert torch.allclose(pipe.step(**example), expected, atol=1e-6)
    assert pipe.plan.num_stages == 2
    pipe.close()
    for options, says in ((dict(recompute=[0]), "not with chosen modules"), (dict(plan="x.json"), "leave out plan"),
                          (dict(schedule=lambda **_: None), "by name"), (dict(batch_dims={}), "batch_dims")):
        with pytest.raises(InputError, match=says.replace("by name", "named")):
            pe.Pipeline(model, example, num_microbatches="auto", costs="analytic", **options)


def test_master_weights_have_one_meaning(made):
    """``optimizer="adamw-master"`` and ``master_weights=True`` are the same; a shard keeps its part of the state."""
    assert parameter_factor("adamw-master", bytes_per_weight=2.0) == parameter_factor(
        "adamw", bytes_per_weight=2.0, master_weights=True) == 8.0
    model, example = made
    one = pe.search(model, example, **ALONE, optimizer="adamw-master")
    assert one.to_json() == pe.search(model, example, **ALONE, optimizer="adamw", master_weights=True).to_json()
    assert max(one.best.peak_bytes) > max(pe.search(model, example, **ALONE).best.peak_bytes)


@pytest.mark.parametrize(("shard", "replicas", "kept", "moved"), [
    (None, 4, 3.0, 7.0), ("optimizer", 4, 1.5, 7 / 4), ("parameters", 4, 1.75, 7 / 4), ("parameters", 1, 3.0, 7.0)])
def test_a_shard_keeps_its_part(shard, replicas, kept, moved):
    """AdamW: weights, and two moments; sharded weights are whole besides while a step runs."""
    assert state_factor("adamw", replicas, shard) == kept
    assert update_bytes("adamw", replicas, shard) == moved


@pytest.mark.parametrize("size, kind", [(2.0, "bfloat16"), (4.0, "float32")])
def test_a_cost_graph_is_measured_by_the_peak_of_its_own_precision(size, kind):
    """Graphs of two-byte weights were held against the peak of float32, and reached several hundred per cent."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    graph = pe.profile(model, torch.ones(4, 8), num_microbatches=4, loss_fn=nn.functional.mse_loss,
                       target=torch.ones(4, 8), costs=DeviceDescription())
    graph.graph["made_with"] |= {"flops": 1e6, "bytes_per_weight": size}
    best = pe.search(graph, num_devices=1, device="h100", rows=4, microbatch_rows=1).best
    assert best.flops_share == pytest.approx(4e6 / (best.seconds * device_card("h100").peak(kind)))
