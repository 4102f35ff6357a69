"""The two halves of backward: what is kept between them, and how much of the second can wait.

    python benchmarks/halves.py

Per model, one stage and one micro-batch: M_B, the activations that a forward keeps; M_W, what is left of them and of
gradients once the input gradients are done (live tensor bytes, by the allocator's events); their ratio; and the share
of the seconds for weight gradients that waits until W. The seconds of the other weight gradients are those of I less
those of a backward in which no weight is trained; the processor's own time, least of several.
"""
import logging
import warnings
from collections.abc import Iterator
from itertools import accumulate
from time import thread_time
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import pipeengine as pe
from pipeengine.runtime import executor as engine

ROWS, LENGTH, TOKENS, IMAGE, REPEATS = 4, 64, 2000, 64, 6


class Encoder(nn.Module):
    """torch's own transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(TOKENS, 256), nn.Linear(256, TOKENS)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True) for _ in range(4))

    def forward(self, x, y):
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), y.flatten())


def models() -> Iterator[tuple[str, nn.Module, dict]]:
    """Small ones of each kind, untrained, with a micro-batch."""
    import transformers as t
    tokens, pixels = torch.randint(3, TOKENS, (ROWS, LENGTH)), torch.randn(ROWS, 3, IMAGE, IMAGE)
    text, image = {"input_ids": tokens, "labels": tokens}, {"pixel_values": pixels, "labels": torch.arange(ROWS)}
    yield "GPT-2", t.GPT2LMHeadModel(t.GPT2Config(n_layer=4, n_embd=256, n_head=8, vocab_size=TOKENS, bos_token_id=0,
                                                  eos_token_id=0)), text
    size = dict(num_hidden_layers=4, hidden_size=256, num_attention_heads=8)
    yield "Llama", t.LlamaForCausalLM(t.LlamaConfig(**size, intermediate_size=688, num_key_value_heads=4,
                                                    vocab_size=TOKENS)), text
    yield "BERT", t.BertForMaskedLM(t.BertConfig(**size, intermediate_size=1024, vocab_size=TOKENS)), text
    yield "T5", t.T5ForConditionalGeneration(t.T5Config(num_layers=3, d_model=256, d_ff=1024, num_heads=8, d_kv=32,
                                                        vocab_size=TOKENS, decoder_start_token_id=0)), text
    yield "Mixtral", t.MixtralForCausalLM(t.MixtralConfig(**size, intermediate_size=512, num_key_value_heads=4,
                                                          num_local_experts=4, vocab_size=TOKENS)), text
    yield "torch TransformerEncoder", Encoder(), {"x": tokens, "y": tokens}
    yield "ViT", t.ViTForImageClassification(t.ViTConfig(**size, intermediate_size=1024, image_size=IMAGE, patch_size=8,
                                                         num_labels=10)), image
    yield "ResNet", t.ResNetForImageClassification(t.ResNetConfig(num_labels=10, depths=[2, 2, 2, 2],
                                                                  layer_type="basic",
                                                                  hidden_sizes=[64, 128, 256, 512])), image
    yield "ConvNeXt", t.ConvNextForImageClassification(t.ConvNextConfig(num_labels=10, depths=[2, 2, 4, 2],
                                                                        hidden_sizes=[48, 96, 192, 384])), image


def bytes_kept(pipe: pe.Pipeline, batch: dict) -> tuple[int, int]:
    """Live bytes after F and after I, beyond those before."""
    do = pipe._runner.executor._do
    for op in "FI":
        def marked(*action: int, act=do[op], op=op) -> None:
            with record_function(f"mark {op} begins"):
                pass
            act(*action)
            with record_function(f"mark {op} ends"):
                pass
        do[op] = marked
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as seen:
        pipe.step(**batch)
    events = sorted(((e.start_ns(), e.name(), e.nbytes()) for e in seen.profiler.kineto_results.events()
                     if e.name() == "[memory]" or e.name().startswith("mark ")), key=lambda event: event[0])
    levels = accumulate(size if name == "[memory]" else 0 for _, name, size in events)
    at = {name: level for (_, name, _), level in zip(events, levels)}
    return at["mark F ends"] - at["mark F begins"], at["mark I ends"] - at["mark F begins"]


def seconds_of_halves(pipe: pe.Pipeline, batch: dict) -> tuple[float, float]:
    """The least seconds of I and of W."""
    least = {"I": float("inf"), "W": float("inf")}
    with mock.patch.object(engine, "perf_counter", thread_time):
        for _ in range(REPEATS):
            pipe.step(**batch)
            for op, _, _, start, end in pipe._runner.executor.records:
                if op in least:
                    least[op] = min(least[op], end - start)
    return least["I"], least["W"]


def seconds_of_inputs(model: nn.Module, batch: dict) -> float:
    """The least seconds of a backward without any weight; the first layer's output stands in for the input."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Embedding) or isinstance(module, nn.Conv2d) and module.in_channels == 3:
            module.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    least = float("inf")
    for _ in range(REPEATS):
        out = model(**batch)
        loss = out if isinstance(out, torch.Tensor) else out.loss
        start = thread_time()
        loss.backward()
        least = min(least, thread_time() - start)
    return least


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print("| model | M_B, MB | M_W, MB | M_W / M_B | seconds of weight gradients that wait |\n|---|---|---|---|---|")
    for name, model, batch in models():
        pipe = pe.Pipeline(model, batch, num_stages=1, schedule="zb-h1", costs="analytic", check=False)
        pipe.step(**batch)
        inputs, weights = seconds_of_halves(pipe, batch)
        held, kept = bytes_kept(pipe, batch)
        rest = max(inputs - seconds_of_inputs(model, batch), 0.0)
        print(f"| {name} | {held / 1e6:.1f} | {kept / 1e6:.1f} | {kept / held:.3f} | "
              f"{100 * weights / (weights + rest):.0f} % |", flush=True)


if __name__ == "__main__":
    main()
