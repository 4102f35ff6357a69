"""The loop of a training in float16, as users write it."""
import torch


def train(pipe, batch: dict, optimizer, scaler, steps: int, device: str = "cpu") -> tuple[list, list]:
    """Losses, and the scales after each step."""
    losses, scales = [], []
    for _ in range(steps):
        with torch.autocast(device, torch.float16):
            losses.append(float(pipe.step(**batch, scaler=scaler)))
        scaler.unscale_(optimizer)
        pipe.clip_grad_norm_(1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return losses, scales
