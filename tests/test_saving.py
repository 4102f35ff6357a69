"""A user's ordinary way of saving never keeps half of the training in silence."""
import io

import pytest
import torch
import zoo
from reference import reference_step
from workers import launch

import pipeengine as pe

BATCH = 4


def _tokens(seed: int) -> torch.Tensor:
    return torch.randint(3, zoo.VOCAB, (BATCH, 12), generator=torch.Generator().manual_seed(seed))


def _refused(what) -> str:
    try:
        what()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _train(report, num_stages: int, case: str) -> None:
    """A few steps, then every way of saving that people know."""
    # without dropout: an optimizer's steps are compared below
    model = zoo.hugging_face(case).build().eval()
    names = [name for name, _ in model.named_parameters()]
    tokens = _tokens(0)
    before = torch.optim.SGD(model.parameters(), lr=0.1)        # an optimizer made before the pipeline keeps working
    pipe = pe.Pipeline(model, dict(input_ids=tokens, labels=tokens), num_microbatches=2, costs="analytic")
    held = dict(pipe.named_parameters())
    for step in range(2):
        tokens = _tokens(step)
        pipe.step(input_ids=tokens, labels=tokens)
        before.step()
        before.zero_grad()
    report("foreign", sorted(name for name, p in model.named_parameters() if p.device.type == "meta"))
    report("held", sorted(held))
    report("all", names)
    report("forward", _refused(lambda: float(model(input_ids=tokens, labels=tokens).loss)))
    saved = io.BytesIO()
    _refused(lambda: torch.save(model.state_dict(), saved))
    fresh = zoo.hugging_face(case).build()
    report("reload", _refused(lambda: fresh.load_state_dict(torch.load(io.BytesIO(saved.getvalue())))))
    whole = pipe.full_state_dict()
    report("whole", whole is not None)
    if whole is not None:
        report("state", {name: value.clone() for name, value in whole.items()})
    everything = pipe._workers.broadcast_object(whole)
    pipe.load_state_dict({name: torch.zeros_like(value) for name, value in everything.items()})
    report("zeroed", max(float(p.detach().abs().max()) for p in pipe.parameters()))
    pipe.load_state_dict(everything)
    report("bad", _refused(lambda: pipe.load_state_dict({**everything, "nonsense": tokens})))
    report("short", _refused(lambda: pipe.load_state_dict({names[0]: everything[names[0]][:1]}, strict=False)))
    pipe.step(input_ids=tokens, labels=tokens)
    report("after", float(pipe.loss))
    second = pe.Pipeline(model, dict(input_ids=tokens, labels=tokens), num_microbatches=2, costs="analytic",
                         schedule="1f1b", num_stages=num_stages)
    report("second", float(second.step(input_ids=tokens, labels=tokens)))
    second.close()
    pipe.close()


@pytest.mark.parametrize("num_workers, case", [pytest.param(2, "llama", marks=pytest.mark.slow), (3, "gpt2")])
def test_ordinary_saves_raise_or_are_whole(num_workers, case):
    """Eight steps of a Llama on two workers, saved on worker 0, came back with another loss than the pipeline had."""
    reports = launch(num_workers, _train, num_workers, case)
    names = reports[0]["all"]
    for report in reports:
        assert set(report["foreign"]) == set(names) - set(report["held"]) and report["foreign"]
        assert report["forward"], "a forward of the whole model used initial values of other stages"
        assert report["reload"], "a state dict with holes was saved and loaded"
        assert "nonsense" in report["bad"] and "InputError" in report["bad"]
        assert "InputError" in report["short"] and names[0] in report["short"]
        assert report["zeroed"] == 0.0
    assert [report["whole"] for report in reports] == [True] + [False] * (num_workers - 1)
    model = zoo.hugging_face(case).build().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        tokens = _tokens(step)
        reference_step(model, dict(input_ids=tokens, labels=tokens), 2)
        optimizer.step()
        optimizer.zero_grad()
    expected = model.state_dict()
    assert set(reports[0]["state"]) == set(expected)
    for name, value in reports[0]["state"].items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6 * float(expected[name].abs().max() + 1e-30))
    assert len({report["after"] for report in reports}) == 1
    assert reports[0]["second"] == pytest.approx(reports[0]["after"], rel=1e-5), "the second pipeline lost values"
