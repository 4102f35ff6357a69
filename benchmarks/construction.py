"""Seconds of each phase of making a pipeline: a GPT-2 with weights, Llamas of 1, 8 and 70 billion parameters without.

    OMP_NUM_THREADS=1 python benchmarks/construction.py [--stages 4] [--costs analytic]

A model with weights goes through `Pipeline(...)` to its end. One on the meta device goes as far as memory allows: it is
recorded, measured (or estimated) and planned, as every worker of a job does before it makes the weights of its stage.
Every row is a process of its own.
"""
import argparse
import json
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter

import torch

LLAMAS = {
    "llama-1b": dict(hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, num_attention_heads=32,
                     num_key_value_heads=8, vocab_size=128256),
    "llama-8b": dict(hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, num_attention_heads=32,
                     num_key_value_heads=8, vocab_size=128256),
    "llama-70b": dict(hidden_size=8192, num_hidden_layers=80, intermediate_size=28672, num_attention_heads=64,
                      num_key_value_heads=8, vocab_size=128256),
}
PHASES = ("model", "record", "costs", "plan", "stages", "check", "rest")


class Phases:
    """Seconds spent in named phases; what is inside another phase counts there alone."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._last = perf_counter()

    def _turn(self) -> None:
        now = perf_counter()
        self.seconds[self._open[-1] if self._open else "rest"] += now - self._last
        self._last = now

    def of(self, name: str, function: Callable) -> Callable:
        """``function``, its time counted under ``name``."""
        def timed(*args: object, **kwargs: object) -> object:
            self._turn()
            self._open.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._open.pop()
        return timed


def gpt2(options: argparse.Namespace) -> dict[str, float]:
    """All of a construction, in one process that holds every stage."""
    from transformers import GPT2Config, GPT2LMHeadModel

    import pipeengine as pe
    from pipeengine import assembly
    phases = Phases()
    model = phases.of("model", GPT2LMHeadModel)(GPT2Config())
    tokens = torch.zeros(4, options.length, dtype=torch.int64)
    for name, functions in {"record": ("record",), "costs": ("price", "price_modules"), "plan": ("make_plan",),
                            "stages": ("place", "settle"), "check": ("compare_two_microbatches",)}.items():
        for function in functions:
            setattr(assembly, function, phases.of(name, getattr(assembly, function)))
    pe.Pipeline(model, {"input_ids": tokens, "labels": tokens}, num_microbatches=4, num_stages=options.stages,
                costs=options.costs).close()
    phases.of("rest", lambda: None)()
    return dict(phases.seconds)


def llama(options: argparse.Namespace) -> dict[str, float]:
    """As far as a plan, without weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import pipeengine as pe
    from pipeengine.costs import analytic, cost_graph, measure
    from pipeengine.tracing import analyse
    phases = Phases()
    with torch.device("meta"):
        model = phases.of("model", LlamaForCausalLM)(LlamaConfig(**LLAMAS[options.worker]))
    tokens = torch.zeros(1, options.length, dtype=torch.int64)
    recording = phases.of("record", pe.capture)(model, {"input_ids": tokens, "labels": tokens})
    flow = phases.of("record", analyse)(recording, outputs=False)
    seconds = phases.of("costs", analytic)(flow) if options.costs == "analytic" else \
        phases.of("costs", measure)(flow, model, torch.device("cpu")).seconds
    graph = phases.of("costs", cost_graph)(flow, seconds)
    phases.of("plan", pe.partition)(graph, options.stages, num_microbatches=4 * options.stages, bandwidth=25e9,
                                    prefer_single_tensor=0.05, gap=0.01, time_limit=10)
    return dict(phases.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens in a row")
    parser.add_argument("--costs", choices=("analytic", "measured"), default="measured")
    parser.add_argument("--models", nargs="*", default=["gpt2", *LLAMAS])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        warnings.simplefilter("ignore")
        print(json.dumps((gpt2 if options.worker == "gpt2" else llama)(options)))
        return
    print("model      " + "".join(f"{name:>9}" for name in (*PHASES, "all but model")))
    for name in options.models:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        total = sum(seconds for phase, seconds in row.items() if phase != "model")
        print(f"{name:11}" + "".join(f"{row.get(phase, 0):9.2f}" for phase in PHASES) + f"{total:15.2f}", flush=True)


if __name__ == "__main__":
    main()
