"""Several pipelines that train together are one plain process: every gradient, the loss, and what is saved."""
import os
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from functools import cache

import pytest
import torch
import zoo
from reference import assert_same_step, gradients, reference_parts, split_batch, worst_difference
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from workers import launch

import pipeengine as pe
from pipeengine.distributed import own_part

MICROBATCHES = 2


class MaskedMean(zoo.Blocks):
    """A mean over what a mask keeps, as many write it: no count of targets that is known by its name."""

    def forward(self, x, y, keep):
        for block in self.blocks:
            x = block(x)
        return ((self.head(x) - y).pow(2).mean(-1) * keep).sum() / keep.sum()


def masked_batches() -> tuple:
    kept = [torch.rand(batch["x"].shape[:2], generator=zoo.draws(7)) < 0.4 for batch in zoo.regression()]
    for keep in kept:
        keep[:, 0] = True               # a mean over nothing is not a number, in one process too
    return tuple(dict(batch, keep=keep.float()) for batch, keep in zip(zoo.regression(), kept))


CASES = {case.name: case for case in (
    zoo.hugging_face("gpt2"), zoo.hugging_face("t5"), zoo.hugging_face("llama"), zoo.AWKWARD["TiedThrice"],
    zoo.AWKWARD["FrozenAndUnused"], zoo.AWKWARD["LongSkips"], zoo.AWKWARD["Classifier"],
    zoo.Case("MaskedMean", zoo.seeded(MaskedMean), masked_batches()), zoo.hugging_face("gpt2", dropout=0.1))}
# rows of each replica's batch, of the batches of 8, 8 and 5 rows: even, uneven, short
ROWS = {1: ((8,), (8,), (5,)), 2: ((4, 4), (6, 2), (1, 4)), 4: ((2, 2, 2, 2), (4, 1, 1, 2), (1, 2, 1, 1))}
GRIDS = ((2, 2), (4, 1))                # replicas, workers of each


SHARDED = ("gpt2", "t5", "TiedThrice", "FrozenAndUnused", "LongSkips")
USUAL = {2: ("gpt2", "TiedThrice", "MaskedMean", "Classifier", "gpt2-dropout"),
         4: ("gpt2", "FrozenAndUnused", "LongSkips", "gpt2-dropout")}


def cases(replicas: int, width: int, rest: bool = False) -> list[tuple[str, str, str | None]]:
    """(model, schedule, shard): models under 1F1B, one under every schedule that these workers can run; ``rest`` are
    the other models, for when there is time."""
    chosen = [(name, "1f1b", shard) for name in CASES for shard in (None, "optimizer")
              if (name not in USUAL[replicas]) == rest and (shard is None or name in SHARDED)]
    if rest:
        return chosen
    if (replicas, width) == (2, 2):
        chosen += [("LongSkips", schedule, "optimizer") for schedule in (
            "gpipe", "zb-h1", "interleaved-1f1b")]
        chosen += [("LongSkips", "zb-h1", None), ("gpt2", "interleaved-1f1b", None)]
    return chosen


def replica_batches(name: str, number: int, replicas: int) -> list[dict]:
    """Batch ``number`` of a case, one part for each replica."""
    batch, parts, first = CASES[name].batches[number], [], 0
    for rows in ROWS[replicas][number]:
        parts.append({key: value[first:first + rows] for key, value in batch.items()})
        first += rows
    return parts


def without_targets(batch: dict) -> dict:
    return {key: torch.full_like(value, -100) if key in ("labels", "target") else value
            for key, value in batch.items()}


def call(pipe_call, batch: dict) -> object:
    return pipe_call(**batch)


def make(name: str, schedule: str, shard: str | None, replicas: int) -> tuple[nn.Module, pe.Pipeline]:
    case = CASES[name]
    model, batch = case.build(), replica_batches(name, 0, replicas)[0]
    example, target = case.split_target(batch)
    return model, pe.Pipeline(model, example, target=target, loss_fn=case.loss_fn, num_microbatches=MICROBATCHES,
                              schedule=schedule, costs="analytic", num_replicas=replicas, shard=shard, check=False)


def gradients_of(pipe: pe.Pipeline) -> dict[str, torch.Tensor]:
    """Of a parameter in shards the own rows, of others the whole."""
    return {name: own_part(p.grad).clone() for name, p in pipe.named_parameters() if p.grad is not None}


