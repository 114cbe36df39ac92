"""Hostile files: what a stranger may have put in the place of a head, an adapter, a checkpoint, prompts or dialogues."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TEXTS = ["", "x", "silu", "../../etc/passwd", "x" * 5000, "a\nb", "\x00", "💥", "(a+)+$", "%s%n{0}", "1e999", "-1"]
NUMBERS = [0, 1, -1, 2, 3, 7, 1.5, -0.5, 1e308, 2**16, 2**24, 2**31, 2**63, 10**12, -(10**12), float("nan")]


def any_value(rng: random.Random, depth: int = 0) -> Any:
    """A value that JSON can hold."""
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind == 0:
        return rng.choice(TEXTS)
    if kind in (1, 2):
        return rng.choice(NUMBERS)
    if kind in (3, 4):
        return rng.choice([True, False, None])
    if kind == 5:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {rng.choice(TEXTS): any_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice([[0] * 300_000, {str(i): i for i in range(100_000)}, "y" * 1_000_000, [[]] * 1000])


def any_json(rng: random.Random) -> bytes:
    """Bytes in the place of a JSON file."""
    return rng.choice(
        [
            b"",
            b"null",
            b"[]",
            b"5",
            b'"x"',
            b"{",
            b"\xff\xfe\x00",
            b"\xef\xbb\xbf{}",
            b'{"a": ' * 100_000,
            b"[" * 200_000 + b"]" * 200_000,
            b'{"a": ' + b"1" * 10_000 + b"}",
            b'{"a": NaN, "b": Infinity}',
            b"{" + b",".join(b'"k%d": 1' % i for i in range(30_000)) + b"}",
            rng.randbytes(300),
            json.dumps(any_value(rng)).encode(),
        ]
    )


def edit_json(rng: random.Random, path: Path, fields: list[str]) -> str:
    """Change some fields of a JSON file; returns what was done."""
    content = json.loads(path.read_text())
    names = [rng.choice([*fields, *content]) for _ in range(rng.randint(1, 3))]
    for name in names:
        if rng.random() < 0.15:
            content.pop(name, None)
        else:
            content[name] = any_value(rng)
    path.write_text(json.dumps(content))
    return f"{path.name}: other {', '.join(names)}"


def odd_file(rng: random.Random, path: Path) -> str:
    """Put something in the place of a file that is no file, or no readable one; returns what was done."""
    path.unlink(missing_ok=True)
    kind = rng.choice(["pipe", "folder", "device", "zeros", "loop", "dangling", "empty", "random"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "zeros":
        with path.open("wb") as file:
            file.truncate(3 * 10**9)  # sparse
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(path.with_name("nowhere"))
    else:
        path.write_bytes(rng.randbytes(1000) if kind == "random" else b"")
    return f"{path.name}: {kind}"


def bad_safetensors(rng: random.Random, path: Path) -> str:
    """Damage a safetensors file; returns what was done."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    kind = rng.choice(["short", "flip", "length", "names", "field", "shapes", "garbage", "deep", "dtype"])
    name = rng.choice([key for key in header if key != "__metadata__"])
    if kind == "short":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "flip":
        position = rng.randrange(8 + size)
        path.write_bytes(content[:position] + rng.randbytes(1) + content[position + 1 :])
    elif kind == "length":
        path.write_bytes(struct.pack("<Q", rng.choice([0, 2**20 + 1, 10**8, 2**40, 2**63, 2**64 - 1])) + content[8:])
    elif kind == "garbage":
        path.write_bytes(struct.pack("<Q", 200_000) + rng.randbytes(200_000))
    elif kind == "deep":
        text = b"[" * 100_000
        path.write_bytes(struct.pack("<Q", len(text)) + text)
    else:
        if kind == "names":
            header = {f"w{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
        elif kind == "field":
            header[name][rng.choice(["dtype", "shape", "data_offsets"])] = any_value(rng)
        elif kind == "shapes":
            header[name]["shape"] = rng.choice([[2**40], [2**62, 4], [0], [], [1] * 100, [-1, 4]])
        else:
            header[name]["dtype"] = rng.choice(["F8_E4M3", "C64", "BOOL", "I8", "F4", "U64", "F64"])
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return f"{path.name}: {kind}"


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


class Filling:
    """A gigabyte, made while it is unpickled by a function that torch allows."""

    def __reduce__(self) -> tuple:
        return bytearray, (10**9,)


def odd_tensor(rng: random.Random, tensor: torch.Tensor) -> Any:
    """Something in the place of a weight."""
    return rng.choice(
        [
            lambda: tensor.to_sparse(),
            lambda: torch.empty(tensor.shape, device="meta"),
            lambda: torch.zeros(1).expand(2**20, 2**20),
            lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
            lambda: tensor.to(torch.complex64),
            lambda: tensor.to(torch.float8_e4m3fn),
            lambda: tensor.bool(),
            lambda: tensor.int(),
            lambda: tensor.double(),
            lambda: tensor[..., :1],
            lambda: tensor.flatten(),
            lambda: torch.tensor(1.0),
            lambda: torch.zeros(0),
            lambda: torch.full_like(tensor, float("nan")),
            lambda: tensor.tolist(),
            lambda: None,
            lambda: {"a": tensor},
            lambda: torch.nn.Parameter(tensor.float()),
            lambda: torch.zeros(3, 3, dtype=torch.int64),
        ]
    )()


def bad_pickle(rng: random.Random, path: Path, weights: dict[str, torch.Tensor], mark: Path) -> str:
    """Write a `pytorch_model.bin` that is no state dict; returns what was done."""
    kinds = [
        "trap",
        "old trap",
        "short",
        "odd",
        "names",
        "nested",
        "bomb",
        "huge",
        "zip",
        "random",
        "opcodes",
        "filling",
    ]
    kind = rng.choice(kinds)
    if kind == "trap":
        torch.save({**weights, "fc.weight": Trap(mark)}, path)
    elif kind == "filling":
        torch.save({**weights, "fc.weight": Filling()}, path, _use_new_zipfile_serialization=rng.random() < 0.5)
    elif kind == "old trap":
        path.write_bytes(pickle.dumps(Trap(mark), protocol=2))
    elif kind == "odd":
        name = rng.choice([*weights, "d2t"])
        torch.save({**weights, name: odd_tensor(rng, weights.get(name, torch.arange(5)))}, path)
    elif kind == "names":
        torch.save({**weights, **{f"w{i}": torch.zeros(0) for i in range(500)}, 5: torch.zeros(1)}, path)
    elif kind == "nested":
        torch.save(rng.choice([[weights], {"model": weights}, 5, None, "x", weights["fc.weight"], {}]), path)
    elif kind == "random":
        path.write_bytes(rng.randbytes(2000))
    elif kind == "opcodes":
        path.write_bytes(b"\x80\x02" + b"(" * 100_000 + b"l" * 100_000 + b".")
    elif kind == "huge":
        torch.save(weights, path, _use_new_zipfile_serialization=False)
        content = path.read_bytes()
        path.write_bytes(content.replace(struct.pack("<H", 0x4B) + b"@", b"J\xff\xff\xff\x7f"))
    else:
        torch.save(weights, path)
        content = path.read_bytes()
        if kind == "short":
            path.write_bytes(content[: rng.randrange(len(content))])
        elif kind == "bomb":
            with zipfile.ZipFile(path) as old:
                entries = {info.filename: old.read(info) for info in old.infolist()}
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
                for entry, data in entries.items():
                    is_grown = entry.endswith(rng.choice(["/data/0", "data.pkl"]))
                    new.writestr(entry, bytes(400_000_000) if is_grown else data)
        else:
            with zipfile.ZipFile(path, "w") as new:
                new.writestr("archive/data.pkl", pickle.dumps(any_value(rng), protocol=2))
    return f"{path.name}: {kind}"


def odd_weights(rng: random.Random, path: Path) -> str:
    """Change tensors of a safetensors file, in ways that such files allow; returns what was done."""
    weights = load_file(path)
    name = rng.choice([*weights, "draft_vocab_ids", "d2t", "lm_head.weight", "x" * 3000])
    tensor = weights.get(name, torch.arange(5))
    choices: list[Callable[[], torch.Tensor]] = [
        lambda: tensor.to(torch.complex64),
        lambda: tensor.float().to(torch.float8_e4m3fn),
        lambda: tensor.bool(),
        lambda: tensor.int(),
        lambda: tensor.double(),
        lambda: tensor[..., :1].contiguous(),
        lambda: tensor.flatten(),
        lambda: torch.tensor(1),
        lambda: torch.zeros(0),
        lambda: torch.zeros(3, 3, dtype=torch.int64),
        lambda: torch.full(tensor.shape, 2**40, dtype=torch.int64),
        lambda: torch.arange(50) - 7,
    ]
    if rng.random() < 0.2:
        weights.pop(name, None)
    else:
        weights[name] = rng.choice(choices)()
    save_file(weights, path, metadata={"format": "pt"})
    return f"{path.name}: other {name[:40]}"


def bad_index(rng: random.Random, folder: Path, kind: str) -> str:
    """Replace the weights by shards with an index that is wrong; returns what was done."""
    whole = folder / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    shard = whole.with_name(f"model-00001-of-00001.{kind}")
    names = ["fc.weight"]
    if whole.exists():
        whole.rename(shard)
        names = list(load_file(shard)) if kind == "safetensors" else names
    other = rng.choice(
        [shard.name, "../outside.bin", "/etc/passwd", "x.bin", "", "nowhere.safetensors", 5, None, ["a"]]
    )
    weight_map = rng.choice([dict.fromkeys(names, other), None, [], "x", {}, {name: f"{name}.bin" for name in names}])
    index = rng.choice(
        [{"metadata": {}, "weight_map": weight_map}, {"weight_map": weight_map}, None, [], {"metadata": 5}]
    )
    (folder / f"{whole.name}.index.json").write_text(json.dumps(index))
    return f"{whole.name}.index.json: {json.dumps(index)[:60]}"
