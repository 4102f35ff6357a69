"""Text to train on that every machine has: the source of Python's standard library, cut into about 8,000 tokens."""
import re
import sysconfig
from collections import Counter
from pathlib import Path

import torch

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "idlelib", "lib2to3"}
PIECE = re.compile(r"\n *| ?_*[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]+|\s")


def standard_library(num_characters: int = 8_000_000) -> str:
    """The start of the standard library's source, file by file in the order of their paths."""
    root, parts, missing = Path(sysconfig.get_path("stdlib")), [], num_characters
    for path in sorted(root.rglob("*.py")):
        if missing > 0 and not LEFT_OUT & set(path.relative_to(root).parts):
            parts.append(path.read_text(encoding="utf-8", errors="replace")[:missing])
            missing -= len(parts[-1])
    return "".join(parts)


class Vocabulary:
    """Tokens for text: the commonest words and signs, parts of rarer words, and single bytes for the rest.

    Tokens 0 to 255 are bytes, so that any text can be written. The vocabulary follows from the text alone.
    """

    def __init__(self, text: str, num_tokens: int = 8192):
        counts = Counter(PIECE.findall(text))
        common = sorted(counts, key=lambda piece: (-counts[piece], piece))[:num_tokens - 256]
        self.pieces = [bytes([i]) for i in range(256)] + [piece.encode() for piece in common]
        self._tokens = {piece: (256 + i,) for i, piece in enumerate(common)}
        self._words = set(common)

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> torch.Tensor:
        """The tokens of ``text``, one int64 each."""
        known, found = self._tokens, []
        for piece in PIECE.findall(text):
            tokens = known.get(piece)
            if tokens is None:
                tokens = known[piece] = self._spell(piece)
            found.extend(tokens)
        return torch.tensor(found)

    def decode(self, tokens: torch.Tensor) -> str:
        """The text of ``tokens``."""
        return b"".join(self.pieces[token] for token in tokens.tolist()).decode(errors="replace")

    def _spell(self, word: str) -> tuple[int, ...]:
        """A rare word as the longest known beginning, then the rest; a single strange character as its bytes."""
        tokens: tuple[int, ...] = ()
        while word:
            end = next((end for end in range(len(word), 0, -1) if word[:end] in self._words), 0)
            tokens += self._tokens[word[:end]] if end else tuple(word[0].encode())
            word = word[end or 1:]
        return tokens


class Windows:
    """Endless random windows of ``tokens``; the same on every worker for the same ``seed``.

    Batch ``n`` follows from the seed and ``n`` alone, so that the state is one integer.
    """

    def __init__(self, tokens: torch.Tensor, rows: int, length: int, seed: int = 0):
        self.tokens, self.rows, self.length, self.seed, self.number = tokens, rows, length, seed, 0

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        """One batch by its number."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        starts = torch.randint(len(self.tokens) - self.length, (self.rows,), generator=generator)
        windows = torch.stack([self.tokens[start:start + self.length + 1] for start in starts])
        return dict(tokens=windows[:, :-1], targets=windows[:, 1:])

    def __next__(self) -> dict[str, torch.Tensor]:
        self.number += 1
        return self.batch(self.number - 1)

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]
