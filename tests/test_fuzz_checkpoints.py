"""Hundreds of damaged and hostile checkpoints: each gives the right state or is refused by name, and nothing else.

One child process reads them all (see fuzz_child); by hand, one alone:

    cd tests && PYTHONPATH=..:. python test_fuzz_checkpoints.py FOLDER --only NAME
"""

import collections
import dataclasses
import hashlib
import io
import json
import logging
import os
import pickle
import pickletools
import random
import socket
import struct
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fuzz_child
import pytest
import torch

import cmac
from cmac.archive import COMMENT
from cmac.checkpoint import (
    build_model,
    newest_valid_checkpoint,
    read_state,
    save_checkpoint,
    verify_checkpoint,
    with_run_config,
)
from cmac.config import config_to_dict, demo
from cmac.encoders import AudioEncoderConfig, VideoEncoderConfig

OLDER, NEWER = "step_00000001.pt", "step_00000002.pt"
LIMIT_SECONDS = 20  # for one input; the slowest takes a tenth of it
EXTRA_BYTES = 1_000_000_000  # of address space, threads' stacks included
PEAK_BYTES = 250_000_000
DEFLATED, STORED = zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED
END_BYTES, CENTRAL, LOCAL = 22, b"PK\x01\x02", b"PK\x03\x04"


@dataclass(frozen=True)
class Mutant:
    """A damaged checkpoint."""

    name: str
    content: bytes | Callable[[Path], None]
    """Of the file, or what makes something else at its path."""
    rewritten: bool = False
    """Its checksum was made anew, or it never had one that covers the damage: what it holds need not be what was
    saved."""
    refused: bool = False
    """It must not be read."""
    file_name: str = NEWER


def seal(archive: bytes) -> bytes:
    """What `cmac.archive.write_archive` makes of what torch.save wrote, written down a second time."""
    assert archive[-END_BYTES : -END_BYTES + 4] == b"PK\x05\x06" and archive[-2:] == b"\0\0"
    comment = COMMENT + hashlib.sha256(archive).hexdigest().encode()
    return archive[:-2] + struct.pack("<H", len(comment)) + comment


def unseal(checkpoint: bytes) -> bytes:
    """The inverse of `seal`."""
    return checkpoint[: -len(COMMENT) - 64 - 2] + b"\0\0"


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


class Base:
    """A whole checkpoint, and one before it, in a folder."""

    def __init__(self, folder: Path) -> None:
        full = demo()
        self.config = dataclasses.replace(
            full,
            model=dataclasses.replace(
                full.model,
                video=VideoEncoderConfig(widths=(2,), blocks=(1,), stem_width=2),
                audio=AudioEncoderConfig(widths=(2,), blocks=(1,)),
                filter_channels=2,
                embedding_dim=2,
                queue_length=5,
            ),
        )
        torch.manual_seed(0)
        model = build_model(self.config)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad][:3]
        optimizer = torch.optim.AdamW(parameters)
        sum(parameter.sum() for parameter in parameters).backward()
        optimizer.step()
        self.content = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": {},
            "loader": {"epoch": 3, "position": 4},
            "rng": [{"cpu": torch.get_rng_state()}],
        }
        self.folder = folder
        save_checkpoint(folder, 1, self.config, {"model": {}}, keep=2)
        save_checkpoint(folder, 2, self.config, self.content, keep=2)
        self.path = folder / NEWER
        self.whole = self.path.read_bytes()
        self.zip = unseal(self.whole)
        assert seal(self.zip) == self.whole
        self.state = read_state(self.path)
        with zipfile.ZipFile(io.BytesIO(self.zip)) as archive:
            self.members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        (self.pickle,) = (data for name, data in self.members if name == "archive/data.pkl")
        self.digest = cmac.load(self.path).digest

    def with_members(self, members: list[tuple[str, bytes]], compression: int = STORED) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, data in members:
                archive.writestr(zipfile.ZipInfo(name), data, compression)
        return file.getvalue()

    def with_pickle(self, data: bytes) -> bytes:
        """The zip file with another data.pkl."""
        return self.with_members([(n, data if n.endswith("data.pkl") else d) for n, d in self.members])

    def with_content(self, **changes: Any) -> bytes:
        """torch.save of the state with other values; None leaves one out."""
        content = {"format": 2, "step": 2, "config": json.dumps(config_to_dict(self.config)), **self.content}
        content |= changes
        return saved({name: value for name, value in content.items() if value is not None})

    def with_config(self, **changes: Any) -> bytes:
        """The same with other fields of the configuration, dotted names with __ for the dot."""
        config = config_to_dict(self.config)
        for name, value in changes.items():
            *parents, last = name.split("__")
            part = config
            for parent in parents:
                part = part[parent]
            part[last] = value
        return self.with_content(config=json.dumps(config))


