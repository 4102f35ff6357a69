"""Train a GPT in one process: memory-mapped data, warm-up and cosine, clipping, evaluation, checkpoints, resume.

    python examples/nanogpt/prepare.py data
    python examples/nanogpt/train.py --data data --out runs/nanogpt
"""
import argparse
import math
import os
from pathlib import Path

import numpy
import torch
from model import GPT

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name, default in dict(data="data", out="runs/nanogpt").items():
    parser.add_argument(f"--{name}", type=Path, default=default, help="a folder (default: %(default)s)")
for name, default in dict(max_steps=200, warmup_steps=20, eval_every=50, eval_batches=4, save_every=50, batch=16,
                          length=64, vocabulary=256, width=128, blocks=6, heads=4, seed=0).items():
    parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="(default: %(default)s)")
for name, default in dict(lr=1e-3, min_lr=1e-4, clip=1.0, decay=0.1, dropout=0.0).items():
    parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=default, help="(default: %(default)s)")
args = parser.parse_args()
say = print if int(os.environ.get("RANK", "0")) == 0 else lambda *words: None


def get_batch(split: str, number: int):
    """Batch ``number`` of a split: random windows, the same for a number, so that a resumed run sees what is next."""
    data = numpy.memmap(args.data / f"{split}.bin", dtype=numpy.uint16, mode="r")
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + number)
    starts = torch.randint(len(data) - args.length, (args.batch,), generator=generator).tolist()
    windows = torch.stack([torch.from_numpy(data[i:i + args.length + 1].astype(numpy.int64)) for i in starts])
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine down to ``min_lr``."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (args.lr - args.min_lr)


@torch.no_grad()
def estimate_loss() -> dict[str, float]:
    """The mean loss of some batches of both splits, without dropout."""
    model.eval()
    means = {}
    for split in ("train", "val"):
        losses = [model(*get_batch(split, -1 - k))[1].item() for k in range(args.eval_batches)]
        means[split] = sum(losses) / len(losses)
    model.train()
    return means


torch.manual_seed(args.seed)
model = GPT(args.vocabulary, args.length, args.width, args.blocks, args.heads, args.dropout)
decayed = [p for p in model.parameters() if p.dim() >= 2]
others = [p for p in model.parameters() if p.dim() < 2]
optimizer = torch.optim.AdamW([dict(params=decayed, weight_decay=args.decay), dict(params=others, weight_decay=0.0)],
                              lr=args.lr, betas=(0.9, 0.95))
args.out.mkdir(parents=True, exist_ok=True)
first, saved = 0, args.out / "checkpoint.pt"
if saved.exists():
    state = torch.load(saved)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    first = state["step"]
    say(f"going on at step {first}")

for step in range(first, args.max_steps):
    if step % args.eval_every == 0:
        means = estimate_loss()
        say(f"step {step}: train loss {means['train']:.7f}, val loss {means['val']:.7f}")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step)
    x, y = get_batch("train", step)
    _, loss = model(x, y)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    say(f"iter {step}: loss {loss.item():.7f}, norm {norm.item():.7f}")
    if (step + 1) % args.save_every == 0 or step + 1 == args.max_steps:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, saved)
say(f"done: {estimate_loss()}")
