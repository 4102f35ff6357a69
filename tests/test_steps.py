"""What a training loop does besides plain steps: odd batches, modes, clipping, optimizers, evaluation, options."""
import traceback
import warnings
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import zoo
from reference import assert_same_step, gradients, num_rows, reference_step, split_batch, worst_difference
from torch import nn
from workers import launch

import pipeengine as pe

GPT2 = zoo.hugging_face("gpt2")
LLAMA = zoo.hugging_face("llama")
SCHEDULES = ("gpipe", "1f1b")


pytestmark = pytest.mark.usefixtures("quiet")


def pipeline(model: nn.Module, example, **options) -> pe.Pipeline:
    usual = dict(num_microbatches=4, num_stages=2, schedule="1f1b", costs="analytic")
    return pe.Pipeline(model, example, **(usual | options))


def rows(batch, count: int):
    """The first ``count`` rows of a batch."""
    return {name: value[:count] if isinstance(value, torch.Tensor) and value.dim() else value
            for name, value in batch.items()}


# ------------------------------------------------------------------------------------------------------------ batches

def ten_rows(case: zoo.Case) -> dict:
    first = case.batches[0]
    return {name: torch.cat([value, value[:2].flip(0)]) for name, value in first.items()}


@pytest.mark.parametrize(("case", "sizes"), [
    *((zoo.AWKWARD["LateInput"], sizes) for sizes in ((10, 4), (8, 3), (3, 4), (1, 4), (7, 2))),
    (LLAMA, (10, 4)), (GPT2, (3, 4))], ids=lambda value: getattr(value, "name", str(value)))
def test_uneven_batches(case, sizes):
    """``count`` rows over ``parts`` micro-batches, as tensor_split cuts them; never more micro-batches than rows."""
    count, parts = sizes
    model, batch = case.build(), rows(ten_rows(case), count)
    expected = reference_step(case.build(), batch, parts)
    pipe = pipeline(model, case.batches[0], num_microbatches=parts)
    assert_same_step(expected, (pipe.step(**batch), gradients(model)), 1e-6)


def test_the_last_batch_of_an_epoch_is_smaller():
    model, plain = LLAMA.build(), LLAMA.build()
    pipe = pipeline(model, LLAMA.batches[0])
    for count in (8, 8, 3, 8, 1):
        batch = rows(LLAMA.batches[0], count)
        model.zero_grad()
        assert_same_step(reference_step(plain, batch, 4), (pipe.step(**batch), gradients(model)))


