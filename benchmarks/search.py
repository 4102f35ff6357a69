"""How far from the best the search's answers may be: 24 settings of eight models, 4 to 64 devices.

    python benchmarks/search.py [--only NAME] [--effort COUNT]

Costs are analytic, on the device named; nothing is run. ``gap`` is what is proved, over all cuts of all configurations.
"""
import argparse
import sys
from statistics import mean
from time import perf_counter

import torch
import transformers

import pipeengine as pe
from pipeengine.costs import describe, profile
from pipeengine.device_cards import device_card

LLAMA = dict(num_key_value_heads=8, vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=False)
MODELS = {
    "gpt2": (transformers.GPT2Config(), 1024),
    "gpt2-xl": (transformers.GPT2Config(n_embd=1600, n_layer=48, n_head=25), 1024),
    "llama-1b": (transformers.LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                                          num_attention_heads=32, **LLAMA), 4096),
    "llama-8b": (transformers.LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                          num_attention_heads=32, **LLAMA), 4096),
    "llama-70b": (transformers.LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                                           num_attention_heads=64, **LLAMA), 4096),
    "t5-large": (transformers.T5Config(d_model=1024, d_ff=4096, num_layers=24, num_heads=16,
                                       decoder_start_token_id=0), 512),
    "vit-large": (transformers.ViTConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                                         num_attention_heads=16), 0),
    "mixtral-small": (transformers.MixtralConfig(hidden_size=1024, intermediate_size=3584, num_hidden_layers=12,
                                                 num_attention_heads=16, num_key_value_heads=8, num_local_experts=4,
                                                 max_position_embeddings=2048), 1024),
}
KINDS = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "t5": "T5ForConditionalGeneration",
         "vit": "ViTForImageClassification", "mixtral": "MixtralForCausalLM"}
# model, device, how many, rows of a step
SETTINGS = (
    ("gpt2", "l4", 4, 64), ("gpt2", "rtx4090", 8, 128), ("gpt2", "h100", 16, 256),
    ("gpt2-xl", "l4", 4, 32), ("gpt2-xl", "rtx4090", 8, 64), ("gpt2-xl", "a100", 16, 256),
    ("llama-1b", "l4", 4, 16), ("llama-1b", "rtx4090", 8, 64), ("llama-1b", "h100", 16, 128),
    ("llama-8b", "a100", 8, 64), ("llama-8b", "h100", 16, 128), ("llama-8b", "mi300x", 32, 256),
    ("llama-70b", "h100", 16, 128), ("llama-70b", "h200", 32, 256), ("llama-70b", "h100", 64, 512),
    ("t5-large", "l4", 4, 64), ("t5-large", "rtx4090", 8, 128), ("t5-large", "a100", 16, 256),
    ("vit-large", "l4", 4, 256), ("vit-large", "rtx4090", 8, 512), ("vit-large", "a100", 16, 1024),
    ("mixtral-small", "l4", 4, 32), ("mixtral-small", "rtx4090", 8, 64), ("mixtral-small", "h100", 16, 256),
)


def graph_of(name: str, device: str):
    """The cost graph of one row in bfloat16."""
    config, length = MODELS[name]
    with torch.device("meta"):
        model = getattr(transformers, KINDS[name.split("-")[0]])._from_config(config, dtype=torch.bfloat16)
    if length:
        ids = torch.zeros(1, length, dtype=torch.int64)
        batch = {"input_ids": ids, "labels": ids}
    else:
        batch = {"pixel_values": torch.zeros(1, 3, config.image_size, config.image_size, dtype=torch.bfloat16),
                 "labels": torch.zeros(1, dtype=torch.int64)}
    return profile(model.train(), batch, num_microbatches=1, costs=describe(device_card(device), "bfloat16"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose names begin so")
    parser.add_argument("--effort", type=int, help="of each search, as pe.search counts it")
    args = parser.parse_args()
    more, gaps = ({"effort": args.effort} if args.effort else {}), []
    print(f"{'model':14} {'devices':>12} {'rows':>5} {'step':>9} {'gap':>7} {'search':>7}  configuration")
    for name, device, count, rows in (each for each in SETTINGS if each[0].startswith(args.only)):
        graph, started = graph_of(name, device), perf_counter()
        found = pe.search(graph, num_devices=count, device=device, node_size=8, rows=rows, **more)
        seconds = perf_counter() - started
        where = f"{name:14} {f'{count} x {device}':>12} {rows:5}"
        if found.best is None:
            print(f"{where} {'-':>9} {'-':>7} {seconds:6.1f}s  nothing fits")
            continue
        gaps.append(found.gap)
        told = found.best.configuration
        print(f"{where} {found.best.seconds:8.3g}s {found.gap:7.2%} {seconds:6.1f}s  {told.num_replicas} x "
              f"{told.num_workers} workers, {told.num_stages} stages, {told.num_microbatches} x {told.rows} rows, "
              f"{told.schedule}, {len(told.recompute)} again{', sharded' if told.shard else ''}", flush=True)
    print(f"mean gap {mean(gaps):.2%}, largest {max(gaps):.2%}, of {len(gaps)}" if gaps else "nothing fits")


if __name__ == "__main__":
    sys.exit(main())
