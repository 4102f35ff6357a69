"""Plan a model of 70 billion parameters for machines one does not have: no weights, no GPU, under a minute.

    python examples/plan_offline.py

Builds a Llama from its config on meta (no memory), records it, estimates what every operation would take on the
device described below, cuts it into stages, and simulates schedules on that cut. `Pipeline(model, batch,
plan="plan.json", ...)` trains with the plan later, on the machines.
"""
import argparse
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pipeengine as pe
from partitioners import MemoryModel

# What kernels really reach on the device, not what its data sheet says.
DEVICE = pe.DeviceDescription(flops_per_second=4e14, bytes_per_second=2e12, seconds_per_operation=5e-6)
BANDWIDTH, LATENCY = 25e9, 1e-5         # of the link between two devices: bytes per second, seconds


def llama_70b(num_layers: int) -> torch.nn.Module:
    """On meta, in bfloat16."""
    config = LlamaConfig(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_attention_heads=64,
                         num_key_value_heads=8, num_hidden_layers=num_layers, max_position_embeddings=8192)
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--stages", type=int, default=16)
    parser.add_argument("--microbatches", type=int, default=64)
    parser.add_argument("--length", type=int, default=4096, help="tokens in a sequence; one sequence per micro-batch")
    parser.add_argument("--output", default="runs/llama-70b/plan.json")
    options = parser.parse_args()

    start = time.perf_counter()
    model = llama_70b(options.layers)
    tokens = torch.zeros(options.microbatches, options.length, dtype=torch.int64)
    graph = pe.profile(model, dict(input_ids=tokens, labels=tokens), num_microbatches=options.microbatches,
                       costs=DEVICE)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(graph):,} nodes "
          f"after {time.perf_counter() - start:.1f} s", flush=True)
    plan = pe.partition(graph, options.stages, bandwidth=BANDWIDTH, latency=LATENCY,
                        num_microbatches=options.microbatches, memory_model=MemoryModel(schedule="1f1b"))
    print(plan)
    print(f"planned after {time.perf_counter() - start:.1f} s")
    for boundary in plan.boundaries:
        print(f"stage {boundary.source} -> {boundary.target}: {', '.join(boundary.values)}, "
              f"{boundary.bytes:,} bytes per micro-batch")

    costs = pe.Costs(forward=[stage.forward for stage in plan.stages],
                     backward=[stage.backward for stage in plan.stages],
                     hop=LATENCY, bandwidth=BANDWIDTH,
                     edge_bytes={(edge.source, edge.target): edge.bytes for edge in plan.boundaries})
    for name in ("gpipe", "1f1b", "zb-h1"):
        timeline = pe.simulate(pe.build(name, num_workers=options.stages, num_microbatches=options.microbatches), costs)
        print(f"{name:6}: {timeline.makespan:6.2f} s per step, {tokens.numel() / timeline.makespan:9,.0f} tokens/s")
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    plan.save(options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
