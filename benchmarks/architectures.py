"""Every architecture that can be built tiny: three stages in one process beside plain eager, loss and every gradient.

    python benchmarks/architectures.py transformers --json found.json
    python benchmarks/architectures.py transformers --only llama:LlamaForCausalLM

Each model trains on two batches of different lengths. A share of the models runs in one process; one that crashes or
takes longer than ``--seconds`` costs that model alone. ``torchvision`` and ``timm`` are swept likewise where they are
installed.
"""
import argparse
import copy
import json
import random
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy
import torch
from tiny_models import from_transformers, transformers_names

import pipeengine as pe
from partitioners.tables import format_table
from partitioners.units import format_share

VERDICTS = ("equal", "within 1e-6", "rounding", "random", "refused", "crashed", "silently different", "model changed",
            "random state moved", "timed out", "not built")
SLOW = "timed out"


class _Late(BaseException):
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=("transformers",))
    parser.add_argument("--only", nargs="*", help="names of models, as the table prints them")
    parser.add_argument("--heads", type=int, default=1, help="models of each family")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=60, help="for one model")
    parser.add_argument("--chunk", type=int, default=25, help="models in one process")
    parser.add_argument("--json", type=Path, help="where the results go, one line each, as they come")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _work(options)
    names = options.only or transformers_names(options.heads)
    out = options.json or Path(tempfile.mkdtemp()) / "found.json"
    out.write_text("")
    todo = list(names)
    while todo:
        chunk = todo[:options.chunk]
        known = len(_read(out))
        subprocess.run([sys.executable, __file__, options.library, "--worker", "--json", str(out), "--only", *chunk,
                        "--microbatches", str(options.microbatches), "--seconds", str(options.seconds)],
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        done = len(_read(out)) - known
        if done < len(chunk):
            _write(out, dict(name=chunk[done], verdict="crashed", why="the process died"))
            done += 1
        todo = todo[done:]
    _print(_read(out))


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path: Path, found: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(found) + "\n")


def _print(found: list[dict]) -> None:
    for one in found:
        if one["verdict"] not in ("equal", "within 1e-6", "rounding", "not built"):
            print(f"{one['verdict']:<20} {one['name']:<60} {one['why'][:300]}")
    counts = Counter(one["verdict"] for one in found)
    tried = sum(counts.values()) - counts["not built"]
    print(f"\n{len(found)} models, of which eager trains {tried}")
    print(format_table((), [
        (verdict, f"{counts[verdict]:,}",
         format_share(counts[verdict] / tried) if verdict != "not built" and tried else "")
        for verdict in VERDICTS if counts[verdict]]))


# -- one process ------------------------------------------------------------------------------------------------------


