"""Hooks on parameters see the gradient of the whole batch, as in one process, not those of its micro-batches."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def once_per_batch(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Inside, the hooks that ``parameters`` have (``register_hook``, ``register_post_accumulate_grad_hook``) wait; they
    run at the end, each once, the last parameter first.

    What a hook of the first kind is given is what has come inside, without what was in ``.grad`` before. After an
    error nothing runs, and gradients that were set aside are back.
    """
    hooked = [_Hooked(parameter) for parameter in parameters]
    try:
        yield
    except BaseException:
        for one in hooked:
            one.put_back()
        raise
    for one in reversed(hooked):
        one.finish()


class _Hooked:
    """One parameter without its hooks, until ``finish`` or ``put_back``."""

    def __init__(self, parameter: torch.nn.Parameter):
        self._parameter, self._before, parameter.grad = parameter, parameter.grad, None
        tables = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
        self._tables = [{} if table is None else table for table in tables]
        self._hooks = [dict(table) for table in self._tables]
        for table in self._tables:      # emptied, not taken off: autograd keeps the table itself
            table.clear()

    def put_back(self) -> None:
        """Hooks and gradient as they were."""
        self._parameter.grad = self._before
        for table, hooks in zip(self._tables, self._hooks):
            table.update(hooks)

    def finish(self) -> None:
        """What came, through the hooks, onto what was there."""
        parameter, came = self._parameter, self._parameter.grad
        self.put_back()
        if came is None:
            return
        on_gradient, on_accumulated = self._hooks
        for hook in on_gradient.values():
            changed = hook(came)
            came = came if changed is None else changed
        parameter.grad = came if self._before is None else self._before.add_(came)
        for hook in on_accumulated.values():
            hook(parameter)
