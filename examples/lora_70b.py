"""LoRA of a Llama of 70 billion parameters on four GPUs of 48 GB: planned from its config, run at a size that fits.

    python examples/lora_70b.py --plan                                      # a minute, on a laptop: how it fits
    torchrun --standalone --nproc_per_node 4 examples/lora_70b.py           # the same model, small, on four workers
    python examples/lora_70b.py                                             # and in one process

The frozen weights take 140 of the 192 GB in bfloat16 and have neither gradients nor optimizer state; adapters of rank
16 take 0.1.
"""
import argparse
import os

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import pipeengine as pe
from partitioners import MemoryModel
from pipeengine.integrations.huggingface import save_pretrained

GPU = pe.DeviceDescription(flops_per_second=2e14, bytes_per_second=7e11)        # what kernels reach, not the data sheet
LARGE = LlamaConfig(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                    num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=8192)
SMALL = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
                    num_key_value_heads=2)
ADAPTER = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
                     task_type="CAUSAL_LM")


def with_adapters(config: LlamaConfig, device: str) -> torch.nn.Module:
    """The frozen model with its adapters."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
        return get_peft_model(model.to(torch.bfloat16) if device == "meta" else model, ADAPTER)


def plan(microbatches: int, length: int, layers: int) -> None:
    """Where to cut, and what each GPU holds."""
    LARGE.num_hidden_layers = layers
    tokens = torch.zeros(microbatches, length, dtype=torch.int64)
    graph = pe.profile(with_adapters(LARGE, "meta"), dict(input_ids=tokens, labels=tokens),
                       num_microbatches=microbatches, costs=GPU)
    print(pe.partition(graph, 4, memory=47e9, bandwidth=2e10, num_microbatches=microbatches, recompute=True,
                       memory_model=MemoryModel(schedule="1f1b")))


def train(steps: int, microbatches: int, length: int) -> None:
    """Some steps on random rows; your loader goes here. Saves the adapter as PEFT does."""
    model = with_adapters(SMALL, "cpu")
    rows = torch.randint(256, (microbatches, length), generator=torch.Generator().manual_seed(0))
    pipe = pe.Pipeline(model, dict(input_ids=rows, labels=rows), num_microbatches=microbatches, recompute=True,
                       costs="analytic", num_stages=None if "RANK" in os.environ else 4)
    optimizer = torch.optim.AdamW([p for p in pipe.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        loss = pipe.step(input_ids=rows, labels=rows)
        optimizer.step()
        optimizer.zero_grad()
        if pipe.is_first_worker:
            print(f"step {step}  loss {float(loss):.4f}", flush=True)
    save_pretrained(pipe, "runs/lora")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="say how it fits, and train nothing")
    parser.add_argument("--layers", type=int, default=80, help="of the planned model")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    if options.plan:
        plan(options.microbatches, options.length, options.layers)
    else:
        train(options.steps, options.microbatches, options.length)
