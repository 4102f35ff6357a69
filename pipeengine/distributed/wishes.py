"""What workers ask of each other between two agreements, without a message of its own."""
from __future__ import annotations


class Wishes:
    """Bits that ride on the agreement before a step: what one worker asks for, all of them hear at the same place.

    ``ask`` may be called at any time, by a signal's handler too.
    """

    def __init__(self) -> None:
        self._asked: set[int] = set()
        self._heard = 0

    def ask(self, bit: int) -> None:
        """Ask for something by its bit (1, 2, 4, ...)."""
        self._asked.add(bit)

    def own(self) -> int:
        """The bits that this worker asks for."""
        return sum(tuple(self._asked))

    def hear(self, bits: int) -> None:
        """Note what some worker asks for; called at the same place on all of them."""
        self._heard |= bits

    def take(self, among: int = -1, *, alone: bool = False) -> int:
        """What has been heard since it was last taken, of the bits ``among``; it is not asked for any more. A worker
        that is ``alone`` hears itself at once."""
        if alone:
            self.hear(self.own())
        heard = self._heard & among
        self._heard &= ~heard
        for bit in tuple(self._asked):
            if bit & heard:
                self._asked.discard(bit)
        return heard
