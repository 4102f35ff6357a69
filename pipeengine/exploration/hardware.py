"""The devices that are there, and what messages and sums between them take. Seconds and bytes."""
from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from partitioners import Link


@dataclass(frozen=True)
class Hardware:
    """``num_devices`` equal devices, ``node_size`` to a machine, with fast links ``inside`` it and slower ones
    ``between``, each as one device sends in one direction.

    ``memory`` is bytes per device (None: no limit); ``memory_rate`` the bytes per second of that memory, for the
    optimizer's step (None: it is not counted); ``peak_flops`` what the datasheet promises per second and device.
    """

    num_devices: int
    memory: float | None = None
    inside: Link = Link()
    between: Link = Link()
    node_size: int | None = None
    memory_rate: float | None = None
    peak_flops: float | None = None

    def device_of(self, replica: int, worker: int, num_replicas: int, num_workers: int, near: str) -> int:
        """The device of a worker. ``near`` says which are numbered next to each other: a pipeline's ``"stages"``, or
        the ``"replicas"`` of a worker."""
        return replica * num_workers + worker if near == "stages" else worker * num_replicas + replica

    def links(self, num_replicas: int, num_workers: int, near: str) -> tuple[list[list[Link]], list[Link]]:
        """The slowest link, over all replicas, from each worker to each other; and that among a worker's replicas."""
        size = self.node_size or self.num_devices
        node = np.array([[self.device_of(replica, worker, num_replicas, num_workers, near) // size
                          for worker in range(num_workers)] for replica in range(num_replicas)])
        apart = (node[:, :, None] != node[:, None, :]).any(axis=0)
        spread = (node != node[0]).any(axis=0)
        return ([[self.between if far else self.inside for far in row] for row in apart.tolist()],
                [self.between if far else self.inside for far in spread.tolist()])

    def scaled(self, *, memory: float = 1.0, bandwidth: float = 1.0) -> Hardware:
        """The same devices with so many times the memory, or links so many times as fast."""
        def faster(link: Link) -> Link:
            return replace(link, bandwidth=link.bandwidth and link.bandwidth * bandwidth)
        return replace(self, memory=self.memory and self.memory * memory, inside=faster(self.inside),
                       between=faster(self.between))


def reduce_seconds(num_bytes: float, num_replicas: int, link: Link) -> float:
    """Seconds to sum ``num_bytes`` of gradients over a ring of replicas (reduce-scatter, then all-gather)."""
    if num_replicas == 1:
        return 0.0
    steps = 2 * (num_replicas - 1)
    return link.seconds(steps / num_replicas * num_bytes, steps)
