"""Ways to damage a file: of its bytes, and of what the bytes mean."""

from __future__ import annotations

import io
import json
import random
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

NASTY = (
    *(b"\x00" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff", struct.pack("<q", -1), struct.pack("<q", 1 << 40)),
    *(
        b"cos\nsystem\n",
        b"\x8c\x08builtins\x8c\x04eval\x93",
        b"../../../etc/passwd",
        b'a")\rexec("',
        b"\x1b[2J",
        b"[" * 300,
    ),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1 << 40, 1e308, "", "a", "..", 'a")\rexec("1")\r', "\x1b[2J", [], {}, [[]], {"a": {}}),
    *("os.system", "torch.nn.modules.linear.Linear", {"class": "os.system", "kwargs": {}}, [0] * 1000),
)


def flip(content: bytes, rng: random.Random) -> bytes:
    """Change some bits."""
    made = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    return bytes(made)


def cut(content: bytes, rng: random.Random) -> bytes:
    """Keep the first part."""
    return content[: rng.randrange(len(content))]


def drop(content: bytes, rng: random.Random) -> bytes:
    """Leave a part out."""
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.randint(1, 64) :]


def insert(content: bytes, rng: random.Random) -> bytes:
    """Put something nasty in, over what is there or between."""
    start, nasty = rng.randrange(len(content)), rng.choice(NASTY)
    return content[:start] + nasty + content[start + rng.choice((0, len(nasty))) :]


def splice(content: bytes, rng: random.Random) -> bytes:
    """Put one part of the file over another."""
    start, end, length = rng.randrange(len(content)), rng.randrange(len(content)), rng.randint(1, 200)
    return content[:start] + content[end : end + length] + content[start + length :]


TEXTS = (
    *(b"__class__", b"forward", b"_modules", b"", b'a")\rexec("', b"\xff", b"train", b"_forward_hooks", b"weight"),
)

BYTES: tuple[Mutation, ...] = (flip, flip, cut, drop, insert, splice)


def inside_zip(content: bytes, rng: random.Random) -> bytes:
    """Damage one record of a zip, with checksums that are right again; or its name; or leave it out, or add one."""
    with zipfile.ZipFile(io.BytesIO(content)) as old:
        records = {name: old.read(name) for name in old.namelist()}
    name = rng.choice(sorted(records, key=lambda name: (len(records[name]), name))[-6:])
    action = rng.randrange(5)
    if action <= 2 and records[name]:
        records[name] = _deeper(records[name], rng)
    elif action == 3:
        records[rng.choice((f"{name}x", f"../{name}", name[1:], f"{name}\r"))] = records.pop(name)
    else:
        records.pop(name)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as new:
        for key, value in records.items():
            new.writestr(key, value)
    return buffer.getvalue()


def _deeper(record: bytes, rng: random.Random) -> bytes:
    if record[:1] == b"{" and rng.random() < 0.7:
        return inside_json(record, rng)
    return rng.choice((pickled_text, *BYTES))(record, rng)


def pickled_text(record: bytes, rng: random.Random) -> bytes:
    """Change a text in a pickle, and its length with it: a name of a class, an attribute, a key."""
    places = [match for match in re.finditer(rb"X(....)", record, re.DOTALL) if _fits(match, record)]
    globals_ = list(re.finditer(rb"c([\w.]+)\n(\w+)\n", record))
    if globals_ and (not places or rng.random() < 0.4):
        match, other = rng.choice(globals_), rng.choice((*globals_, None))
        new = other[0] if other is not None else rng.choice((b"cos\nsystem\n", b"cbuiltins\neval\n", b"ca\nb\n"))
        return record[: match.start()] + new + record[match.end() :]
    if not places:
        return flip(record, rng)
    match = rng.choice(places)
    (length,) = struct.unpack("<I", match[1])
    texts = (
        b"__class__",
        b"forward",
        b"_modules",
        b"",
        b'a")\rexec("',
        b"\xff",
        b"train",
        b"_forward_hooks",
        b"weight",
    )
    text = rng.choice(texts)
    return record[: match.start()] + b"X" + struct.pack("<I", len(text)) + text + record[match.end() + length :]


def _fits(match: re.Match[bytes], record: bytes) -> bool:
    return struct.unpack("<I", match[1])[0] <= min(100, len(record) - match.end())


def inside_json(content: bytes, rng: random.Random) -> bytes:
    """Change a value, a key or the nesting of a JSON document."""
    try:
        document = json.loads(content)
    except ValueError:
        return flip(content, rng)
    parents = [value for value in _walk(document) if isinstance(value, (dict, list)) and value]
    if not parents:
        return json.dumps(rng.choice(VALUES)).encode()
    parent = rng.choice(parents)
    key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    if isinstance(parent, dict) and rng.random() < 0.3:
        parent[str(rng.choice(VALUES))] = parent.pop(key)
    else:
        parent[key] = rng.choice(VALUES)
    return json.dumps(document).encode()


def _walk(value: Any) -> Iterator[Any]:
    yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _walk(item)


def inside_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Change the header of a safetensors file, its length with it; the manifest in its metadata too."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    key = rng.choice(sorted(metadata)) if metadata and rng.random() < 0.6 else None
    if key is not None and metadata[key][:1] == "{":
        metadata[key] = inside_json(metadata[key].encode(), rng).decode()
        made = json.dumps(header).encode()
    else:
        made = inside_json(json.dumps(header).encode(), rng)
    return struct.pack("<Q", len(made)) + made + content[8 + length :]


def structured(name: str, content: bytes) -> tuple[Mutation, ...]:
    """Return the mutations that know the format of a file."""
    if content[:2] == b"PK":
        return (inside_zip,)
    if name.endswith(".json"):
        return (inside_json,)
    if name.endswith(".safetensors"):
        return (inside_safetensors,)
    return (pickled_text,) if content[:1] == b"\x80" else ()
