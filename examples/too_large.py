"""A model whose training needs more memory than a process may have: one process fails, four train it.

    python examples/too_large.py          # Linux; starts the processes itself

Every process may take up half of what training the whole model needs, on top of what it holds after its imports
(RLIMIT_DATA). The single process builds the model and runs out of memory in its first step. The four workers start
from a model without memory (on meta), and each makes only the weights of its own stage.
"""
import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import pipeengine as pe

WIDTH, NUM_BLOCKS, NUM_TOKENS = 512, 16, 512
SHARE = 0.5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 6 * WIDTH), nn.GELU(), nn.Linear(6 * WIDTH, WIDTH))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(NUM_TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.head = nn.Linear(WIDTH, NUM_TOKENS)

    def forward(self, tokens, targets):
        x = self.token(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def bytes_to_train() -> int:
    """Parameters, their gradients and AdamW's two averages."""
    with torch.device("meta"):
        return 4 * sum(parameter.numel() * parameter.element_size() for parameter in Model().parameters())


def limit_memory(more: int) -> None:
    """Allow this process ``more`` bytes of writable memory on top of what it has now."""
    status = Path("/proc/self/status").read_text()
    now = int(status.split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (now + more, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def batch() -> dict:
    tokens = torch.randint(0, NUM_TOKENS, (8, 17), generator=torch.Generator().manual_seed(0))
    return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:])


def train_plain(steps: int) -> None:
    """One process, plain PyTorch."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(steps):
        model(**batch()).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_pipeline(steps: int) -> None:
    """One of several workers; no process ever holds the whole model."""
    with torch.device("meta"):
        model = Model()
    pipe = pe.Pipeline(model, batch(), num_microbatches=4, schedule="1f1b")
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-4)
    for step in range(steps):
        loss = pipe.step(**batch())
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"    step {step}   loss {loss:.4f}", flush=True)


def start(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def compare(steps: int) -> int:
    """Run both, each under the same limit; 0 if one process fails for memory and four train."""
    need, script = bytes_to_train(), str(Path(__file__).resolve())
    print(f"training needs {need:,} bytes for weights, gradients and AdamW; "
          f"each process may take {int(SHARE * need):,} bytes more than it starts with")
    alone = start(script, "--as", "plain", "--steps", str(steps))
    out_of_memory = alone.returncode != 0 and ("allocate memory" in alone.stdout or "MemoryError" in alone.stdout)
    print("one process:", "out of memory, as expected" if out_of_memory else f"unexpected:\n{alone.stdout}")
    together = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4", script,
                     "--as", "worker", "--steps", str(steps))
    print("four processes:", "trained" if together.returncode == 0 else "failed")
    print(together.stdout.rstrip())
    return 0 if out_of_memory and together.returncode == 0 else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--as", dest="role", choices=("both", "plain", "worker"), default="both",
                        help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "both":
        sys.exit(compare(options.steps))
    torch.set_num_threads(1)
    limit_memory(int(SHARE * bytes_to_train()))
    {"plain": train_plain, "worker": train_pipeline}[options.role](options.steps)


if __name__ == "__main__":
    main()
