"""A Hugging Face model in an ordinary training loop, over as many workers as there are processes.

    torchrun --standalone --nproc_per_node 2 examples/huggingface.py

Two lines differ from the loop for one process; both are marked. The model is a Llama with random weights, so that the
example needs no download; `from_pretrained` in its place works the same. Batches are padded to their longest sequence,
so nearly every batch has another shape.
"""
import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from source_text import Vocabulary, standard_library
from transformers import LlamaConfig, LlamaForCausalLM

import pipeengine as pe


def padded_batches(tokens: torch.Tensor, rows: int, num_batches: int, seed: int = 0):
    """Sequences of 16 to 48 tokens, padded on the right; padding is masked and has no label."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches):
        lengths = torch.randint(16, 49, (rows,), generator=generator)
        starts = torch.randint(len(tokens) - 48, (rows,), generator=generator)
        places = torch.arange(int(lengths.max()))
        real = places < lengths[:, None]
        input_ids = tokens[starts[:, None] + places].masked_fill(~real, 0)
        yield dict(input_ids=input_ids, attention_mask=real.long(), labels=input_ids.masked_fill(~real, -100))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--folder", default="runs/llama", help="where the weights go")
    options = parser.parse_args()

    text = standard_library(1_000_000)
    vocabulary = Vocabulary(text, num_tokens=2048)
    data = list(padded_batches(vocabulary.encode(text), rows=16, num_batches=options.steps))
    config = LlamaConfig(vocab_size=len(vocabulary), hidden_size=options.width, intermediate_size=3 * options.width,
                         num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)

    model = pe.Pipeline(model, data[0], num_microbatches=4, schedule="1f1b")    # changed: this line is new
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for step, batch in enumerate(data):
        loss = model.step(**batch)              # changed: was loss = model(**batch).loss; loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if first_worker() and step % 10 == 0:
            print(f"step {step:4d}   tokens {tuple(batch['input_ids'].shape)}   loss {loss:.4f}", flush=True)

    model.save_weights(options.folder)
    if first_worker():
        config.save_pretrained(options.folder)
        again = LlamaForCausalLM.from_pretrained(options.folder)
        print(f"{options.folder} holds {len(list(Path(options.folder).glob('*.safetensors')))} files of weights; "
              f"from_pretrained read them, loss of the last batch {again(**data[-1]).loss.item():.4f}")


def first_worker() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


if __name__ == "__main__":
    main()
