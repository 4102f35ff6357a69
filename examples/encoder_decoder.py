"""An encoder-decoder (T5) that learns to write its input backwards; padded rows, a tied embedding.

    torchrun --standalone --nproc_per_node 2 examples/encoder_decoder.py
    python examples/encoder_decoder.py                              # both stages in this process
"""
import os
import sys

import torch
from transformers import T5Config, T5ForConditionalGeneration

import pipeengine as pe


def sentences(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Rows of 3 to 8 tokens, padded; labels are the same backwards, -100 where there is nothing to say."""
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.zeros(count, 8, dtype=torch.int64), torch.full((count, 8), -100)
    for row in range(count):
        length = int(torch.randint(3, 9, (), generator=generator))
        tokens = torch.randint(2, 32, (length,), generator=generator)
        inputs[row, :length], labels[row, :length] = tokens, tokens.flip(0)
    return dict(input_ids=inputs, attention_mask=(inputs > 0).long(), labels=labels)


def main(steps: int) -> None:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4,
                                                decoder_start_token_id=0))
    batch = sentences(32, seed=0)
    pipe = pe.Pipeline(model, batch, num_microbatches=4, costs="analytic",
                       num_stages=None if "RANK" in os.environ else 2)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=3e-3)
    for step in range(steps):
        loss = pipe.step(**batch)
        optimizer.step()
        optimizer.zero_grad()
        if pipe.is_first_worker:
            print(f"step {step}  loss {float(loss):.4f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