def test_different_label_counts_weigh_as_the_full_batch():
    """Rows with few labels count for less: the loss is the full batch's, not the mean of the micro-batches' means."""
    batch, model = LLAMA.batches[2], LLAMA.build()
    pipe = pipeline(model, LLAMA.batches[0], num_microbatches=5)
    with torch.no_grad():
        whole = model(**batch).loss
    means = torch.stack([model(**part).loss.detach() for part in split_batch(batch, 5)])
    assert abs(means.mean() - whole) > 1e-4
    torch.testing.assert_close(pipe.step(**batch), whole, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------ gradients and buffers

@pytest.mark.parametrize("case", (GPT2, LLAMA), ids=lambda case: case.name)
def test_gradients_accumulate_over_steps(case):
    model, plain = case.build(), case.build()
    first, total = reference_step(plain, case.batches[0], 4)[1], {}
    first = {name: grad.clone() for name, grad in first.items()}
    second = reference_step(plain, case.batches[1], 4)[1]
    total = {name: first[name] + second[name] for name in first}
    pipe = pipeline(model, case.batches[0])
    pipe.step(**case.batches[0])
    pipe.step(**case.batches[1])
    worst, name = worst_difference(total, gradients(model))
    assert worst <= 1e-6, (worst, name)


def test_frozen_and_unused_parameters_get_no_gradient():
    case = zoo.AWKWARD["FrozenAndUnused"]
    model = case.build()
    pipe = pipeline(model, case.batches[0], num_stages=3)
    expected = reference_step(case.build(), case.batches[0], 4)
    assert_same_step(expected, (pipe.step(**case.batches[0]), gradients(model)))
    assert model.never.weight.grad is None and model.blocks[0].up.weight.grad is None


def test_freezing_between_steps():
    """A parameter frozen, or released, after construction."""
    case, model, plain = LLAMA, LLAMA.build(), LLAMA.build()
    pipe = pipeline(model, case.batches[0])
    for flag in (False, True):
        for one in (model, plain):
            one.model.embed_tokens.requires_grad_(flag)
            one.model.layers[3].requires_grad_(flag)
        model.zero_grad()
        assert_same_step(reference_step(plain, case.batches[0], 4), (pipe.step(**case.batches[0]), gradients(model)))


@pytest.mark.parametrize("name", ("BatchNorms", "DetachedStatistics", "ReadsAverage"))
@pytest.mark.parametrize("num_stages", (2, 4))
def test_buffers_are_the_references(name, num_stages):
    """Running statistics after three batches, bit for bit, and untouched by construction."""
    case = zoo.AWKWARD[name]
    model, plain = case.build(), case.build()
    pipe = pipeline(model, case.batches[0], num_stages=num_stages)
    for batch in (None, *case.batches):
        if batch is not None:
            reference_step(plain, batch, 4)
            pipe.step(**batch)
        for (name, expected), (_, found) in zip(plain.named_buffers(), model.named_buffers(), strict=True):
            assert torch.equal(expected, found), name


# ------------------------------------------------------------------------------------------------------------- dropout

def trained(case: zoo.Case, num_stages: int, schedule: str, seed: int = 0) -> list:
    model = case.build()
    pipe = pipeline(model, case.batches[0], num_stages=num_stages, schedule=schedule, seed=seed)
    found = []
    for batch in case.batches[:2]:
        model.zero_grad()
        found.append((pipe.step(**batch), {name: grad.clone() for name, grad in gradients(model).items()}))
    return found


@pytest.mark.parametrize("case", (
    zoo.AWKWARD["Dropouts"], zoo.hugging_face("llama", dropout=0.1),
    *(pytest.param(zoo.hugging_face(name, dropout=0.1), marks=pytest.mark.slow) for name in ("gpt2", "bert"))),
    ids=lambda case: case.name)
def test_dropout_is_the_same_for_any_cut(case):
    """1, 2 and 4 stages and both schedules drop the same elements; another seed drops others; steps differ."""
    one = trained(case, 1, "gpipe")
    for num_stages, schedule in ((2, "gpipe"), (2, "1f1b"), (4, "1f1b")):
        for expected, found in zip(one, trained(case, num_stages, schedule), strict=True):
            assert_same_step(expected, found, 1e-6)
    assert trained(case, 2, "gpipe", seed=1)[0][0] != one[0][0]
    model = case.build()
    pipe = pipeline(model, case.batches[0])
    state = torch.get_rng_state()
    assert pipe.step(**case.batches[0]) != pipe.step(**case.batches[0])
    assert torch.equal(state, torch.get_rng_state()), "the global random state is the user's"


def test_dropout_drops_what_it_should():
    """The kept share and the scale are right, and micro-batches and places differ."""
    class Drops(zoo.Blocks):
        def forward(self, x, y):
            kept = F.dropout(torch.ones_like(x), 0.25, self.training)
            other = F.dropout(torch.ones_like(x), 0.25, self.training)
            for block in self.blocks:
                x = block(x)
            return self.loss(x, y), kept, other
    x = torch.randn(64, 16, zoo.WIDTH)
    pipe = pipeline(Drops(), dict(x=x, y=x))
    _, kept, other = pipe.evaluate(x=x, y=x)
    assert torch.equal(kept.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert abs(float((kept > 0).float().mean()) - 0.75) < 0.02
    assert not torch.equal(kept, other) and not torch.equal(kept[:16], kept[16:32])


# ------------------------------------------------------------------------------------------------- evaluation and modes

def test_evaluate_gives_the_models_own_output():
    model = LLAMA.build()
    pipe = pipeline(model, LLAMA.batches[0])
    pipe.step(**LLAMA.batches[0])
    before = {name: grad.clone() for name, grad in gradients(model).items()}
    for batch in (*LLAMA.batches, rows(LLAMA.batches[0], 1)):
        with torch.no_grad():
            expected = model(**batch)
        found = pipe.evaluate(**batch)
        assert type(found) is type(expected) and {"loss", "logits"} <= found.keys() <= expected.keys()
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
        assert not found.logits.requires_grad
    assert not worst_difference(before, gradients(model))[0], "evaluation leaves gradients alone"


def test_evaluate_without_labels():
    model, batch = LLAMA.build(), {"input_ids": LLAMA.batches[0]["input_ids"]}
    pipe = pipeline(model, LLAMA.batches[0])
    with torch.no_grad():
        torch.testing.assert_close(pipe.evaluate(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-6)


def test_training_and_evaluation_in_turns():
    """Modes are followed; evaluation with other sizes between steps changes nothing in training."""
    case = zoo.AWKWARD["BatchNorms"]
    model, plain = case.build(), case.build()
    pipe = pipeline(model, case.batches[0])
    for number, batch in enumerate((*case.batches, case.batches[0])):
        model.zero_grad()
        assert_same_step(reference_step(plain, batch, 4), (pipe.step(**batch), gradients(model)))
        pipe.eval()
        assert not model.training and not model.norms[2].training
        other = rows(case.batches[number % 3], 1 + number)
        with torch.no_grad():
            plain.eval()
            torch.testing.assert_close(pipe.evaluate(**other), plain(**other), rtol=1e-6, atol=0)
            plain.train()
        assert pipe.train() is pipe and model.norms[2].training


def test_steps_in_evaluation_mode_use_running_statistics():
    case = zoo.AWKWARD["BatchNorms"]
    model, plain = case.build().eval(), case.build().eval()
    pipe = pipeline(model, case.batches[0])
    assert_same_step(reference_step(plain, case.batches[1], 4), (pipe.step(**case.batches[1]), gradients(model)))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), model.buffers(), strict=True))


