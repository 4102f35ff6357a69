"""How long it takes, and how much memory, to record and plan a Llama of 70 billion parameters that nobody has loaded.

    python benchmarks/capture.py [--stages 16]

The model is on the meta device, so that it takes no memory; costs are analytic.
"""
import argparse
import json
import resource
import subprocess
import sys
import warnings
from time import perf_counter

LLAMA_70B = dict(hidden_size=8192, num_hidden_layers=80, intermediate_size=28672, num_attention_heads=64,
                 num_key_value_heads=8, vocab_size=128256)


def plan(stages: int, length: int) -> dict:
    """Seconds of each part, and the peak resident bytes of this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import pipeengine as pe
    from pipeengine.costs.cost_graph import cost_graph
    from pipeengine.costs.roofline import analytic
    from pipeengine.tracing.dataflow import analyse

    def resident() -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    imported, start = resident(), perf_counter()
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_70B))
    tokens = torch.zeros(1, length, dtype=torch.int64)
    made = perf_counter()
    recording = pe.capture(model, {"input_ids": tokens, "labels": tokens})
    recorded = perf_counter()
    flow = analyse(recording, outputs=False)
    graph = cost_graph(flow, analytic(flow))
    priced = perf_counter()
    found = pe.partition(graph, stages, num_microbatches=4 * stages, prefer_single_tensor=0.05, bandwidth=25e9)
    done = perf_counter()
    return {"parameters": sum(p.numel() for p in model.parameters()), "nodes": len(graph), "imports": imported,
            "bytes": resident(), "model": made - start, "capture": recorded - made, "costs": priced - recorded,
            "plan": done - priced, "gap": found.gap, "balance": max(s.load for s in found.stages) * stages
            / sum(s.load for s in found.stages)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="*", default=[2, 8, 16])
    parser.add_argument("--length", type=int, default=2048, help="tokens in a micro-batch")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        warnings.simplefilter("ignore")
        print(json.dumps(plan(options.worker, options.length)))
        return
    print("stages  nodes  model s  capture s  costs s  plan s  total s  peak RSS GB  imports GB  largest / mean  gap")
    for stages in options.stages:
        command = [sys.executable, __file__, "--worker", str(stages), "--length", str(options.length)]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        total = sum(row[name] for name in ("model", "capture", "costs", "plan"))
        print(f"{stages:6d} {row['nodes']:6d} {row['model']:8.2f} {row['capture']:10.2f} {row['costs']:8.2f} "
              f"{row['plan']:7.2f} {total:8.2f} {row['bytes'] / 1e9:12.2f} {row['imports'] / 1e9:11.2f} "
              f"{row['balance']:15.3f} {row['gap']:6.2%}")


if __name__ == "__main__":
    main()
