"""What travels between workers arrives as it was, and can run nothing."""
import math
import re
from pathlib import Path

import pytest
import torch

import pipeengine
from pipeengine.distributed.codec import decode, decode_or_raise, encode, encode_or_tell
from pipeengine.distributed.failure import Description
from pipeengine.errors import InputError, WorkerError

VALUES = [
    None, True, 3, -2 ** 70, 0.1, math.inf, "grüße", b"\x00\xff", 2 - 3j, torch.bfloat16,
    (1, [2, (3,)], {"a": None}), {1: "one", (2, "x"): [], None: {}}, [], (), {"tuple": [1]}, torch.Size([2, 3]),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_arrives_as_it_was(value):
    arrived = decode(encode(value))
    assert arrived == value and (type(arrived) is type(value) or isinstance(value, torch.Size))
    assert math.isnan(decode(encode({"x": math.nan}))["x"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool,
                                   torch.complex64, torch.float8_e4m3fn, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (4, 5)])
def test_tensors_keep_their_bits(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(0, 2, shape, generator=generator).to(dtype)
    one, two = decode(encode((tensor, [tensor.t() if tensor.dim() == 2 else tensor])))
    for arrived, sent in ((one, tensor), (two[0], tensor.t() if tensor.dim() == 2 else tensor)):
        assert arrived.dtype == dtype and arrived.shape == sent.shape
        assert arrived.contiguous().reshape(-1).view(torch.uint8).tolist() == \
            sent.contiguous().reshape(-1).view(torch.uint8).tolist()


class Own:
    pass


@pytest.mark.parametrize("value, words", [
    ({"a": [1, Own()]}, ("value['a'][1]", "Own")), (torch.eye(2).to_sparse(), ("sparse",)),
    ({Own(): 1}, ("the key", "Own")), (torch.ones(1, device="meta"), ("meta",)), ({1, 2}, ("set",))])
def test_what_cannot_travel_is_named(value, words):
    with pytest.raises(InputError) as raised:
        encode(value)
    assert all(word in str(raised.value) for word in words), raised.value
    with pytest.raises(InputError, match="on worker 3"):
        decode_or_raise(encode_or_tell(value), 3)


def test_errors_travel_as_three_texts():
    told = Description.of(ValueError("boom"))
    assert Description(*decode(encode(told))) == told


def test_hostile_bytes_are_an_error():
    """Whatever comes: a clean error, no code, and no memory by a length that lies."""
    good = encode({"x": torch.ones(3)})
    texts = [b'{"tensor": ["torch.float32", [1000000000000]]}', b'{"tensor": ["os.system", [1]]}', b'{"tensor": [1]}',
             b'{"tensor": ["torch.float32", [-1]]}', b'{"eval": "1"}', b"{}", b'{"a": 1, "b": 2}', b"[", b"\xff",
             b'{"dict": [[[], 1]]}']
    hostile = [torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
               for text in texts]
    hostile += [torch.zeros(0, dtype=torch.uint8), torch.full((8,), 255, dtype=torch.uint8), good[:20], good[:70]]
    for data in hostile:
        with pytest.raises(WorkerError, match="cannot be read"):
            decode(data)
    with pytest.raises(WorkerError, match="not a value"):
        decode_or_raise(encode([1]), 0)


def test_nothing_is_pickled():
    """Not between workers, not in files: no pickle, no collective of objects, no torch.load of anything."""
    root = Path(pipeengine.__file__).parents[1]
    pattern = re.compile(r"\b(?:import|from) +(?:c?pickle|dill|marshal|shelve)\b|pickle\.|torch\.load\(|"
                         r"torch\.save\(|\w+_object_list\(|dist\.\w+_object\(|(?<![.\w])eval\((?!self)", re.I)
    offences = [f"{path}: {line.strip()}" for base in ("pipeengine", "partitioners")
                for path in (root / base).rglob("*.py") for line in path.read_text().splitlines()
                if pattern.search(line)]
    assert not offences, offences
    for line in ("import pickle", "torch.load(path)", "dist.all_gather_object(a, b)", "eval(text)", "cPickle.loads(x)"):
        assert pattern.search(line)