# ---------------------------------------------------------------------------------------------- clipping and optimizers

@pytest.mark.parametrize("norm_type", (2.0, 1.0, float("inf")))
@pytest.mark.parametrize("max_norm", (0.1, 1e9))
def test_clipping_is_torchs(norm_type, max_norm):
    model, plain = GPT2.build(), GPT2.build()
    reference_step(plain, GPT2.batches[0], 4)
    pipe = pipeline(model, GPT2.batches[0], num_stages=3)
    pipe.step(**GPT2.batches[0])
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm, norm_type)
    torch.testing.assert_close(pipe.clip_grad_norm_(max_norm, norm_type), expected, rtol=1e-6, atol=0)
    worst, name = worst_difference(gradients(plain), gradients(model))
    assert worst <= 2e-6, (worst, name)


@pytest.mark.parametrize("case", (GPT2, LLAMA), ids=lambda case: case.name)
def test_adamw_with_a_schedule_over_five_steps(case):
    """The weights after five steps are those of one process."""
    model, plain = case.build(), case.build()
    pipe = pipeline(model, case.batches[0], num_stages=3)
    makers = [(model, pipe.parameters()), (plain, plain.parameters())]
    optimizers = [torch.optim.AdamW(parameters, lr=1e-2) for _, parameters in makers]
    rates = [torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=5) for optimizer in optimizers]
    for number in range(5):
        batch = case.batches[number % 3]
        expected = reference_step(plain, batch, 4)[0]
        assert float(abs(pipe.step(**batch) - expected) / expected) < 1e-5
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        pipe.clip_grad_norm_(0.5)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.step(), rate.step(), optimizer.zero_grad()
    for (name, expected), found in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4, msg=name)


