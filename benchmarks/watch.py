"""What it costs to look, before every step, at what the forward and the loss read from Python, at modes and hooks, and
at the batch.

    python benchmarks/watch.py

Models of about a thousand modules, batches of token ids; the minimum counts. The budget of the first is 2 % of a step
of 10 ms.
"""
import argparse
from time import perf_counter

import torch
from torch import nn

import pipeengine as pe
from pipeengine.data.checksum import checksum
from pipeengine.tracing import ModelFlags, PythonWatch

STEP_SECONDS = 0.01


class Block(nn.Module):
    """Reads six plain values and a config at each call."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.linear, self.norm, self.config = nn.Linear(4, 4), nn.LayerNorm(4), config
        self.scale, self.heads, self.mode, self.drop, self.causal, self.window = 1.0, 2, "soft", 0.0, True, None

    def forward(self, x):
        if self.config.flag or self.mode != "soft" or self.window or self.drop or not self.causal:
            x = -x
        return x + self.scale * self.linear(self.norm(x)) * self.heads


class Config:
    """One object that every block reads."""

    def __init__(self) -> None:
        self.flag = False


class Blocks(nn.Module):
    """Three modules a block."""

    def __init__(self, count: int) -> None:
        super().__init__()
        config = Config()
        self.blocks = nn.ModuleList(Block(config) for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def llama(layers: int) -> tuple[nn.Module, dict]:
    """Thirteen modules a layer."""
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=layers,
                         num_attention_heads=2, num_key_value_heads=1)
    tokens = torch.randint(0, 32, (1, 4))
    return LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}


def best(what, seconds: float) -> float:
    """Minimum seconds of ``what()``."""
    found, stop = float("inf"), perf_counter() + seconds
    while perf_counter() < stop:
        start = perf_counter()
        what()
        found = min(found, perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2, help="how long to measure each model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("model    modules  places  look us  flags us  of a 10 ms step")
    for name, (model, example) in {"blocks": (Blocks(333), {"x": torch.randn(1, 4)}), "llama": llama(77)}.items():
        recording = pe.capture(model, example)
        watch = PythonWatch()
        watch.add(recording.python)
        seconds = best(watch.look, options.seconds)
        assert watch.look() == 0, "nothing has changed"
        flags = best(ModelFlags(model).now, options.seconds)
        print(f"{name:8s} {sum(1 for _ in model.modules()):7d} {len(recording.python.entries):7d} {1e6 * seconds:8.1f} "
              f"{1e6 * flags:9.1f} {(seconds + flags) / STEP_SECONDS:16.2%}")
    print("digest of a batch of  us  us per MB")
    for megabytes in (0.004, 0.26, 104):
        tokens = torch.randint(0, 50_000, (int(megabytes * 1e6) // 8,))
        seconds = best(lambda: checksum(tokens), options.seconds)
        print(f"{megabytes:17g} MB {1e6 * seconds:6.1f} {1e6 * seconds / megabytes:10.1f}")


if __name__ == "__main__":
    main()