def mutants(base: Base) -> Iterator[Mutant]:
    yield from damaged(base)
    yield from without_checksum(base)
    yield from other_zips(base)
    yield from other_pickles(base)
    yield from other_contents(base)
    yield from other_things(base)


def flipped(data: bytes, draw: random.Random, first: int = 0, last: int | None = None) -> bytes:
    position = draw.randrange(first, len(data) if last is None else last)
    changed = bytearray(data)
    changed[position] ^= 1 << draw.randrange(8)
    return bytes(changed)


def damaged(base: Base) -> Iterator[Mutant]:
    """What disks and broken copies do; the checksum tells."""
    draw, whole = random.Random(1), base.whole
    for number in range(60):
        yield Mutant(f"bit-{number}", flipped(whole, draw), refused=True)
    for number in range(30):  # directory, end of it, checksum
        yield Mutant(f"bit-in-tail-{number}", flipped(whole, draw, len(whole) - 3000), refused=True)
    lengths = {0, 1, 2, 4, 21, 22, 77, 78, 79, 512, 4096, len(whole) // 2}
    lengths |= {len(whole) - n for n in (1, 2, 63, 64, 75, 76, 77, 78, 79, 98, 100, 101, 200)}
    lengths |= {draw.randrange(len(whole)) for _ in range(15)}
    for length in sorted(lengths):
        yield Mutant(f"cut-{length}", whole[:length], refused=True)
    for number in range(20):  # blocks that never reached the disk
        start = draw.randrange(len(whole) // 512) * 512
        torn = whole[:start] + b"\0" * 512 + whole[start + 512 :]
        yield Mutant(f"zeros-{number}", torn[: len(whole)], refused=torn[: len(whole)] != whole)
    for number in range(10):
        one, other = sorted(draw.sample(range(len(whole) // 512 - 1), 2))
        blocks = [whole[i : i + 512] for i in range(0, len(whole), 512)]
        blocks[one], blocks[other] = blocks[other], blocks[one]
        yield Mutant(f"swapped-{number}", b"".join(blocks), refused=b"".join(blocks) != whole)
    yield Mutant("two-in-one", whole + whole, refused=False)
    for name, more in {"byte": b"\0", "text": b"garbage" * 1000, "zeros": b"\0" * 100_000}.items():
        yield Mutant(f"appended-{name}", whole + more, refused=True)
        yield Mutant(f"prepended-{name}", more + whole, refused=True)


def without_checksum(base: Base) -> Iterator[Mutant]:
    """Of format 1: whole or broken."""
    old, draw = base.with_content(format=1), random.Random(2)
    yield Mutant("format-1", old)
    for number in range(10):
        yield Mutant(f"format-1-bit-{number}", flipped(old, draw))
    for number in range(15):
        yield Mutant(f"format-1-cut-{number}", old[: draw.randrange(len(old))], refused=True)
    with zipfile.ZipFile(io.BytesIO(old)) as archive:
        for info in draw.sample(archive.infolist()[4:], 10):
            if info.file_size:
                start = info.header_offset + 30 + sum(struct.unpack_from("<HH", old, info.header_offset + 26))
                data = flipped(old, draw, start, start + info.file_size)
                yield Mutant(f"format-1-bit-of-{info.filename}", data, refused=True)


def other_zips(base: Base) -> Iterator[Mutant]:
    """Members and directories as torch.save never writes them, each with its checksum."""

    def mutant(name: str, archive: bytes, refused: bool = False) -> Mutant:
        return Mutant(name, seal(archive), rewritten=True, refused=refused)

    draw, members = random.Random(3), base.members
    yield mutant("zip-again", base.with_members(members))
    tensors = [index for index, (name, _) in enumerate(members) if "/data/" in name]
    for index in [0, 1, 2, 3, *draw.sample(tensors, 6)]:
        name, data = members[index]
        rest = members[:index] + members[index + 1 :]
        yield mutant(f"without-{name}", base.with_members(rest))
        yield mutant(f"renamed-{name}", base.with_members([*rest, (name + "x", data)]))
        yield mutant(f"short-{name}", base.with_members([*rest, (name, data[:-1])]))
        yield mutant(f"long-{name}", base.with_members([*rest, (name, data + b"\0" * 1000)]))
        yield mutant(f"again-{name}", base.with_members([*members, (name, b"other")]), refused=True)
    for number in range(8):
        one, other = draw.sample(tensors, 2)
        swapped = list(members)
        swapped[one], swapped[other] = (
            (members[one][0], members[other][1]),
            (members[other][0], members[one][1]),
        )
        yield mutant(f"swapped-members-{number}", base.with_members(swapped))
    names = [
        "../outside.txt", "archive/../../outside.txt", "/tmp/outside.txt", "archive//x", "archive/data\\0", "x",
        "archive/", "other/data.pkl", "ARCHIVE/DATA.PKL", "archive/./data.pkl", "archive/" + "x" * 60_000,
        "archive/data.pkl/x",
        "archive/\u202e", "C:/x", "archive/data/0\0x",
    ]  # fmt: skip
    for name in names:
        yield mutant(f"named-{name[:40]!r}", base.with_members([*members, (name, b"outside")]))
    for name, method in {"deflated": DEFLATED, "bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}.items():
        yield mutant(name, base.with_members(members, method), refused=True)
    bomb = [(name, b"\0" * 100_000_000 if name == "archive/data/0" else data) for name, data in members]
    yield mutant("zip-bomb", base.with_members(bomb, DEFLATED), refused=True)
    yield mutant("no-members", base.with_members([]), refused=True)
    yield mutant("many-members", base.with_members([*members, *((f"archive/{i}", b"") for i in range(5000))]))
    entry = base.zip.index(CENTRAL)
    for field, offset, form in (
        ("version", 6, "H"), ("flags", 8, "H"), ("method", 10, "H"), ("crc", 16, "I"), ("stored-size", 20, "I"),
        ("size", 24, "I"), ("name-length", 28, "H"), ("extra-length", 30, "H"), ("comment-length", 32, "H"),
        ("disk", 34, "H"), ("attributes", 38, "I"), ("local-header", 42, "I"),
    ):  # fmt: skip
        most = 2 ** (16 if form == "H" else 32) - 1
        for value in (0, 1, most // 2, most - 1, most):
            changed = bytearray(base.zip)
            struct.pack_into(f"<{form}", changed, entry + offset, value)
            yield mutant(f"directory-{field}-{value}", bytes(changed))
    for field, offset, form in (
        ("entries-here", 8, "H"), ("entries", 10, "H"), ("directory-size", 12, "I"), ("directory-offset", 16, "I"),
    ):  # fmt: skip
        most = 2 ** (16 if form == "H" else 32) - 1
        for value in (0, 1, most // 2, most):
            changed = bytearray(base.zip)
            struct.pack_into(f"<{form}", changed, len(changed) - END_BYTES + offset, value)
            yield mutant(f"end-{field}-{value}", bytes(changed))
    zip64 = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, 2**63, 2**63, 2**63, 2**63)
    locator = struct.pack("<IIQI", 0x07064B50, 0, len(base.zip) - END_BYTES, 1)
    yield mutant("zip64-huge", base.zip[:-END_BYTES] + zip64 + locator + base.zip[-END_BYTES:])
    for number in range(25):
        data = flipped(base.zip, draw, base.zip.index(CENTRAL), len(base.zip) - END_BYTES)
        yield mutant(f"directory-bit-{number}", data)
    for number in range(12):
        yield mutant(f"bit-sealed-{number}", flipped(base.zip, draw, 0, len(base.zip) - END_BYTES))


class Calls:
    """Unpickles to a call."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def other_pickles(base: Base) -> Iterator[Mutant]:
    """Instructions that torch.save never writes, each with its checksum."""

    def mutant(name: str, data: bytes, refused: bool = False) -> Mutant:
        return Mutant(name, seal(base.with_pickle(data)), rewritten=True, refused=refused)

    draw, data = random.Random(4), base.pickle
    canary = str(base.folder.parent / "canary")
    for protocol in (0, 2, 4):
        for name, call in {
            "system": Calls(os.system, f"touch {canary}"),
            "open": Calls(open, canary, "w"),
            "eval": Calls(eval, f"open({canary!r}, 'w')"),
            "load": Calls(torch.load, canary),
            "bytearray": Calls(bytearray, 2**36),
            "storage": Calls(torch.UntypedStorage, 2**36),
            "counter": Calls(collections.Counter, "abc"),
        }.items():
            yield mutant(
                f"calls-{name}-{protocol}", pickle.dumps({"format": 2, "x": call}, protocol), refused=True
            )
    yield mutant("build-system", b"\x80\x02cos\nsystem\n}b.", refused=True)
    yield mutant("new-system", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85\x81.", refused=True)
    yield mutant("inst-system", b"(X\x04\x00\x00\x00trueios\nsystem\n.", refused=True)
    yield mutant("extension", b"\x80\x02\x82\x01.", refused=True)
    ordered = b"ccollections\nOrderedDict\n"
    yield mutant("ordered-of-list", b"\x80\x02" + ordered + b"](]" + b"]" * 1000 + b"ea\x85R.", refused=True)
    yield mutant("ordered-of-a-list-as-arguments", b"\x80\x02" + ordered + b"]]aR.", refused=True)
    yield mutant("ordered-of-marked-tuple", b"\x80\x02" + ordered + b"(tR.", refused=True)
    long = b"X" + struct.pack("<I", 100_000) + b"x" * 100_000 + b"q\x01"
    encode = b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00utf-32\x86R0"
    yield mutant("amplified", b"\x80\x02" + long + encode * 2000 + b".", refused=True)
    for depth in (5, 9, 40, 10_000, 30_000):  # hashed on its way into a dictionary
        yield mutant(f"tuples-{depth}-deep", b"\x80\x02}N" + b"\x85" * depth + b"Ns.", refused=True)
        yield mutant(
            f"remembered-tuples-{depth}-deep",
            b"\x80\x02}N" + b"\x85q\x01h\x01\x86" * depth + b"Ns.",
            refused=True,
        )
        yield mutant(
            f"lists-{depth}-deep", b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".", refused=True
        )
    wide = b"}K\x01(" + b"N" * 1000 + b"tq\x01s" + (b"K\x01(" + b"h\x01" * 1000 + b"tq\x01s") * 3
    for name, use in {
        "key": b"h\x01Ns.",
        "keys": b"(h\x01Nu.",
        "storage": b"K\x02h\x01Qs.",
        "storage-key": b"K\x02(X\x07\0\0\0storagectorch\nFloatStorage\nh\x01X\x03\0\0\0cpuK\x01tQs.",
    }.items():
        yield mutant(f"wide-tuples-as-{name}", b"\x80\x02" + wide + use, refused=True)
    yield mutant("contains-itself", b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", refused=True)
    yield mutant("too-large", b"\x80\x02" + b"}" * (2 << 20) + b".", refused=True)
    for name, junk in {
        "empty": b"", "stop": b".", "no-stop": data[:-1], "none": b"\x80\x02N.", "protocol": b"\x80\xff.",
        "text": b"I1\n.", "forgotten": b"\x80\x02h\x07.", "unmarked": b"\x80\x02t.",
        "long": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "long-text": b"\x80\x02X\xff\xff\xff\xff.", "persistent": b"\x80\x02NQ.", "persistent-text": b"Px\n.",
    }.items():  # fmt: skip
        yield mutant(f"pickle-{name}", junk, refused=True)
    numbers = [i for i in range(len(data) - 1) if data[i : i + 1] == b"K"]
    for value in (-1, -(2**31), 2**31 - 1, 10**9):
        for position in draw.sample(numbers, 4):
            changed = data[:position] + b"J" + struct.pack("<i", value) + data[position + 2 :]
            yield mutant(f"number-{value}-at-{position}", changed)
    for position in draw.sample(numbers, 4):
        huge = b"\x8a\x09" + (2**64).to_bytes(9, "little")
        yield mutant(f"number-huge-at-{position}", data[:position] + huge + data[position + 2 :])
    for number in range(40):
        yield mutant(f"pickle-bit-{number}", flipped(data, draw))
    for number in range(20):
        changed = bytearray(data)
        for _ in range(10):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        yield mutant(f"pickle-bytes-{number}", bytes(changed))
    opcodes = bytes(ord(o.code) for o in pickletools.opcodes)
    for number in range(30):
        noise = bytes(draw.choice(opcodes) if draw.random() < 0.8 else draw.randrange(256) for _ in range(40))
        yield mutant(f"pickle-noise-{number}", b"\x80\x02" + noise + b".")


def other_contents(base: Base) -> Iterator[Mutant]:
    """What torch.save makes of a state that no run has, each with its checksum."""

    def mutant(name: str, archive: bytes, refused: bool = False) -> Mutant:
        return Mutant(name, seal(archive), rewritten=True, refused=refused)

    model = base.content["model"]
    one = torch.zeros(1)
    odd = [
        None,
        0,
        -1,
        10**30,
        1.5,
        float("nan"),
        "2",
        "x" * 100_000,
        [],
        {},
        [[]],
        one,
        torch.zeros(3),
        True,
    ]
    for field in ("format", "step", "config", "model"):
        for value in odd:
            known = (field, type(value)) in (("step", int), ("model", dict)) or (field, value) == (
                "model",
                None,
            )
            name = f"{field}-is-{str(value)[:20]!r}"
            yield mutant(name, base.with_content(**{field: value}), refused=not known and field != "model")
    for text in (
        "", "[]", "{}", "null", "1", '"x"', "NaN", "{" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 50_000,
        '{"seed": ' + "9" * 10_000 + "}",
    ):  # fmt: skip
        yield mutant(f"config-{text[:10]!r}", base.with_content(config=text))
    for field, value in {
        "model__queue_length": 10**12, "model__filter_channels": 10**9, "model__embedding_dim": 2**62,
        "model__video__widths": [10**6], "model__audio__widths": [10**15], "model__video__stem_width": 10**8,
        "model__head": "shared-mlp", "model__queue_dtype": "__class__", "model__momentum": "0.9", "unknown": 1,
        "model__batch_norm_group": 10**18, "loader__video__num_frames": 10**9, "epochs": 10**400, "seed": -1,
        "loader__shards": "/dev/zero", "run_dir": "../../outside", "compute": {"cuda_graph": True}, "model": None,
        "loss__temperature": 0, "optimizer__name": "exec", "loader__audio__num_mel_bins": 2**40,
    }.items():  # fmt: skip
        yield mutant(f"config-{field}-{str(value)[:20]}", base.with_config(**{field: value}))
    many = {"model__video__widths": [2] * 20_000, "model__video__blocks": [1] * 20_000}
    yield mutant("config-many-stages", base.with_config(**many))
    yield mutant("config-many-blocks", base.with_config(model__video__blocks=[10**9]))
    name, weight = next(iter(model.items()))
    for what, value in {
        "expanded": torch.zeros(1).expand(10**12), "complex": weight.to(torch.complex64), "text": "x", "none": None,
        "list": [1.0], "bool": weight.bool(), "scalar": torch.tensor(1.0), "nan": torch.full_like(weight, float("nan")),
        "empty": torch.zeros(0), "transposed": weight.transpose(0, -1), "half": weight.half(),
    }.items():  # fmt: skip
        yield mutant(f"weight-{what}", base.with_content(model={**model, name: value}))
    yield mutant("weight-missing", base.with_content(model={k: v for k, v in model.items() if k != name}))
    yield mutant("weight-more", base.with_content(model={**model, "more": one}))
    yield mutant(
        "weight-names", base.with_content(model={index: value for index, value in enumerate(model.values())})
    )
    for attribute in ("items", "keys", "copy", "get", "pop", "_metadata"):  # of the weights' dictionary
        masked = collections.OrderedDict(model)
        masked.__dict__["z" * len(attribute)] = 3
        with zipfile.ZipFile(io.BytesIO(base.with_content(model=masked))) as archive:
            data = archive.read("archive/data.pkl").replace(b"z" * len(attribute), attribute.encode())
        yield mutant(f"model-with-{attribute}", base.with_pickle(data))
    for what, content in {
        "tensor": one,
        "list": [1, 2],
        "nothing": None,
        "text": "x",
        "empty": {},
        "weights": model,
    }.items():
        yield mutant(f"is-{what}", saved(content), refused=True)


def other_things(base: Base) -> Iterator[Mutant]:
    """What is no such file at all."""

    def link(target: str) -> Callable[[Path], None]:
        return lambda path: path.symlink_to(target)

    def listen(path: Path) -> None:
        folder = os.open(path.parent, os.O_RDONLY)  # names of sockets are short
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)

    def sparse(path: Path) -> None:
        with open(path, "wb") as file:
            file.truncate(1 << 40)

    def in_tar(kind: bytes, target: str = "") -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name in ("storages", "tensors", "pickle"):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, target
                tar.addfile(info)
        return file.getvalue()

    things: dict[str, bytes | Callable[[Path], None]] = {
        "folder": Path.mkdir, "fifo": os.mkfifo, "socket": listen, "terabyte": sparse,
        "link-to-nothing": link("nowhere.pt"), "link-to-itself": link(NEWER), "link-to-zeros": link("/dev/zero"),
        "link-to-terminal": link("/dev/tty"), "link-to-folder": link(".."), "empty": b"", "text": b"hello\n",
        "random": random.Random(5).randbytes(100_000), "zeros": b"\0" * 100_000, "gzip": zlib.compress(base.whole),
        "tar": in_tar(tarfile.REGTYPE), "tar-fifo": in_tar(tarfile.FIFOTYPE),
        "tar-link": in_tar(tarfile.SYMTYPE, "/etc/passwd"),
        "old-torch": saved(base.content, _use_new_zipfile_serialization=False),
        "pickle": pickle.dumps(Calls(os.system, f"touch {base.folder.parent / 'canary'}")),
        "pickle-deep": pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\x02}N" + b"\x85" * 500_000 + b"Ns.",
    }  # fmt: skip
    for name, content in things.items():
        yield Mutant(f"thing-{name}", content, refused=True)
    for suffix in (".safetensors", ".zip", ".pt.tmp", ".json", ""):
        yield Mutant(f"suffix-{suffix}", base.whole, file_name=f"step_00000002x{suffix}")


class Examiner:
    """Reads a damaged checkpoint by every way there is; AssertionError where one of them goes wrong."""

    def __init__(self, base: Base) -> None:
        self.base = base

    def examine(self, mutant: Mutant) -> str:
        """The outcome, in a few words."""
        path = self.base.folder / mutant.file_name
        with fuzz_child.unwatched():
            self.base.path.unlink(missing_ok=True)
            if callable(mutant.content):
                mutant.content(path)
            else:
                path.write_bytes(mutant.content)
        try:
            return self._examine(mutant, path)
        finally:
            with fuzz_child.unwatched():
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()

    def _examine(self, mutant: Mutant, path: Path) -> str:
        said: list[str] = []
        newest = newest_valid_checkpoint(self.base.folder, said.append)
        state = self.read(read_state, path)
        if mutant.file_name == NEWER:
            if newest != path:
                assert newest == self.base.folder / OLDER and any(str(path) in line for line in said), said
                assert state is None
        if state is not None:
            assert not mutant.refused, "was read"
            assert verify_checkpoint(path) is None
            self.read(partial(with_run_config, state), path)
            if not mutant.rewritten:
                assert same({**state, "format": 2}, self.base.state), "gave another state"
        encoders = self.read(cmac.load, path)
        if encoders is not None and not mutant.rewritten:
            assert encoders.digest == self.base.digest, "gave other weights"
        return f"{'read' if state is not None else 'refused'}, {'loaded' if encoders is not None else 'not loaded'}"

    @staticmethod
    def read(function: Callable[[Path], Any], path: Path) -> Any:
        """What it gives; None for a ValueError that names the file."""
        try:
            return function(path)
        except ValueError as error:
            assert str(path) in str(error), f"{function}: {error}"
            assert len(str(error)) < 2000, f"{function} says {len(str(error))} characters"
            return None


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def main(folder: Path, only: str | None = None) -> None:
    """The child: reads all mutants, or one, in a folder that it makes."""
    logging.disable()
    warnings.filterwarnings("ignore", "Duplicate name", module="zipfile")
    torch.set_num_threads(1)
    base = Base(folder)
    examiner = Examiner(base)
    whole = examiner.examine(Mutant("whole", base.whole))
    assert whole == "read, loaded", whole

    def inputs() -> Iterator[tuple[str, Callable[[], str]]]:
        for mutant in mutants(base):
            if only in (None, mutant.name):
                yield mutant.name, partial(examiner.examine, mutant)

    fuzz_child.examine(
        inputs(),
        guarded=folder.parent,
        writable=folder,
        limit_seconds=LIMIT_SECONDS,
        extra_bytes=EXTRA_BYTES,
    )


@pytest.mark.slow
def test_damaged_checkpoints_give_the_right_state_or_are_refused_by_name(tmp_path):
    """And nothing is executed, written elsewhere, waited for, or blown up in memory."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    before = fuzz_child.snapshot(tmp_path, outside / "checkpoints")
    report = fuzz_child.run_child(
        "test_fuzz_checkpoints.py", str(outside / "checkpoints"), cwd=outside, timeout_seconds=500
    )
    text = report.text("reading of checkpoints")
    print(text)
    assert report.failures == [], text
    assert report.num_inputs >= 600 and report.peak_bytes < PEAK_BYTES, text
    assert fuzz_child.snapshot(tmp_path, outside / "checkpoints") == before, "written outside of the folder"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3] if len(sys.argv) > 3 else None)