# ------------------------------------------------------------------------------------------------------------- autocast

@pytest.mark.parametrize("num_stages", (1, 2, 4))
def test_autocast_around_the_step(num_stages):
    model, plain = LLAMA.build(), LLAMA.build()
    pipe = pipeline(model, LLAMA.batches[0], num_stages=num_stages)
    plain_step = reference_step(plain, LLAMA.batches[0], 4)
    plain_step = plain_step[0], {name: grad.clone() for name, grad in plain_step[1].items()}
    with torch.autocast("cpu", torch.bfloat16):
        expected = reference_step(plain, LLAMA.batches[0], 4)
        found = pipe.step(**LLAMA.batches[0]), gradients(model)
    assert_same_step(expected, found, 1e-6)
    assert worst_difference(plain_step[1], found[1])[0] > 1e-4, "autocast was on"
    model.zero_grad()
    assert_same_step(plain_step, (pipe.step(**LLAMA.batches[0]), gradients(model)))


# -------------------------------------------------------------------------------------------------------------- options

def test_a_loss_function_and_its_target():
    case = zoo.AWKWARD["Classifier"]
    for example_target in (case.batches[0]["target"], None):
        model, plain = case.build(), case.build()
        pipe = pipeline(model, {"x": case.batches[0]["x"]}, target=example_target, loss_fn=case.loss_fn)
        for batch in case.batches:
            inputs, target = case.split_target(batch)
            model.zero_grad()
            expected = reference_step(plain, inputs, 4, loss_fn=case.loss_fn, target=target)
            assert_same_step(expected, (pipe.step(**inputs, target=target), gradients(model)))
    with pytest.raises(pe.InputError, match="target"):
        pipe.step(x=case.batches[0]["x"])


def test_inputs_by_position():
    case = zoo.AWKWARD["Positional"]
    model = case.build()
    pipe = pipeline(model, case.batches[0])
    for batch in case.batches:
        model.zero_grad()
        assert_same_step(reference_step(case.build(), batch, 4), (pipe.step(*batch), gradients(model)))
    loss, hidden, nothing = pipe.evaluate(*case.batches[0])
    assert nothing is None and len(hidden) == num_rows(case.batches[0]) and torch.equal(loss, pipe.loss)


def test_one_tensor_is_an_example():
    class Energy(zoo.Blocks):
        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x).square().mean()
    model = zoo.seeded(Energy)()
    x = torch.randn(8, 3, zoo.WIDTH)
    assert_same_step(reference_step(zoo.seeded(Energy)(), (x,), 4), (pipeline(model, x).step(x), gradients(model)))


def test_loss_weight_overrides():
    """Micro-batches that count by the sum of a mask, as the user says."""
    case = zoo.AWKWARD["LateInput"]
    model, batch = case.build(), case.batches[1]
    parts = split_batch(batch, 4)
    counts = [float(part["keep"].sum()) for part in parts]
    pipe = pipeline(model, case.batches[0], loss_weight=lambda x, y, context, keep: keep.sum())
    expected = reference_step(case.build(), batch, 4, weights=[count / sum(counts) for count in counts])
    assert len(set(counts)) > 1
    assert_same_step(expected, (pipe.step(**batch), gradients(model)))


class TimeFirst(zoo.Blocks):
    """Time in dimension 0, rows in dimension 1; a table whose first dimension happens to be the number of rows."""

    def forward(self, x, y, table):
        for block in self.blocks:
            x = block(x + table.mean(0))
        return self.loss(x, y)


