"""Clipping by one worker's gradients alone is refused, however it is called; what is right stays allowed."""
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from workers import Workers

import pipeengine as pe

BATCH = {"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(0))}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.pow(2).mean()


def pipeline():
    torch.manual_seed(0)
    return pe.Pipeline(Small(), BATCH, num_stages=2, num_microbatches=2, costs="analytic", check=False)


def test_one_process_has_all_gradients():
    pipe = pipeline()
    pipe.step(**BATCH)
    norm = pipe.clip_grad_norm_(float("inf"))
    torch.testing.assert_close(clip_grad_norm_(pipe.parameters(), 0.01), norm)
    torch.testing.assert_close(pipe.clip_grad_norm_(1.0), torch.tensor(0.01), rtol=1e-3, atol=0)


def clippings(report):
    pipe = pipeline()
    pipe.step(**BATCH)
    before = [parameter.grad.clone() for parameter in pipe.parameters()]
    calls = {"imported": clip_grad_norm_, "looked up": torch.nn.utils.clip_grad_norm_,
             "norm of gradients": lambda given, _: get_total_norm([parameter.grad for parameter in given]),
             "norm of parameters": lambda given, _: torch.nn.utils.get_total_norm(given)}
    for name, clip in calls.items():
        try:
            clip(pipe.parameters(), 0.01)
            report(name, "nothing")
        except pe.InputError as error:
            report(name, str(error))
    report("untouched", all(map(torch.equal, before, [parameter.grad for parameter in pipe.parameters()])))
    clip_grad_value_(pipe.parameters(), 1e-3)
    report("value", max(float(parameter.grad.abs().max()) for parameter in pipe.parameters()) <= 1.001e-3)
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    report("another model", float(clip_grad_norm_(other.parameters(), 1.0)) > 1)
    report("alike", pipe.clip_grad_norm_(float("inf")).item())
    clip_grads_with_norm_(pipe.parameters(), 1e-3, pipe.clip_grad_norm_(float("inf")))
    report("clipped", abs(pipe.clip_grad_norm_(float("inf")).item() - 1e-3) < 1e-6)
    report("ours", float(pipe.clip_grad_norm_(1.0)) > 0)
    pipe.close()


def test_several_workers_are_told_what_to_call():
    reports = Workers(2, clippings, limit=120).join()
    assert reports[0]["alike"] == reports[1]["alike"]
    for report in reports:
        for name in ("imported", "looked up", "norm of gradients", "norm of parameters"):
            assert "pipe.clip_grad_norm_" in report[name]
        assert all(report[name] is True for name in ("untouched", "value", "another model", "clipped", "ours"))
