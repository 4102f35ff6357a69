"""What surrounds the steps of parameters in shards: optimizers, what is saved, what travels, what is refused."""
import tempfile
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import zoo
from reference import worst_difference
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from workers import launch

import pipeengine as pe
from pipeengine.distributed import own_part

pytestmark = pytest.mark.usefixtures("quiet")
STEPS, REPLICAS, MICROBATCHES = 10, 2, 4
BATCH = zoo.regression()[0]
MESHES = {"none": (("pp", "dp_replicate"), (2, 2)), "optimizer": (("dp", "pp"), (2, 2)),
          "parameters": (("pp", "dp_shard"), (2, 2))}


class Net(zoo.Blocks):
    """Four blocks and a head, with a number and a recurrent layer among the parameters, and one parameter under two
    names in one block."""

    def __init__(self):
        super().__init__()
        width = self.head.in_features
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight

    def forward(self, x, y):
        x = x + self.second(self.first(x))
        for block in self.blocks:
            x = block(x)
        return self.loss(self.scale * self.recurrent(x)[0], y)


def make(layout: str, dtype: torch.dtype = torch.float32, one_row: bool = False, model: nn.Module | None = None,
         **options) -> pe.Pipeline:
    torch.manual_seed(1)
    names, shape = MESHES[layout]
    if "mesh" not in options:
        options["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    options = dict(num_microbatches=MICROBATCHES, shard=layout if layout == "optimizer" else None) | options
    model = model or Net().to(dtype)
    if one_row:
        model.scale = nn.Parameter(model.scale.detach()[None])
    return pe.Pipeline(model, {key: value[:4].to(dtype) for key, value in BATCH.items()}, schedule="1f1b",
                       costs="analytic", check=False, **options)


def mine(pipe: pe.Pipeline) -> dict[str, torch.Tensor]:
    return {key: value.tensor_split(REPLICAS)[pipe.replica] for key, value in BATCH.items()}


def train(report, root: str) -> None:
    warnings.simplefilter("ignore")
    for shard in MESHES:
        pipe = make(shard)
        before = {name: tuple(parameter.shape) for name, parameter in pipe.named_parameters()}
        optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
        losses, norms, sent = [], [], [0]
        for _ in range(STEPS):
            losses.append(float(pipe.step(**mine(pipe))))
            norms.append(float(pipe.clip_grad_norm_(1e9)))      # scales nothing
            optimizer.step()
            optimizer.zero_grad()
            sent.append(pipe._assembly.ties.bytes)
        pipe.step(**mine(pipe))
        report((shard, "clipped"), [float(pipe.clip_grad_norm_(0.01, kind)) for kind in (2.0, 2.0, float("inf"))])
        optimizer.zero_grad()
        pipe.evaluate(**mine(pipe))
        report(shard, (losses, norms, float(pipe.loss), pipe.full_state_dict(), before))
        held = {name: parameter.numel() for name, parameter in pipe._assembly.reader.model.named_parameters()
                if name in pipe._assembly.tensors.held}
        report((shard, "sent"), (sent[3] - sent[2], held))
        kept = sum(getattr(value, "to_local", lambda value=value: value)().numel()
                   for state in optimizer.state.values() for key, value in state.items() if key != "step")
        report((shard, "state"), (kept, sum(held.values())))
        folder = Path(root) / str(shard)
        pipe.save_weights(folder)
        pipe.verify_shared()
        pipe.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in pipe.state_dict().items()})
        pipe.evaluate(**mine(pipe))
        zeroed = float(pipe.loss)
        files = [load_file(file) for file in folder.glob("*.safetensors")]
        pipe.load_state_dict({name: tensor for file in files for name, tensor in file.items()}, strict=False)
        pipe.evaluate(**mine(pipe))
        report((shard, "read"), (zeroed, float(pipe.loss)))
        pipe.close()
    report("hooked", hooked())
    report("refused", refusals())


def hooked() -> list[tuple]:
    """What hooks on a shard and on a parameter that stays whole have been called with in two steps."""
    pipe = make("parameters")
    seen: list[tuple] = []
    for name, parameter in pipe.named_parameters():
        if name.endswith("weight") or name == "scale":
            parameter.register_post_accumulate_grad_hook(
                lambda one, name=name: seen.append((name, own_part(one.grad).double().sum().item())))
    expected = []
    for _ in range(2):
        pipe.step(**mine(pipe))
        expected += [(name, own_part(one.grad).double().sum().item()) for name, one in pipe.named_parameters()
                     if name.endswith("weight") or name == "scale"]
    pipe.close()
    return [sorted(seen), sorted(expected)]


def made_after_an_optimizer() -> pe.Pipeline:
    """A pipeline, with an optimizer of what its shards have replaced as ``old``."""
    model = Net()
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    pipe = make("parameters", model=model)
    pipe.old = old
    return pipe


def refusals() -> list[str]:
    """What is wrong is an ``InputError`` on every worker."""
    from torch.distributed.fsdp import fully_shard
    said = []

    def refused(what) -> None:
        try:
            what()
            said.append("")
        except pe.InputError as error:
            said.append(str(error))
    model = Net()
    fully_shard(model.head)
    example = {key: value[:4] for key, value in BATCH.items()}
    refused(lambda: pe.Pipeline(model, example, num_replicas=2))
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("pp", "dp_shard", "dp_replicate"))
    refused(lambda: pe.Pipeline(Net(), example, mesh=mesh))
    refused(lambda: make("parameters", shard="optimizer"))
    pipe = made_after_an_optimizer()
    refused(lambda: pipe.step(**mine(pipe)))
    pipe.old = None
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    pipe.step(**mine(pipe))
    refused(lambda: torch.nn.utils.clip_grad_norm_(pipe.parameters(), 1.0))
    first = next(iter(pipe.parameters()))
    optimizer.state[first]["own"] = torch.zeros(3)
    refused(lambda: pe.Checkpoints(tempfile.gettempdir(), pipe, optimizer=optimizer).save(1, force=True))
    pipe.close()
    return said


