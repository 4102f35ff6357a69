"""Write train.bin and val.bin, token files of bare uint16 numbers: bytes of Python's own source code.

    python examples/nanogpt/prepare.py data
"""
import sys
import sysconfig
from pathlib import Path

import numpy

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data")
folder.mkdir(parents=True, exist_ok=True)
sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
tokens = numpy.frombuffer(b"".join(path.read_bytes() for path in sources), dtype=numpy.uint8).astype(numpy.uint16)
split = len(tokens) * 9 // 10
tokens[:split].tofile(folder / "train.bin")
tokens[split:].tofile(folder / "val.bin")
print(f"{split:,} tokens in {folder}/train.bin, {len(tokens) - split:,} in {folder}/val.bin")
