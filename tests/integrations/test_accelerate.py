"""The loop of docs/huggingface.md on two workers, one pipeline or two replicas, against one plain process."""
import os

import pytest
import torch
from workers import launch

pytest.importorskip("accelerate")

STEPS = 6


def parts(batch_size: int = 4):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True))
    tokens = torch.randint(64, (4 * STEPS, 12), generator=torch.Generator().manual_seed(1))
    data = [dict(input_ids=row, labels=row) for row in tokens]
    return model, torch.utils.data.DataLoader(data, batch_size=batch_size, shuffle=False)


def loop(report) -> None:
    import torch.distributed as dist

    import pipeengine as pe
    from pipeengine.integrations.huggingface import PipelineAccelerator
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    for replicas in (1, 2):
        model, loader = parts(4 // replicas)
        accelerator = PipelineAccelerator(cpu=True, num_replicas=replicas)
        pipe = pe.Pipeline(model, next(iter(loader)), num_microbatches=2, costs="analytic", check=False,
                           num_replicas=replicas)
        assert (accelerator.num_processes, accelerator.process_index) == (replicas, pipe.replica)
        report(replicas, train(accelerator, pipe, loader))
        assert accelerator.is_main_process == (dist.get_rank() == 0)
        shares = accelerator.gather(torch.tensor([pipe.replica])).tolist()
        total = float(accelerator.reduce(torch.tensor(1.0 + pipe.replica)))
        assert (shares, total) == (([0], 1.0) if replicas == 1 else ([0, 1], 3.0))
        pipe.close()


def train(accelerator, pipe, loader) -> list[float]:
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
    optimizer, loader, scheduler = accelerator.prepare(optimizer, loader, scheduler)
    losses = []
    for batch in loader:
        losses.append(float(pipe.step(**batch)))
        pipe.clip_grad_norm_(1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses


def test_five_changed_lines():
    model, loader = parts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
    expected = []
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        expected.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    reports = launch(2, loop)
    for replicas in (1, 2):
        assert reports[0][replicas] == reports[1][replicas] == pytest.approx(expected, abs=1e-5)
    assert len(expected) == STEPS