def test_batch_dims():
    model, plain = zoo.seeded(TimeFirst)(), zoo.seeded(TimeFirst)()
    batch = dict(x=torch.randn(5, 8, zoo.WIDTH), y=torch.randn(5, 8, zoo.WIDTH), table=torch.randn(8, zoo.WIDTH))
    pipe = pipeline(model, batch, batch_dims={"x": 1, "y": 1, "table": None})
    plain(**batch).backward()
    loss = pipe.step(**batch)
    with torch.no_grad():
        torch.testing.assert_close(loss, plain(**batch), rtol=1e-6, atol=0)
    assert worst_difference(gradients(plain), gradients(model))[0] < 1e-5


@pytest.mark.parametrize(("schedule", "num_microbatches"), [
    *((s, n) for s in SCHEDULES for n in (1, 2, 8)), ("zb-h1", 8)])
def test_any_number_of_microbatches(schedule, num_microbatches):
    model = LLAMA.build()
    pipe = pipeline(model, LLAMA.batches[0], num_microbatches=num_microbatches, schedule=schedule, num_stages=3)
    expected = reference_step(LLAMA.build(), LLAMA.batches[0], num_microbatches)
    assert_same_step(expected, (pipe.step(**LLAMA.batches[0]), gradients(model)), 1e-6 if "zb" in schedule else 0.0)


def test_a_saved_plan_is_used(tmp_path):
    plan = pipeline(LLAMA.build(), LLAMA.batches[0], num_stages=3).plan
    plan.save(tmp_path / "plan.json")
    model = LLAMA.build()
    pipe = pipeline(model, LLAMA.batches[0], num_stages=None, plan=tmp_path / "plan.json")
    assert pipe.num_stages == 3 and pipe.plan.stage_of == plan.stage_of
    assert_same_step(reference_step(LLAMA.build(), LLAMA.batches[0], 4),
                     (pipe.step(**LLAMA.batches[0]), gradients(model)))


def test_parameters_are_the_users_tensors():
    model = LLAMA.build()
    pipe = pipeline(model, LLAMA.batches[0])
    assert [id(p) for p in pipe.parameters()] == [id(p) for p in model.parameters()]
    assert pipe.state_dict().keys() == model.state_dict().keys()


def test_nothing_is_alive_after_a_step():
    """Activations and batches are freed: what lives after ten steps lives after two."""
    import gc
    model = LLAMA.build()
    pipe = pipeline(model, LLAMA.batches[0], num_stages=3)

    def alive() -> int:
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    for _ in range(3):
        pipe.step(**LLAMA.batches[0])
    before = alive()
    for _ in range(4):
        pipe.step(**LLAMA.batches[0])
    assert alive() <= before


# --------------------------------------------------------------------------------------------------------- over workers

def clipped(report) -> None:
    """GPT-2 with its tie over the workers: clip, AdamW, evaluate with other sizes between; then the weights."""
    case = GPT2
    model = case.build()
    pipe = pe.Pipeline(model, case.batches[0], num_microbatches=4, schedule="1f1b", costs="analytic")
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=5)
    seen = []
    for number in range(5):
        batch = case.batches[number % 3]
        loss = pipe.step(**batch)
        norm = pipe.clip_grad_norm_(0.5)
        optimizer.step(), rate.step(), optimizer.zero_grad()
        pipe.eval()
        output = pipe.evaluate(**rows(case.batches[0], 1 + number))
        pipe.train()
        seen.append((loss, norm, output.loss, output.logits))
    everything = pipe.evaluate(**case.batches[0], gather=True)
    pipe.verify_shared()
    report("seen", (seen, {n: p.detach() for n, p in pipe.named_parameters()}, everything.logits))
    pipe.close()