@cache
def trained() -> list[dict]:
    return launch(4, train, tempfile.mkdtemp(), limit=200)


def test_ten_steps_are_bit_equal_to_unsharded_ones():
    """AdamW, a parameter under two names, a recurrent layer; and what was saved and loaded."""
    reports = trained()
    for report in reports:
        assert report["parameters"][0] == report["none"][0] and report["parameters"][2] == report["none"][2]
        assert report["parameters"][1] == pytest.approx(report["none"][1], rel=1e-6)
        assert report["parameters", "read"] == (report["none", "read"][0], report["parameters"][2])
        assert report["parameters", "read"][0] != report["parameters"][2]
        assert report["parameters"][4] == report["none"][4], "shards have the names and the shapes of the whole"
    whole, shards = reports[0]["none"][3], reports[0]["parameters"][3]
    assert set(whole) == set(shards) and worst_difference(whole, shards)[0] == 0.0


def test_all_rows_are_clipped_by_the_norm_of_the_whole():
    for report in trained():
        whole, shards = report["none", "clipped"], report["parameters", "clipped"]
        assert shards == pytest.approx(whole, rel=1e-5) and shards == trained()[0]["parameters", "clipped"]
        assert whole[0] > whole[1] == pytest.approx(0.01, rel=1e-3)


def test_the_optimizer_holds_its_rows_alone():
    for report in trained():
        (kept, entries), (whole, _) = report["parameters", "state"], report["none", "state"]
        assert whole == 2 * entries and kept <= 2 * entries / REPLICAS * 1.01 + 2


@pytest.mark.parametrize("shard", MESHES)
def test_gradients_and_values_travel_once(shard):
    """A ring's volume: each worker of a stage sends 2 (n - 1) / n of its parameters, whoever updates them."""
    reports = trained()
    for place in range(2):
        names = set(reports[-place][shard, "sent"][1])
        sent, held = zip(*(report[shard, "sent"] for report in reports if set(report[shard, "sent"][1]) == names))
        assert len(sent) == REPLICAS
        least = 4 * 2 * (REPLICAS - 1) * sum(held[0].values())
        # Besides, who has used which parameter, and up to a row or a number to fill shares up.
        told = 4 * REPLICAS * (REPLICAS - 1) * (len(held[0]) + 2)
        padding = 4 * 2 * sum(size // 8 for size in held[0].values()) // 16
        assert least <= sum(sent) <= least + told + padding, (shard, sum(sent), least, told, padding)


def test_hooks_on_rows_run_once_a_step():
    for report in trained():
        seen, expected = report["hooked"]
        assert len(seen) >= 8 and seen == expected


def test_what_cannot_be_sharded_is_refused_by_name():
    for report in trained():
        model, mesh, shard, old, clipped, saved = report["refused"]
        assert "head.weight" in model and "DTensor" in model and "dp_shard" in model
        assert "dp_replicate" in mesh and "one dimension" in mesh
        assert "'optimizer'" in shard and "dp_shard" in shard
        assert "SGD was made of parameters that are in shards now" in old and "pipe.parameters()" in old
        assert "pipe.clip_grad_norm_" in clipped
        assert "own" in saved and "(3,)" in saved


# ------------------------------------------------------------------------------------------------------- precision

def low_precision(report, root: str) -> None:
    """bfloat16 with master weights, through a checkpoint; float32 with a scaler, the last step of which overflows."""
    warnings.simplefilter("ignore")
    for shard in ("optimizer", "parameters"):
        for dtype in (torch.bfloat16, torch.float32):
            # One row, which one replica has: a GradScaler takes no shards beside whole gradients.
            pipe = make("none", shard=shard, dtype=dtype, one_row=dtype == torch.float32, mesh=None, num_replicas=2)
            batch = {key: value.to(dtype) for key, value in mine(pipe).items()}
            optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
            scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype == torch.float32)
            if not scaler.is_enabled():
                pe.keep_master_weights(optimizer)
            for step in range(4):
                given = {key: value * (float("inf") if scaler.is_enabled() and step == 3 else 1.0)
                         for key, value in batch.items()}
                pipe.step(**given, scaler=scaler)
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                if step == 1:
                    checkpoints = pe.Checkpoints(Path(root) / f"{shard}-{dtype}", pipe, optimizer=optimizer)
                    checkpoints.save(1, force=True)
                    checkpoints.wait()
                    pipe.load_state_dict({name: torch.zeros_like(one) for name, one in pipe.state_dict().items()})
                    assert checkpoints.load() == 1
                    checkpoints.close()
            masters = {str(one["master"].dtype) for one in optimizer.state.values() if "master" in one}
            report((shard, str(dtype)), (pipe.full_state_dict(), masters, scaler.get_scale()))
            pipe.close()


@pytest.mark.slow
def test_master_weights_and_scalers_work_on_rows():
    reports = launch(2, low_precision, tempfile.mkdtemp(), limit=300)
    for dtype, masters, scale in (("torch.bfloat16", {"torch.float32"}, 1.0), ("torch.float32", set(), 128.0)):
        for report in reports:
            assert report["optimizer", dtype][1:] == report["parameters", dtype][1:] == (masters, scale)
        whole, shards = (reports[0][shard, dtype][0] for shard in ("optimizer", "parameters"))
        assert all(torch.equal(whole[name], shards[name]) for name in whole)