def four_steps(model: nn.Module, pipe: pe.Pipeline, name: str, replicas: int) -> list[tuple]:
    """(loss, gradients) of a step, of a second one on top of it, of a short one, of one without targets in the last
    replica."""
    seen = []
    for number, keep in ((0, False), (1, True), (2, False)):
        if not keep:
            for parameter in model.parameters():
                parameter.grad = None
        loss = call(pipe.step, replica_batches(name, number, replicas)[pipe.replica])
        seen.append((loss, gradients_of(pipe)))
    for parameter in model.parameters():
        parameter.grad = None
    batch = replica_batches(name, 1, replicas)[pipe.replica]
    loss = call(pipe.step, without_targets(batch) if pipe.replica == replicas - 1 else batch)
    seen.append((loss, gradients_of(pipe)))
    pipe.verify_shared()
    return seen


def one_case(name: str, schedule: str, shard: str | None, replicas: int) -> list[tuple]:
    model, pipe = make(name, schedule, shard, replicas)
    seen = four_steps(model, pipe, name, replicas)
    pipe.close()
    return seen


def run_cases(report, one_case, replicas: int, chosen: Sequence[tuple]) -> None:
    """What ``one_case(*case, replicas)`` returns of each case, or its traceback."""
    warnings.simplefilter("ignore")
    for case in chosen:
        try:
            report(case, one_case(*case, replicas))
        except Exception:
            report(case, traceback.format_exc())


@cache
def ran(replicas: int, width: int, rest: bool) -> list[dict]:
    return launch(replicas * width, run_cases, one_case, replicas, cases(replicas, width, rest), limit=400)


@cache
def truth(name: str, replicas: int) -> list[tuple]:
    """The same in one plain process, micro-batches of replica 0 first."""
    case, seen = CASES[name], []
    model = case.build()

    def step(batches: list[dict]) -> tuple:
        split = [part for batch in batches for part in split_batch(batch, MICROBATCHES)]
        pairs = [case.split_target(part) for part in split]
        weights = None
        if name == "MaskedMean":
            kept = [float(part["keep"].sum()) for part in split]
            weights = [count / sum(kept) for count in kept]
        loss = reference_parts(model, [part for part, _ in pairs], weights, case.loss_fn,
                               [target for _, target in pairs] if case.loss_fn else None)
        return loss, {name: grad.clone() for name, grad in gradients(model).items()}
    for number, keep in ((0, False), (1, True), (2, False)):
        if not keep:
            model.zero_grad()
        seen.append(step(replica_batches(name, number, replicas)))
    model.zero_grad()
    *batches, last = replica_batches(name, 1, replicas)
    seen.append(step([*batches, without_targets(last)]))
    return seen


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize(("grid", "rest", "case"), [
    pytest.param(grid, rest, case, marks=[pytest.mark.slow] * (rest or grid == (4, 1)),
                 id="-".join(map(str, (*grid, *case))))
    for grid in GRIDS for rest in (False, True) for case in cases(*grid, rest) if not CASES[case[0]].random])