def accumulated(report) -> None:
    """Gradients of a tied weight over two steps, then dropout over the workers."""
    model = GPT2.build()
    pipe = pe.Pipeline(model, GPT2.batches[0], num_microbatches=4, costs="analytic")
    pipe.step(**GPT2.batches[0])
    pipe.step(**GPT2.batches[1])
    report("accumulated", {n: p.grad for n, p in pipe.named_parameters()})
    pipe.close()
    for schedule in SCHEDULES:
        case = zoo.hugging_face("gpt2", dropout=0.1)
        pipe = pe.Pipeline(case.build(), case.batches[0], num_microbatches=4, schedule=schedule, costs="analytic")
        losses = [pipe.step(**batch) for batch in case.batches[:2]]
        report(("dropout", schedule), (losses, {n: p.grad for n, p in pipe.named_parameters()}))
        pipe.close()


def scenarios(report) -> None:
    warnings.simplefilter("ignore")
    for scenario in (clipped, accumulated):
        try:
            scenario(report)
        except Exception:
            report(scenario.__name__, traceback.format_exc())
            raise


@cache
def told() -> list[dict]:
    return launch(3, scenarios, limit=90)


def test_training_over_workers_is_training_in_one_process():
    """Losses, norms, evaluations and final weights of five steps of clipped AdamW with a tied weight."""
    plain = GPT2.build()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=5)
    found = [worker["seen"] for worker in told()]
    for number in range(5):
        loss = reference_step(plain, GPT2.batches[number % 3], 4)[0]
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step(), rate.step(), optimizer.zero_grad()
        with torch.no_grad():
            output = plain.eval()(**rows(GPT2.batches[0], 1 + number))
            plain.train()
        for rank, (seen, _, _) in enumerate(found):
            for expected, value in zip((loss, norm, output.loss), seen[number][:3], strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=0)
            if rank == 2:
                torch.testing.assert_close(seen[number][3], output.logits, rtol=1e-3, atol=1e-3)
            else:
                assert seen[number][3] is None, "only the last stage's worker has the whole output"
    weights = dict(plain.named_parameters())
    for _, held, everything in found:
        assert torch.equal(everything, found[0][2]), "gather gives everything everywhere"
        for name, value in held.items():
            torch.testing.assert_close(value, weights[name].detach(), rtol=1e-3, atol=2e-4, msg=name)


def test_shared_gradients_accumulate_over_workers():
    plain = GPT2.build()
    first = {n: g.clone() for n, g in reference_step(plain, GPT2.batches[0], 4)[1].items()}
    second = reference_step(plain, GPT2.batches[1], 4)[1]
    for worker in told():
        for name, grad in worker["accumulated"].items():
            worst, _ = worst_difference({name: first[name] + second[name]}, {name: grad})
            assert worst <= 1e-6, (name, worst)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dropout_over_workers_is_that_of_one_process(schedule):
    case = zoo.hugging_face("gpt2", dropout=0.1)
    model = case.build()
    pipe = pipeline(model, case.batches[0], num_stages=1)
    losses = [pipe.step(**batch) for batch in case.batches[:2]]
    for worker in told():
        found = worker["dropout", schedule]
        assert all(map(torch.equal, losses, found[0]))
        for name, grad in found[1].items():
            worst, _ = worst_difference({name: gradients(model)[name]}, {name: grad})
            assert worst <= 1e-6, (name, worst)


def test_an_own_order_is_a_file_and_a_broken_one_is_refused_with_its_lines(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    model, example = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), (torch.randn(4, 4),)
    options = dict(num_microbatches=2, loss_fn=F.mse_loss, schedule=str(file))
    pipe = pipeline(model, example, **options)
    loss = pipe.step(*example, target=torch.zeros(4, 4))
    assert loss == pytest.approx(float(F.mse_loss(model(*example), torch.zeros(4, 4))))
    assert "schedule mine" in str(pipe.report())
    file.write_text("0F0,0B0,0F1,0B1\n1F1,1F0,1B1,1B0\n")
    with pytest.raises(pe.ScheduleError, match="worker 0, line 2: 0B0 waits for worker 1, line 4: 1B0"):
        pipeline(model, example, **options)
