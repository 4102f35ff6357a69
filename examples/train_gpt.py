"""Train a GPT on the source of Python's standard library, over as many workers as there are processes.

    pipeengine launch --workers 2 examples/train_gpt.py         # two workers; `make train`; or with torchrun
    python examples/train_gpt.py --stages 2                     # both stages in this process

Stopped with Ctrl-C (or killed) and started again, it goes on where its last checkpoint ends; remove the folder to begin
anew.

The model is ordinary PyTorch and knows nothing of the pipeline. Its vocabulary of 8,192 tokens makes the last layer as
heavy as several blocks, so that equal numbers of blocks would leave one worker waiting for the other.
"""
import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from source_text import Vocabulary, Windows, standard_library
from torch import nn

import pipeengine as pe


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                 for part in self.query_key_value(self.norm_1(x)).chunk(3, dim=-1)]
        attended = F.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self, num_tokens: int, width: int, num_blocks: int, heads: int, length: int):
        super().__init__()
        self.token = nn.Embedding(num_tokens, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_tokens, bias=False)
        self.apply(self._initialise)

    def _initialise(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens, targets):
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="how long to train, this time")
    parser.add_argument("--steps", type=int, default=10_000, help="steps of the whole training")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--characters", type=int, default=8_000_000, help="how much text")
    parser.add_argument("--stages", type=int, help="as many as workers, unless given")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--folder", default="runs/gpt", help="where checkpoints, metrics and report go")
    parser.add_argument("--save-every", default="60s", help="steps, or a time such as 5min")
    parser.add_argument("--tracker", action="append", default=[], help="tensorboard, comet_ml, mlflow or wandb")
    return parser.parse_args()


def say(*words) -> None:
    """Print on one worker only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*words, flush=True)


def train(run, pipe, windows, optimizer, scheduler, options) -> None:
    """The ordinary loop: step, clip, optimizer, schedule."""
    for _ in run.steps(options.steps, options.seconds):
        loss = pipe.step(**next(windows))
        pipe.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        run.log(loss=loss, lr=scheduler.get_last_lr()[0])


def main() -> None:
    options = arguments()
    text = standard_library(options.characters)
    vocabulary = Vocabulary(text)
    tokens = vocabulary.encode(text)
    held_out = len(tokens) // 20
    torch.manual_seed(0)
    model = GPT(len(vocabulary), options.width, options.blocks, heads=options.width // 32, length=options.length)
    windows = Windows(tokens[:-held_out], options.rows, options.length)

    pipe = pe.Pipeline(model, windows.batch(0), num_microbatches=options.microbatches, schedule=options.schedule,
                       num_stages=options.stages)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    say(f"{len(tokens):,} tokens of text, vocabulary of {len(vocabulary):,}, {size / 1e6:.0f} MB of parameters")
    say(pipe.plan)

    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    save_every = int(options.save_every) if options.save_every.isdigit() else options.save_every
    with pe.Run(options.folder, pipe, optimizer=optimizer, scheduler=scheduler, windows=windows, save_every=save_every,
                trackers=options.tracker, config=vars(options)) as run:
        train(run, pipe, windows, optimizer, scheduler, options)
        test = Windows(tokens[-held_out:], options.rows, options.length, seed=1).batch(0)
        pipe.eval()
        test_loss = pipe.evaluate(**test, gather=True)
        run.log(test_loss=test_loss)
        say(f"loss on text it has not seen: {float(test_loss):.4f}")
        say(run.report())
    say(f"wrote {options.folder}/report.html and {options.folder}/trace.json (open it in https://ui.perfetto.dev)")


if __name__ == "__main__":
    main()
