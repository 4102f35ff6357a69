"""What users get wrong, and what they might expect: each is refused in words, or does what they meant."""
import dataclasses

import pytest
import torch
from torch import nn

import pipeengine as pe

ROWS, WIDTH = 16, 8


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, WIDTH, generator=generator), torch.randn(ROWS, WIDTH, generator=generator)


def pipeline(own=None, **options) -> pe.Pipeline:
    settings = dict(num_stages=2, num_microbatches=4, costs="analytic", loss_fn=nn.functional.mse_loss)
    return pe.Pipeline(own or model(), (batch()[0],), **settings | options)


def test_a_target_with_the_rows_of_a_microbatch_is_refused_and_loses_nothing():
    pipe, (x, y) = pipeline(), batch()
    with pytest.raises(pe.InputError, match="target has 4 rows, the batch has 16"):
        pipe.step(x, target=y[:4])
    assert float(pipe.step(x, target=y)) == pytest.approx(nn.functional.mse_loss(model()(x), y).item())


def test_a_target_for_every_microbatch_is_taken_when_asked_for():
    pipe, (x, y) = pipeline(batch_dims={"target": None}), batch()
    expected = nn.functional.mse_loss(model()(x), y[:4].repeat(4, 1)).item()
    assert float(pipe.step(x, target=y[:4])) == pytest.approx(expected)


def test_predictions_need_no_target():
    pipe, (x, _) = pipeline(), batch()
    assert torch.equal(pipe.evaluate(x), torch.cat([model()(part) for part in x.chunk(4)])) and pipe.loss is None


class OwnTarget(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = model()

    def forward(self, x, target):
        return nn.functional.mse_loss(self.body(x), target)


def test_an_argument_named_target_is_the_models_own():
    x, y = batch()
    pipe = pe.Pipeline(OwnTarget(), {"x": x, "target": y}, num_stages=2, num_microbatches=4, costs="analytic")
    assert float(pipe.step(x=x, target=y)) == pytest.approx(OwnTarget()(x, y).item())


class OneDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = model()

    def forward(self, batch):
        return nn.functional.mse_loss(self.body(batch["x"]), batch["y"])


def test_a_dict_in_the_place_of_its_entries_is_told():
    """step(batch) for step(**batch) ended in an error of torch's, deep in the first layer; a model may take a dict."""
    x, y = batch()
    pipe = pe.Pipeline(OwnTarget(), {"x": x, "target": y}, num_stages=2, num_microbatches=4, costs="analytic")
    with pytest.raises(pe.InputError, match=r"does not take these inputs: missing .*target"):
        pipe.step({"x": x, "target": y})
    plain = pipeline(nn.Sequential(model()))
    with pytest.raises(pe.InputError, match=r"one dict is given as input, .* unpack it, as in step\(\*\*batch\)"):
        plain.step({"input": x}, target=y)
    with pytest.raises(TypeError, match="not called as a model is; step"):
        plain(x)
    taken = pe.Pipeline(OneDict(), ({"x": x, "y": y},), num_stages=2, num_microbatches=4, costs="analytic")
    assert float(taken.step({"x": x, "y": y})) == pytest.approx(OneDict()({"x": x, "y": y}).item())


def test_a_target_that_nobody_takes_is_refused():
    pipe = pe.Pipeline(nn.Sequential(model(), Mean()), (batch()[0],), num_stages=2, costs="analytic")
    with pytest.raises(pe.InputError, match="no loss_fn that would take it"):
        pipe.step(batch()[0], target=batch()[1])


class Mean(nn.Module):
    def forward(self, x):
        return x.mean()


def test_costs_of_another_model_are_refused():
    other = pe.profile(nn.Sequential(*model(), nn.Tanh()), (batch()[0],),
                       loss_fn=nn.functional.mse_loss, target=batch()[1], costs="analytic")
    with pytest.raises(pe.InputError, match="costs was made for another model: it has 6 nodes, this model has 5"):
        pipeline(costs=other)


def test_given_costs_are_left_as_they_are():
    graph = pe.profile(model(), (batch()[0],), loss_fn=nn.functional.mse_loss, target=batch()[1], costs="analytic")
    before = {name: dict(data) for name, data in graph.nodes(data=True)}
    pipeline(costs=graph, recompute=["0"])
    assert {name: dict(data) for name, data in graph.nodes(data=True)} == before


@pytest.mark.parametrize("stages", (2, 4))
def test_a_schedule_that_is_only_simulated_says_so(stages):
    with pytest.raises(pe.ScheduleError, match='simulated but not run: try "dualpipe-v"'):
        pipeline(schedule="dualpipe", num_stages=stages, num_microbatches=8)


@pytest.mark.parametrize("place, message", [(9, "is on stage 9 of 2"), (1, "goes back from stage 1 to 0")])
def test_an_edited_plan_is_checked(place, message):
    plan = pipeline().plan
    edited = dataclasses.replace(plan, stage_of={**plan.stage_of, next(iter(plan.stage_of)): place})
    assert list(plan.stage_of.values())[:2] == [0, 0]
    with pytest.raises(pe.PlanError, match=message):
        pipeline(plan=edited)


@pytest.mark.parametrize("schedule, stages", [("zb-v", 2), ("v-half", 2), ("1f1b", 1), ("interleaved-1f1b", 1)])
def test_a_schedule_that_needs_several_stages_gets_them(schedule, stages):
    assert pipeline(schedule=schedule, num_stages=None).num_stages == stages


@pytest.mark.parametrize("options", [
    {"schedule": 7}, {"loss_fn": "mse"}, {"loss_weight": 3}, {"batch_dims": "x"}, {"recompute": 3}, {"seed": "a"},
    {"plan": 5}], ids=lambda options: next(iter(options)))
def test_an_option_of_the_wrong_type_is_named(options):
    name, value = next(iter(options.items()))
    with pytest.raises(pe.InputError, match=rf"{name} is .*; give "):
        pipeline(**options)


def test_the_report_tells_the_loss_of_training():
    pipe, (x, y) = pipeline(), batch()
    trained = pipe.step(x, target=y)
    pipe.evaluate(x, target=y + 1)
    assert pipe.run_report().loss == float(trained) != float(pipe.loss)


def test_saving_removes_what_another_number_of_workers_had_saved(tmp_path):
    stale = ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name in (*stale, "notes.txt", "optimizer-00001-of-00002.safetensors"):
        (tmp_path / name).write_text("{}")
    pipeline().save_weights(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "notes.txt",
                                                                "optimizer-00001-of-00002.safetensors"]
    other = model()
    nn.init.zeros_(other[0].weight)
    pipe = pipeline(other.to("meta"), weights=tmp_path)
    assert torch.equal(dict(pipe.named_parameters())["0.weight"], model()[0].weight)