def _work(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def late(*_: object) -> None:
        raise _Late
    signal.signal(signal.SIGALRM, late)
    for name in options.only:
        signal.alarm(options.seconds)
        try:
            verdict, why = judge(name, options.microbatches)
        except _Late:
            verdict, why = SLOW, ""
        finally:
            signal.alarm(0)
        _write(options.json, dict(name=name, verdict=verdict, why=why))


def judge(name: str, num_microbatches: int) -> tuple[str, str]:
    """The verdict on one model, and what it rests on."""
    why = ""
    try:
        ways = list(from_transformers(name))
    except ImportError as error:
        return "not built", str(error).strip()
    for tiny in ways:
        try:
            model = tiny.build()
            batches = tiny.batches(model)
            plain = copy.deepcopy(model)
            expected = [_eager(plain, batch, tiny.loss_fn, seed=0) for batch in batches]
            again = [_eager(copy.deepcopy(model), batch, tiny.loss_fn, seed=1) for batch in batches]
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            continue
        if not all(loss.isfinite() for loss, _ in expected):
            why = "the loss is not finite"
            continue
        return _compare(model, batches, expected, again, tiny.loss_fn, num_microbatches)
    return "not built", why


def _eager(model: torch.nn.Module, batch: dict, loss_fn: object, seed: int) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    torch.manual_seed(seed), random.seed(seed), numpy.random.seed(seed)
    output = model(**copy.deepcopy(batch))
    loss = loss_fn(output, None) if loss_fn else output["loss"]
    loss.backward()
    return loss.detach(), _gradients(model)


def _gradients(model: torch.nn.Module) -> dict:
    return {name: p.grad.to_dense().clone() for name, p in model.named_parameters() if p.grad is not None}


def _compare(model, batches, expected, again, loss_fn, num_microbatches: int) -> tuple[str, str]:
    target = None if loss_fn is None else torch.zeros(len(next(iter(batches[0].values()))))
    before, states = _looks(model), _random_states()
    try:
        pipe = pe.Pipeline(model, batches[0], num_stages=3, num_microbatches=num_microbatches, loss_fn=loss_fn,
                           target=target, costs="analytic", schedule="gpipe")
        moved, changed = _random_states() != states, _difference(before, _looks(model))
        found = []
        for batch in batches:
            model.zero_grad()
            torch.manual_seed(0)
            loss = pipe.step(**batch, **({} if target is None else {"target": target}))
            found.append((loss, _gradients(model)))
    except pe.PipeEngineError as error:
        changed = _difference(before, _looks(model))
        if changed:
            return "model changed", f"{changed}, after {type(error).__name__}: {error}"
        refused = isinstance(error, (pe.CaptureError, pe.InputError)) or "PartitionError" in type(error).__name__
        return ("refused" if refused else "crashed"), f"{type(error).__name__}: {error}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "crashed", f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
    if moved or changed:
        return ("random state moved", "") if moved else ("model changed", changed)
    return _numbers(expected, again, found)


def _numbers(expected: list, again: list, found: list) -> tuple[str, str]:
    floor = max((float(g.abs().max()) for _, grads in expected for g in grads.values() if g.numel()), default=1.0)
    noise, _ = _worst(expected, again, floor)
    worst, where = _worst(expected, found, floor)
    if noise > 1e-3 and worst > 1e-4:
        return "random", f"{noise:.1g} between two runs of eager"
    verdict = "equal" if worst == 0 else "within 1e-6" if worst <= 1e-6 else "rounding" if worst <= 1e-4 \
        else "silently different"
    return verdict, f"{worst:.2g} at {where}"


def _worst(expected: list, found: list, floor: float) -> tuple[float, str]:
    worst, where = 0.0, ""
    for number, ((loss, grads), (own_loss, own_grads)) in enumerate(zip(expected, found, strict=True)):
        missing = {name for name in set(grads) ^ set(own_grads)
                   if float((grads.get(name, own_grads.get(name))).abs().sum()) > 0}
        if missing:
            return float("inf"), f"batch {number}: gradient of {min(missing)} on one side only"
        pairs = [("the loss", loss, own_loss, max(abs(float(loss)), 1e-6))]
        pairs += [(name, grads[name], own_grads[name], max(float(grads[name].abs().max()), 1e-3 * floor))
                  for name in grads if name in own_grads and grads[name].numel()]
        for name, one, other, scale in pairs:
            off = float((one - other).abs().max()) / scale
            if not off <= worst:
                worst, where = off if off == off else float("inf"), f"batch {number}: {name}"
    return worst, where


def _looks(model: torch.nn.Module) -> dict:
    """What a user could see of a model: modules, their plain attributes, and the numbers in its tensors."""
    found: dict[str, object] = {f"tensor {name}": (id(t), t.detach().clone(), t.requires_grad)
                                for name, t in (*model.named_parameters(), *model.named_buffers())}
    for path, module in model.named_modules():
        found[f"module {path}"] = (type(module).__name__, module.training)
        found |= {f"attribute {path}.{name}": value for name, value in vars(module).items()
                  if isinstance(value, (int, float, str, bool, type(None))) and name != "_is_hf_initialized"}
    return found


def _difference(before: dict, after: dict) -> str:
    for name in {**before, **after}:
        one, other = before.get(name, "missing"), after.get(name, "missing")
        if isinstance(one, tuple) and len(one) == 3 and isinstance(other, tuple):
            if one[0] != other[0] or one[2] != other[2] or not torch.equal(one[1], other[1]):
                return name
        elif one != other and one == one:
            return f"{name}: {one} became {other}"
    return ""


def _random_states() -> tuple:
    return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()


if __name__ == "__main__":
    main()
