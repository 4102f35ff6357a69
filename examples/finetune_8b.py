"""Full fine-tuning of a Llama of 8 billion parameters on two GPUs of 24 GB: what it needs, planned from its config.

    python examples/finetune_8b.py --plan                                           # seconds, on a laptop
    torchrun --standalone --nproc_per_node 2 examples/finetune_8b.py --weights llama-8b/    # on the two GPUs
    python examples/finetune_8b.py                                                  # the same, small, without a GPU

Weights and gradients in bfloat16 take 32 of the 48 GB, so AdamW's two moments (another 32) do not fit: Adafactor keeps
a row and a column of each matrix instead. Blocks run their forward again in backward, one row is a micro-batch.
"""
import argparse
import os

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.optimization import Adafactor

import pipeengine as pe
from partitioners import InfeasibleError, MemoryModel
from partitioners.graph import parameter_factor

GPU = pe.DeviceDescription(flops_per_second=1.2e14, bytes_per_second=8e11)      # what kernels reach, not the data sheet
LARGE = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192)
SMALL = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                    num_key_value_heads=2)


def plan(microbatches: int, length: int) -> None:
    """Where to cut for each optimizer, or why it does not fit."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LARGE).to(torch.bfloat16)
    tokens = torch.zeros(microbatches, length, dtype=torch.int64)
    graph = pe.profile(model, dict(input_ids=tokens, labels=tokens), num_microbatches=microbatches, costs=GPU)
    for optimizer in ("adamw", "adafactor"):
        needs = MemoryModel(parameter_factor(optimizer, bytes_per_weight=2.0), schedule="1f1b")
        try:
            found = pe.partition(graph, 2, memory=23e9, bandwidth=2e10, num_microbatches=microbatches, recompute=True,
                                 memory_model=needs)
            print(f"{optimizer} fits:\n{found}")
        except InfeasibleError as error:
            print(f"{optimizer} does not fit: {error}")


def train(weights: str | None, steps: int, microbatches: int, length: int) -> None:
    """Some steps on random rows; your loader goes here."""
    torch.manual_seed(0)
    with torch.device("meta" if weights else "cpu"):
        model = LlamaForCausalLM(LARGE if weights else SMALL)
    model = model.to(torch.bfloat16) if weights else model
    rows = torch.randint(256, (microbatches, length))
    pipe = pe.Pipeline(model, dict(input_ids=rows, labels=rows), num_microbatches=microbatches, weights=weights,
                       recompute=True, costs="analytic", num_stages=None if "RANK" in os.environ else 2)
    optimizer = Adafactor(pipe.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)
    for step in range(steps):
        loss = pipe.step(input_ids=rows, labels=rows)
        optimizer.step()
        optimizer.zero_grad()
        if pipe.is_first_worker:
            print(f"step {step}  loss {float(loss):.4f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="say what fits, and train nothing")
    parser.add_argument("--weights", help="a folder with the 8B model's weights; without it a small one is trained")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    options = parser.parse_args()
    if options.plan:
        plan(options.microbatches, options.length)
    else:
        train(options.weights, options.steps, options.microbatches, options.length)
