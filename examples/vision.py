"""A vision transformer on images, with accuracy on held-out rows.

    torchrun --standalone --nproc_per_node 2 examples/vision.py
    python examples/vision.py                                       # both stages in this process
"""
import os
import sys

import torch
from transformers import ViTConfig, ViTForImageClassification

import pipeengine as pe


def images(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Noise in which one colour is brighter; the label is which. Your data goes here."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    pixels = torch.randn(count, 3, 32, 32, generator=generator)
    for row, label in zip(pixels, labels.tolist()):
        row[label] += 1.0
    return dict(pixel_values=pixels, labels=labels)


def main(steps: int) -> None:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8,
        num_labels=3))
    batch = images(32, seed=0)
    pipe = pe.Pipeline(model, batch, num_microbatches=4, costs="analytic",
                       num_stages=None if "RANK" in os.environ else 2)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=3e-3)
    for step in range(steps):
        loss = pipe.step(**images(32, seed=step))
        optimizer.step()
        optimizer.zero_grad()
        if pipe.is_first_worker:
            print(f"step {step}  loss {float(loss):.4f}", flush=True)
    held_out = images(64, seed=1_000_000)
    pipe.eval()
    logits = pipe.evaluate(**held_out, gather=True).logits
    if pipe.is_first_worker:
        print(f"accuracy {float((logits.argmax(-1) == held_out['labels']).float().mean()):.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
