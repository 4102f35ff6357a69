"""The zoo and the reference hold what they promise, in one plain process."""
import warnings

import pytest
import torch
import zoo
from reference import assert_same_step, num_rows, reference_step, split_batch

CASES = {case.name: case for case in (*zoo.AWKWARD.values(), *zoo.hugging_face_cases())}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield


def step(case, batch, num_microbatches):
    inputs, target = case.split_target(batch)
    torch.manual_seed(1)
    return reference_step(case.build(), inputs, num_microbatches, loss_fn=case.loss_fn, target=target)


@pytest.mark.parametrize("name", CASES)
def test_weights_make_the_full_batch(name):
    """Micro-batches weighted by the reference give the loss and the gradients of the whole batch at once."""
    case = CASES[name]
    whole = [step(case, batch, 1) for batch in case.batches]
    parts = [step(case, batch, 3) for batch in case.batches]
    assert len({loss.item() for loss, _ in whole}) == len(case.batches)
    for expected, found in zip(whole, parts, strict=True):
        assert found[0].isfinite() and all(grad.isfinite().all() for grad in found[1].values())
        assert expected[1].keys() == found[1].keys()
        if case.separable and not case.random:
            assert_same_step(expected, found, tolerance=0.1 if name == "MixedPrecision" else 1e-4, floor=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_builds_are_equal_and_deep_enough(name):
    """The same weights each time, and at least four modules of their own with parameters."""
    first, second = CASES[name].build(), CASES[name].build()
    for (name_1, one), (name_2, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert name_1 == name_2 and torch.equal(one, other)
    assert sum(any(True for _ in module.parameters(recurse=False)) for module in first.modules()) >= 4
    assert first.training


@pytest.mark.parametrize("name", sorted(set(zoo.HUGGING_FACE) - {"resnet", "convnext", "mamba"}))
def test_dropout_is_on_when_asked_for(name):
    case = zoo.hugging_face(name, dropout=0.1)
    model, batch = case.build(), case.batches[0]
    losses = set()
    for seed in range(4):
        torch.manual_seed(seed)
        losses.add(reference_step(model, batch, 1)[0].item())
    assert len(losses) > 1


def test_split_is_tensor_split():
    batch = dict(x=torch.arange(7), scale=2.0, table=torch.zeros(3), nested=[torch.arange(14).view(7, 2)])
    parts = split_batch(batch, 3)
    assert [part["x"].tolist() for part in parts] == [[0, 1, 2], [3, 4], [5, 6]]
    assert all(part["table"].shape == (3,) and part["scale"] == 2.0 for part in parts)
    assert parts[1]["nested"][0].tolist() == [[6, 7], [8, 9]]
    assert len(split_batch(batch, 99)) == num_rows(batch) == 7