def test_replicas_are_one_process(grid, rest, case):
    """Two steps whose gradients add up, a short batch, a replica without a target: every gradient of every worker."""
    seen = [worker.get(case, "this worker never got here") for worker in ran(*grid, rest)]
    assert not any(isinstance(one, str) for one in seen), "\n".join(map(str, seen))
    for number, expected in enumerate(truth(case[0], grid[0])):
        merged: dict[str, torch.Tensor] = {}
        for steps in seen:
            loss, grads = steps[number]
            assert torch.equal(loss, seen[0][number][0]), "one loss on every worker"
            assert all(torch.equal(merged[n], grad) for n, grad in grads.items() if n in merged), "copies differ"
            merged |= grads
        assert_same_step(expected, (loss, merged), 1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_shards_are_bit_equal_and_every_parameter_has_one_gradient(grid):
    for whole, dealt in (((*case[:2], None), case) for case in cases(*grid) if case[2]):
        if whole not in cases(*grid):
            continue
        for number in range(4):
            expected: dict[str, torch.Tensor] = {}
            for worker in ran(*grid, False):
                expected |= worker[whole][number][1]
            names = [name for worker in ran(*grid, False) for name in worker[dealt][number][1]]
            assert set(names) == set(expected) and len(names) == len(set(names)), dealt
            for worker in ran(*grid, False):
                assert worst_difference({n: expected[n] for n in worker[dealt][number][1]},
                                        worker[dealt][number][1])[0] == 0.0


def test_dropout_is_keyed_by_the_global_micro_batch():
    """Two replicas of two stages, four of one, and one pipeline of four micro-batches draw the same masks."""
    name = "gpt2-dropout"
    for replicas, width in GRIDS:
        case = CASES[name]
        model, batch = case.build(), case.batches[0]
        pipe = pe.Pipeline(model, batch, num_microbatches=replicas * MICROBATCHES, costs="analytic", check=False)
        loss = pipe.step(**batch)
        merged: dict[str, torch.Tensor] = {}
        for worker in ran(replicas, width, False):
            merged |= worker[name, "1f1b", None][0][1]
        expected = ran(replicas, width, False)[0][name, "1f1b", None][0][0]
        assert_same_step((loss, gradients(model)), (expected, merged), 1e-6)


# ------------------------------------------------------------------------------------------------- what is around steps

TOKENS = torch.randint(3, zoo.VOCAB, (8, 12), generator=zoo.draws(3))
STEPS = 10


BOTH = [("pp-dp", None), ("dp-pp", "optimizer")]


def around_steps(report) -> None:
    """Both trainings, then what is refused: one launch for all."""
    warnings.simplefilter("ignore")
    for layout, shard in BOTH:
        train(lambda key, value, run=(layout, shard): report((*run, key), value), layout, shard)
    misuse(report)


def train(report, layout: str, shard: str | None) -> None:
    """Ten steps of AdamW with clipping, then every way out: state, weights, evaluation, verification."""
    names, shape = {"pp-dp": (("pp", "dp_replicate"), (2, 2)), "dp-pp": (("dp", "pp"), (2, 2))}[layout]
    model = zoo.hugging_face("gpt2").build()
    rank = torch.distributed.get_rank()
    if rank % 2 if layout == "pp-dp" else rank // 2:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)                     # replica 0's values reach all
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    example = dict(input_ids=TOKENS[:4], labels=TOKENS[:4])
    pipe = pe.Pipeline(model, example, mesh=mesh, num_microbatches=MICROBATCHES, schedule="1f1b", costs="analytic",
                       shard=shard, check=False)
    report("place", (pipe.replica, pipe.rank, pipe.num_replicas, pipe.stages, pipe.is_first_worker))
    mine = TOKENS.tensor_split(2)[pipe.replica]
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
    norms = []
    for _ in range(STEPS):
        pipe.step(input_ids=mine, labels=mine)
        norms.append(float(pipe.clip_grad_norm_(0.5)))
        optimizer.step()
        optimizer.zero_grad()
    report("norms", norms)
    output = pipe.evaluate(input_ids=mine, labels=mine, gather=True)
    report("evaluated", (float(pipe.loss), output.logits))
    pipe.verify_shared()
    report("state", pipe.full_state_dict())
    report("share", sorted(pipe.state_dict()))
    folder = [tempfile.mkdtemp() if pipe.is_first_worker else None]
    torch.distributed.broadcast_object_list(folder)
    pipe.save_weights(folder[0])
    torch.distributed.barrier()
    report("files", sorted(os.listdir(folder[0])))
    if pipe.is_first_worker:
        import transformers
        read = transformers.GPT2LMHeadModel.from_pretrained(folder[0]).state_dict()
        report("read", {name: tensor.clone() for name, tensor in read.items()})
    pipe.load_state_dict({name: torch.zeros_like(t) for name, t in pipe.state_dict().items()})
    pipe.evaluate(input_ids=mine, labels=mine)
    report("zeroed", max(float(p.detach().abs().max()) for p in model.parameters() if p.device.type != "meta"))
    with torch.no_grad():
        if pipe.replica == 1 and shard is None:
            next(pipe.parameters()).add_(1e-3)
    try:
        pipe.verify_shared()
        report("verdict", "")
    except pe.WorkerError as error:
        report("verdict", str(error))


@cache
def told() -> list[dict]:
    return launch(4, around_steps, limit=300)


def trained(layout: str, shard: str | None) -> list[dict]:
    return [{key[2]: value for key, value in report.items() if key[:2] == (layout, shard)} for report in told()]


@cache
def plain_training() -> tuple[list[float], nn.Module]:
    model, norms = zoo.hugging_face("gpt2").build(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parts = [dict(input_ids=rows, labels=rows) for rows in TOKENS.tensor_split(4)]
    for _ in range(STEPS):
        reference_parts(model, parts)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return norms, model


@pytest.mark.parametrize(("layout", "shard"), BOTH)
def test_ten_steps_and_what_is_saved(layout, shard):
    reports = trained(layout, shard)
    norms, model = plain_training()
    grid = [(0, 0), (1, 0), (0, 1), (1, 1)] if layout == "pp-dp" else [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [report["place"] for report in reports] == [
        (replica, place, 2, (place,), number == 0) for number, (replica, place) in enumerate(grid)]
    for report in reports:
        torch.testing.assert_close(report["norms"], norms, rtol=1e-4, atol=0)
        assert report["norms"] == reports[0]["norms"] and report["evaluated"][0] == reports[0]["evaluated"][0]
        assert report["zeroed"] == 0.0
    with torch.no_grad():
        expected = model(input_ids=TOKENS, labels=TOKENS)
    for report in reports:
        torch.testing.assert_close(report["evaluated"][1], expected.logits, rtol=0, atol=2e-2)
    assert [report["state"] is not None for report in reports] == [True, False, False, False]
    assert set(reports[0]["state"]) == set(model.state_dict())
    assert worst_difference(reports[0]["state"], reports[0]["read"])[0] == 0.0, "saved is what was trained"
    share = [name for report in reports for name in report["share"]]
    if shard:
        assert len(share) == len(set(share)) + share.count("lm_head.weight") - 1, "each is updated once"
    verdicts = [report["verdict"] for report in reports]
    assert not any(verdicts) if shard else all("the copies of" in verdict for verdict in verdicts), verdicts


def test_ten_steps_with_shards_are_bit_equal():
    whole, dealt = trained("pp-dp", None), trained("dp-pp", "optimizer")
    assert worst_difference(whole[0]["state"], dealt[0]["state"])[0] == 0.0
    assert whole[0]["norms"] == pytest.approx(dealt[0]["norms"], rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- misuse

def misuse(report) -> None:
    """Wrong meshes and numbers are refused alike; two pipelines on disjoint processes never meet."""
    from torch.distributed.device_mesh import DeviceMesh

    def refused(**options) -> str:
        try:
            pe.Pipeline(zoo.AWKWARD["LongSkips"].build(), zoo.AWKWARD["LongSkips"].batches[0], costs="analytic",
                        **options)
        except pe.InputError as error:
            return str(error)
        return ""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    report("other", refused(mesh=mesh))
    report("three", refused(num_replicas=3))
    report("shard", refused(num_replicas=2, shard="everything"))
    report("count", refused(num_replicas=4, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))))
    rank, losses = torch.distributed.get_rank(), []
    batch = zoo.AWKWARD["LongSkips"].batches[0]
    for ranks in ([[0, 1], [2, 3]], [[0, 2], [1, 3]]):
        for turn in range(2):                           # the names of closed pipelines do not come again
            mesh = DeviceMesh("cpu", torch.tensor(ranks), mesh_dim_names=("dp", "pp"))["pp"]
            mine = {key: value[:8 if 0 in mesh.mesh.tolist() else 4 + turn] for key, value in batch.items()}
            pipe = pe.Pipeline(zoo.AWKWARD["LongSkips"].build(), batch, mesh=mesh, num_microbatches=2,
                               costs="analytic", check=False)
            losses.append((0 in mesh.mesh.tolist(), turn, float(pipe.step(**mine)), pipe.num_replicas))
            pipe.close()
    report("losses", losses)
    pipe = pe.Pipeline(zoo.AWKWARD["LongSkips"].build(), batch, num_microbatches=2, num_replicas=2, costs="analytic",
                       check=False)
    try:
        pipe.step(**{key: value[rank:] for key, value in batch.items()})
    except pe.InputError as error:
        report("batches", str(error))
    try:
        pipe.step(**batch) if pipe.replica else pipe.evaluate(**batch)
    except pe.InputError as error:
        report("kinds", str(error))
    report("after", float(pipe.step(**batch)))
    report("whole", float(zoo.AWKWARD["LongSkips"].build()(**batch).detach()))


def test_misuse_is_refused_and_strangers_never_meet():
    reports = told()
    for report in reports:
        assert "'tp'" in report["other"] and "mesh[" in report["other"]
        assert "4 processes" in report["three"] and "optimizer" in report["shard"] and "2 replicas" in report["count"]
        assert "workers disagree on the batch" in report["batches"]
        assert "evaluate" in report["kinds"] and "step" in report["kinds"]
        assert report["after"] == pytest.approx(report["whole"], rel=1e-6)
    batch = zoo.AWKWARD["LongSkips"].batches[0]
    for report in reports:
        for first, turn, loss, replicas in report["losses"]:
            rows = {key: value[:8 if first else 4 + turn] for key, value in batch.items()}
            with torch.no_grad():
                expected = float(zoo.AWKWARD["LongSkips"].build()(**rows))
            assert replicas == 1 and loss == pytest.approx(expected, rel=1e-6)
