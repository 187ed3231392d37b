"""Damaged and hostile folders of shards, made from a whole one with fixed seeds.

`mutants(Base(folder))` yields them one by one. Two kinds of damage: to the bytes as they lie on disk, which a checksum
may tell, and to what is inside with every checksum, index and size made anew, as an attacker or a broken writer would.
"""

import gzip
import io
import json
import os
import random
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from damaged_clips import EditableShard, Member, boxes, encode_clip, pack, wav_file
from loaders_media import write_shards

from shards.manifest import MANIFEST_NAME

NUM_CLIPS = 3
NUM_SLOTS = 2
SIZE = 144
"""Side of the pictures: all clips have the same parameter sets, so they share a decoder."""
TARS = tuple(f"train-slot{slot:02d}-000000.tar" for slot in range(NUM_SLOTS))
TAR, OTHER_TAR = TARS
INDEX, OTHER_INDEX = (name.replace(".tar", ".idx") for name in TARS)
POSITION = 1
"""Of the clip that is damaged from inside; its neighbors are whole."""
BLOCK = tarfile.BLOCKSIZE
HUGE = (2**31 - 1, 2**32 - 1, 2**33 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 10**400)

Content = bytes | None | Callable[[Path], None]
"""Of a file: its bytes, None if it is missing, or what makes something else at its path."""


@dataclass(frozen=True)
class Mutant:
    """A folder of shards with damage."""

    name: str
    files: dict[str, Content]
    """Those that are not as in the whole folder."""
    rewritten: frozenset[str] = frozenset()
    """Keys of clips whose contents were changed with their checksums; all others are as they were or are refused."""
    noticed: bool = False
    """`check_shards` must find fault with it."""


class Base:
    """A whole folder of shards, in memory."""

    def __init__(self, folder: Path) -> None:
        """Writes it to folder and reads it."""
        write_shards(folder, [NUM_CLIPS], num_slots=NUM_SLOTS, sizes=((SIZE, SIZE),))
        self.clips: dict[str, list[list[Member]]] = {}
        for slot, name in enumerate(TARS):
            shard = EditableShard(folder / name)
            for position in range(NUM_CLIPS):
                shard.put(position, "mp4", encode_clip(SIZE, SIZE, NUM_CLIPS * slot + position))
            shard.write()
            self.clips[name] = shard.clips
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def member(self, position: int, suffix: str, tar: str = TAR) -> Member:
        return next(member for member in self.clips[tar][position] if member.suffix == suffix)

    def key(self, position: int, tar: str = TAR) -> str:
        return self.clips[tar][position][0].name.partition(".")[0]

    def copy(self, tar: str = TAR) -> list[list[Member]]:
        """Clips of a tar, to change."""
        return [[Member(member.name, member.data) for member in clip] for clip in self.clips[tar]]

    def manifest(self, tar_bytes: bytes, **fields: object) -> bytes:
        """manifest.json that has TAR as it is now."""
        record = json.loads(self.files[MANIFEST_NAME])
        for entry in record["shards"]:
            if entry["name"] == TAR:
                entry |= {"bytes": len(tar_bytes), "sha256": sha256(tar_bytes).hexdigest(), **fields}
        return json.dumps(record).encode("ascii")

    def packed(self, clips: list[list[Member]], order: list[Member] | None = None) -> dict[str, Content]:
        """TAR, its index and the manifest, fitting each other."""
        tar, index = pack(clips, order)
        return {TAR: tar, INDEX: index, MANIFEST_NAME: self.manifest(tar, num_clips=len(clips))}

    def with_member(self, suffix: str, data: bytes, **fields: object) -> dict[str, Content]:
        """The clip at POSITION with another member, its checksum made anew."""
        clips = self.copy()
        parts = {member.suffix: member for member in clips[POSITION]}
        parts[suffix].data = data
        if suffix != "json":
            crc = {"mp4": "video_crc32", "wav": "audio_crc32"}[suffix]
            record = json.loads(parts["json"].data) | {crc: zlib.crc32(data)} | fields
            parts["json"].data = json.dumps(record).encode("ascii")
        return self.packed(clips)


# Bytes.


def flipped(data: bytes, rng: random.Random, start: int = 0, end: int | None = None, most: int = 4) -> bytes:
    """1 to `most` random bits flipped between two offsets."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, most)):
        changed[rng.randrange(start, len(data) if end is None else end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def put(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


def lengths(size: int, rng: random.Random, count: int) -> list[int]:
    """Lengths to cut to: around blocks and ends, and random ones."""
    edges = [
        0,
        1,
        BLOCK - 1,
        BLOCK,
        BLOCK + 1,
        size // 2 // BLOCK * BLOCK,
        size - 10240,
        size - 1024,
        size - BLOCK,
        size - 1,
    ]
    return sorted(
        {length for length in edges if 0 <= length < size} | {rng.randrange(size) for _ in range(count)}
    )


# Headers of the tar.


def header(name: bytes = b"a", size: bytes = b"00000000000\0", kind: bytes = b"0", **fields: bytes) -> bytes:
    """512 bytes of a ustar header, its checksum right whatever is in the other fields."""
    block = bytearray(BLOCK)
    places = {
        "mode": 100,
        "uid": 108,
        "gid": 116,
        "mtime": 136,
        "link": 157,
        "magic": 257,
        "major": 329,
        "prefix": 345,
    }
    block[:100] = name[:100].ljust(100, b"\0")
    block[100:108] = b"0000644\0"
    block[124:136] = size[:12].ljust(12, b"\0")
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    for field, value in fields.items():
        block[places[field] : places[field] + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def base_256(size: int) -> bytes:
    """A size as GNU tar writes what octal digits do not hold; negative ones too."""
    return bytes([0xFF if size < 0 else 0x80]) + (size % 2**88).to_bytes(11, "big")


def extra_members() -> dict[str, list[Member]]:
    """Members that no shard has, by what they are."""
    secret = b"../../secret.txt"

    def empty(kind: bytes, name: bytes = b"extra.mp4", **fields: bytes) -> Member:
        return Member(name.decode("latin-1"), b"", header(name, kind=kind, **fields))

    def pax(kind: bytes, records: bytes) -> Member:
        return Member("pax", records, header(b"pax", octal(len(records)), kind))

    def record(keyword: bytes, value: bytes) -> bytes:
        body = b" " + keyword + b"=" + value + b"\n"
        length = len(body) + len(str(len(body)))
        return str(length + (len(str(length)) > len(str(len(body))))).encode() + body

    long_name = b"n" * 300 + b"\0"
    return {
        "symlink": [empty(b"2", link=secret)],
        "symlink to an absolute path": [empty(b"2", link=b"/etc/passwd")],
        "hardlink": [empty(b"1", link=secret)],
        "character device": [empty(b"3", major=b"0000001\x000000003\0")],
        "block device": [empty(b"4", major=b"0000010\x000000000\0")],
        "pipe": [empty(b"6")],
        "directory": [empty(b"5", b"folder/")],
        "absolute path": [empty(b"0", b"/tmp/absolute.mp4")],
        "path that leads out": [empty(b"0", b"../outside.mp4")],
        "path that leads out by its prefix": [empty(b"0", b"x.mp4", prefix=b"../../..")],
        "sparse file": [empty(b"S")],
        "contiguous file": [empty(b"7")],
        "volume label": [empty(b"V")],
        "kind that does not exist": [empty(b"Z")],
        "pax path": [pax(b"x", record(b"path", b"../../outside.mp4"))],
        "pax size": [pax(b"x", record(b"size", b"99999999999999999999"))],
        "pax negative size": [pax(b"x", record(b"size", b"-512"))],
        "pax size that is no number": [pax(b"x", record(b"size", b"many"))],
        "pax record of length 0": [pax(b"x", b"0 path=x\n" * 9)],
        "pax record longer than its block": [pax(b"x", b"999999999999 path=x\n")],
        "pax sparse": [
            pax(
                b"x",
                record(b"GNU.sparse.map", b"0,9999999999999,1,2") + record(b"GNU.sparse.size", b"9" * 30),
            )
        ],
        "pax of everything": [pax(b"g", record(b"hdrcharset", b"BINARY") + record(b"path", b"\xff\xfe"))],
        "GNU long name": [Member("long", long_name, header(b"././@LongLink", octal(len(long_name)), b"L"))],
        "GNU long link": [Member("long", long_name, header(b"././@LongLink", octal(len(long_name)), b"K"))],
        "GNU long name without end": [empty(b"L", size=octal(0o7777777777))],
        "negative size": [empty(b"0", size=base_256(-BLOCK))],
        "size that leads back to itself": [empty(b"0", size=base_256(-2 * BLOCK))],
        "size of 8 GB": [empty(b"0", size=octal(8**11 - 1))],
        "size of 2**80": [empty(b"0", size=base_256(2**80))],
        "checksum that is wrong": [Member("bad", b"", put(header(), 148, b"000000\0 "))],
    }


def tar_mutants(base: Base, rng: random.Random) -> Iterator[Mutant]:
    """Damage to the tar as it lies on disk."""
    whole = base.files[TAR]
    places = [whole.index(member.name.encode() + b"\0") for clip in base.clips[TAR] for member in clip]
    for number in range(140):
        start = rng.choice(places)
        yield Mutant(f"tar header bits/{number}", {TAR: flipped(whole, rng, start, start + BLOCK)})
    for number in range(60):
        yield Mutant(f"tar bits/{number}", {TAR: flipped(whole, rng)}, noticed=True)
    for length in lengths(len(whole), rng, 40):
        cut = whole[:length]
        yield Mutant(f"tar cut/{length}", {TAR: cut}, noticed=True)
        yield Mutant(
            f"tar cut, manifest fits/{length}", {TAR: cut, MANIFEST_NAME: base.manifest(cut)}, noticed=True
        )
    for number in range(20):
        start, length = rng.randrange(len(whole)), rng.choice((1, 100, BLOCK, 5000, 60_000))
        filler = rng.choice((bytes(length), rng.randbytes(length), b"\xff" * length))
        yield Mutant(f"tar overwritten/{number}", {TAR: put(whole, start, filler)[: len(whole)]})
        moved = whole[:start] + whole[start + length :]
        yield Mutant(
            f"tar with a part missing/{number}",
            {TAR: moved, MANIFEST_NAME: base.manifest(moved)},
            noticed=True,
        )
        moved = whole[:start] + filler + whole[start:]
        yield Mutant(
            f"tar with a part more/{number}", {TAR: moved, MANIFEST_NAME: base.manifest(moved)}, noticed=True
        )


def field_mutants(base: Base, rng: random.Random) -> Iterator[Mutant]:
    """One field of one header changed, with a right checksum; index and manifest fit the tar otherwise."""
    sizes = [octal(n) for n in (0, 1, 17, 2**30, 8**11 - 1)] + [
        base_256(n) for n in (5, -1, -BLOCK, 2**40, 2**80)
    ]
    sizes += [
        b"",
        b"            ",
        b"999999999999",
        b"-1\0",
        b"0x10\0",
        b"7" * 12,
        b"\0" * 12,
        b"\x80" + b"\xff" * 11,
    ]
    names = [
        b"",
        b".",
        b"..",
        b"/etc/passwd",
        b"../" * 30,
        b"a/../../b.mp4",
        b"\xff\xfe.mp4",
        b"x" * 100,
        b"a\nb.mp4",
        b"*.mp4",
    ]
    names += [
        b"http://example.org/a.mp4",
        b"a.mp4\0b.mp4",
        b" ",
        b"C:\\a.mp4",
        b"|ls",
        b"file:a.mp4",
        base.key(0).encode() + b".mp4",
    ]
    kinds = [bytes([c]) for c in b"\x001234567xgLKSVNADIMXZ \xff"]
    changes: list[tuple[str, dict[str, bytes]]] = [
        *[("size", {"size": size}) for size in sizes],
        *[("name", {"name": name}) for name in names],
        *[("kind", {"kind": kind, "link": b"../../secret.txt"}) for kind in kinds],
        ("prefix", {"prefix": b"../../../tmp"}),
        ("magic", {"magic": b"ustar  \0"}),
        ("magic", {"magic": b"\xff" * 8}),
    ]
    for suffix in ("mp4", "wav", "json"):
        for number, (what, fields) in enumerate(changes):
            clips = base.copy()
            member = next(member for member in clips[POSITION] if member.suffix == suffix)
            given = {"name": member.name.encode(), "size": octal(len(member.data)), **fields}
            member.header = header(**given)
            yield Mutant(f"tar {what} of {suffix}/{number}", base.packed(clips))


def member_mutants(base: Base, rng: random.Random) -> Iterator[Mutant]:
    """Members that no shard has, and those it has in other places."""
    for what, extra in extra_members().items():
        for place in (0, 4, 9):
            clips = base.copy()
            order = [member for clip in clips for member in clip]
            files = base.packed(clips, order[:place] + extra + order[place:])
            yield Mutant(f"{what} at member {place}", files, noticed=True)
        yield Mutant(f"{what}, index of the whole tar", {**files, INDEX: base.files[INDEX]}, noticed=True)
        # Named in the index as if it were a clip's video.
        clips = base.copy()
        for member in extra:
            member.name = f"{base.key(POSITION)}.mp4"
        clips[POSITION][0] = extra[-1]
        order = [member for clip in clips for member in clip if member is not extra[-1]]
        yield Mutant(f"{what} for a video", base.packed(clips, order[:3] + extra + order[3:]), noticed=True)
    for number in range(24):
        clips = base.copy()
        one, two = rng.sample([member for clip in clips for member in clip], 2)
        if number % 2:
            one.name, two.name = two.name, one.name
            yield Mutant(f"swapped names/{number}", base.packed(clips))
        else:
            one.data, two.data = two.data, one.data
            yield Mutant(f"swapped contents/{number}", base.packed(clips))
    for number in range(12):
        clips = base.copy()
        order = [member for clip in clips for member in clip]
        rng.shuffle(order)
        yield Mutant(f"members in another order/{number}", base.packed(clips, order))
    for number in range(NUM_CLIPS):
        clips = base.copy()
        clips[number] = [
            Member(member.name, member.data) for member in base.clips[TAR][(number + 1) % NUM_CLIPS]
        ]
        yield Mutant(f"clip twice/{number}", base.packed(clips), noticed=True)
        clips = base.copy()
        clips[number] = [Member(member.name, member.data) for member in base.clips[OTHER_TAR][number]]
        yield Mutant(f"clip of another slot/{number}", base.packed(clips), noticed=True)
        clips = base.copy()
        clips[number].append(Member(clips[number][0].name, b"another"))
        yield Mutant(f"key twice/{number}", base.packed(clips), noticed=True)
        clips = base.copy()
        clips[number][0] = Member(base.key(number) + ".mp4", base.member(number, "mp4", OTHER_TAR).data)
        yield Mutant(f"video of another slot/{number}", base.packed(clips), noticed=True)
        for suffix in ("mp4", "wav", "json"):
            clips = base.copy()
            clips[number] = [member for member in clips[number] if member.suffix != suffix]
            yield Mutant(f"no {suffix}/{number}", base.packed(clips), noticed=True)
    for name in ("../../x", "/etc/x", "a/b", "x" * 90, "", "%s%n", "$(touch owned)", "a b", "\udcff", "ü"):
        clips = base.copy()
        for member in clips[POSITION]:
            member.name = f"{name}.{member.suffix}"
        try:
            yield Mutant(f"key {name!r}", base.packed(clips), noticed=True)
        except UnicodeEncodeError:
            continue


def other_files(base: Base) -> dict[str, Content]:
    """What may lie where a tar or an index should be."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../outside.mp4", b"x")
    whole = base.files[TAR]

    def folder(path: Path) -> None:
        path.mkdir()

    def listening(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(os.path.relpath(path))  # a socket's path is at most 107 bytes long

    def sparse(path: Path) -> None:
        path.touch()
        os.truncate(path, 2**40)

    return {
        "nothing": None,
        "an empty file": b"",
        "zeros": bytes(len(whole)),
        "two blocks of zeros": bytes(1024),
        "noise": random.Random(5).randbytes(len(whole) // BLOCK * BLOCK),
        "gzip": gzip.compress(whole, 1),
        "zip": archive.getvalue(),
        "a video": base.member(0, "mp4").data,
        "a web page": b"<html>" * 999,
        "a folder": folder,
        "a pipe": os.mkfifo,
        "a socket": listening,
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a link to nowhere": lambda path: path.symlink_to("nowhere"),
        "a terabyte of nothing": sparse,
        "a pickle": b"cos\nsystem\n(S'touch owned'\ntR." + bytes(BLOCK * 4),
    }


def file_mutants(base: Base, rng: random.Random) -> Iterator[Mutant]:
    """Other files in place of tar, index and manifest, and those of the other slot."""
    for what, content in other_files(base).items():
        for name in (TAR, INDEX, MANIFEST_NAME):
            yield Mutant(f"{what} for {name}", {name: content}, noticed=name == TAR)
        if isinstance(content, bytes):
            yield Mutant(
                f"{what} for {TAR}, manifest fits",
                {TAR: content, MANIFEST_NAME: base.manifest(content)},
                noticed=True,
            )
    for one, two in ((TAR, OTHER_TAR), (INDEX, OTHER_INDEX)):
        swapped = {one: base.files[two], two: base.files[one]}
        yield Mutant(f"swapped {one}", swapped, noticed=True)
        yield Mutant(f"{two} for {one}", {one: base.files[two]}, noticed=True)
    both = {TAR: base.files[OTHER_TAR], INDEX: base.files[OTHER_INDEX]}
    yield Mutant("tar and index of another slot", both, noticed=True)
    yield Mutant(
        "the same, manifest fits", {**both, MANIFEST_NAME: base.manifest(base.files[OTHER_TAR])}, noticed=True
    )
    yield Mutant("a tar of the wrong suffix", {TAR: None, TAR + ".gz": base.files[TAR]}, noticed=True)


def index_mutants(base: Base, rng: random.Random) -> Iterator[Mutant]:
    """Damage to the index: no checksum covers it."""
    whole = base.files[INDEX]
    for number in range(160):
        yield Mutant(f"index bits/{number}", {INDEX: flipped(whole, rng)})
    for length in lengths(len(whole), rng, 30):
        yield Mutant(f"index cut/{length}", {INDEX: whole[:length]})
    rows = whole.decode().splitlines()

    def index(lines: list[str], end: str = "\n") -> dict[str, Content]:
        return {INDEX: end.join(lines).encode("utf-8", "surrogateescape") + end.encode()}

    numbers = [*HUGE, -1, -512, 0, 1, 511, len(base.files[TAR]), len(base.files[TAR]) - 1]
    for row in range(1, NUM_CLIPS + 1):
        for word in range(12):
            values = (
                [str(n) for n in numbers]
                if word % 4 in (1, 2)
                else ["", "x", "mp4", "../a.mp4", "/etc/passwd", "a" * 300]
            )
            for value in values + (
                ["9" * 5000, "1e9", "0x200", "1_000", "+512", "٣"] if word in (1, 2) else []
            ):
                words = rows[row].split(" ")
                words[word] = value
                yield Mutant(
                    f"index, row {row}, word {word}: {value[:24]}",
                    index(rows[:row] + [" ".join(words)] + rows[row + 1 :]),
                )
    for count in ("0", "-1", "2", "4", "1" * 30, "1e3", "x", "3 3", "", str(10**18)):
        yield Mutant(f"index of {count[:20]!r} clips", index([f"v1.2 {count}", *rows[1:]]))
    for version in ("v1.1", "v9", "", "V1.2", "v1.2\0"):
        yield Mutant(f"index of version {version!r}", index([f"{version} {NUM_CLIPS}", *rows[1:]]))
    yield Mutant("index with a row twice", index([rows[0], rows[1], rows[1], rows[3]]))
    yield Mutant("index with rows swapped", index([rows[0], rows[2], rows[1], rows[3]]))
    yield Mutant("index with ends of DOS", index(rows, "\r\n"))
    yield Mutant("index of empty rows", index([rows[0], "", "", ""]))
    yield Mutant("index of one row without end", {INDEX: b"v1.2 3\n" + b"mp4 512 1 " * 200_000})
    yield Mutant("index of a million rows", {INDEX: b"v1.2 1000000\n" + b"mp4 512 1 a\n" * 1_000_000})
    far = base.files[TAR] + bytes(4_000_000 - len(base.files[TAR]))
    words = rows[2].split(" ")
    words[9], words[10] = str(len(far) - 3072), "1024"
    spread = [*rows[:2], " ".join(words), rows[3]]
    yield Mutant(
        "index of a clip that is all over the tar",
        {TAR: far, **index(spread), MANIFEST_NAME: base.manifest(far)},
    )

    def sparse(path: Path) -> None:
        path.write_bytes(base.files[TAR])
        os.truncate(path, 2**40)

    words[2] = words[9] = words[10] = str(2**39)
    record = json.loads(base.manifest(b"", bytes=2**40))
    for last in (rows[3], " ".join(words)):
        yield Mutant(
            "index of members of 512 GB" + (", the last one" if last != rows[3] else ""),
            {
                TAR: sparse,
                **index([*rows[:2], " ".join(words), last]),
                MANIFEST_NAME: json.dumps(record).encode(),
            },
        )


# key.json.

NASTY: tuple[object, ...] = (
    None, True, False, -1, 0, 1, 1.5, -1e308, 1e-320, *HUGE, -(2**63), -(2**63) - 1, "", "x", "../x", "\0", "\ud800",
    "\udcff\ud800", "a" * 100_000, [], {}, [1], [[]], {"a": 1}, [1, 2, 3, 4], float("nan"), float("inf"),
    [float("inf")] * 4, [2**70] * 4,
)  # fmt: skip


def raw_json(value: object) -> str:
    """Like json.dumps, of numbers of any length."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**300:
        return "1" + "0" * 400
    return json.dumps(value)


def broken_json(whole: bytes) -> dict[str, bytes]:
    """A JSON object damaged as text."""
    text = whole.decode("ascii").strip()
    return {
        "nothing": b"",
        "a space": b" ",
        "null": b"null",
        "a list of it": f"[{text}]".encode(),
        "nested lists": b"[" * 100_000,
        "nested lists that end": b"[" * 50_000 + b"]" * 50_000,
        "nested objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "nesting in a field": (text[:-1] + ',"extra":' + "[" * 990 + "]" * 990 + "}").encode(),
        "more nesting in a field": (text[:-1] + ',"extra":' + "[" * 9_900 + "]" * 9_900 + "}").encode(),
        "a number of 5000 digits": (text[:-1] + ',"extra":' + "1" * 5000 + "}").encode(),
        "a number of a megabyte": (text[:-1] + ',"extra":' + "1" * 1_000_000 + "}").encode(),
        "UTF-16": text.encode("utf-16"),
        "UTF-32": text.encode("utf-32"),
        "UTF-8 with a mark": b"\xef\xbb\xbf" + text.encode(),
        "not UTF-8": text.replace('"', '"\udcff', 3).encode("utf-8", "surrogateescape"),
        "a comment": b"// x\n" + text.encode(),
        "two objects": (text + text).encode(),
        "a comma at the end": (text[:-1] + ",}").encode(),
        "single quotes": text.replace('"', "'").encode(),
        "a pickle": b"\x80\x04cos\nsystem\n.",
        "NaN": (text[:-1] + ',"extra":NaN}').encode(),
        "zeros behind it": text.encode() + b"\0" * 100,
        "every field twice": (text[:-1] + "," + text[1:]).encode(),
    }


def json_mutants(base: Base, rng: random.Random) -> Iterator[Mutant]:
    """Damage to key.json, index and manifest fitting."""
    whole = base.member(POSITION, "json").data
    rewritten = frozenset((base.key(POSITION),))
    for what, data in broken_json(whole).items():
        yield Mutant(f"key.json: {what}", base.with_member("json", data), rewritten)
    record = json.loads(whole)
    for first, name in enumerate(record):
        for number, value in enumerate(NASTY[first % 2 :: 2]):
            fields = ",".join(
                f"{raw_json(key)}:{raw_json(value if key == name else old)}" for key, old in record.items()
            )
            yield Mutant(
                f"key.json, {name}/{number}", base.with_member("json", b"{%s}" % fields.encode()), rewritten
            )
        less = {key: value for key, value in record.items() if key != name}
        yield Mutant(
            f"key.json without {name}", base.with_member("json", json.dumps(less).encode()), rewritten
        )
    for number in range(50):
        yield Mutant(f"key.json bits/{number}", base.with_member("json", flipped(whole, rng)), rewritten)


# key.wav.


def wav_mutants(base: Base, rng: random.Random) -> Iterator[Mutant]:
    """Damage to key.wav, its checksum fitting."""
    whole = base.member(POSITION, "wav").data
    rewritten = frozenset((base.key(POSITION),))

    def mutant(what: str, data: bytes) -> Mutant:
        return Mutant(f"wav: {what}", base.with_member("wav", data), rewritten)

    for number in range(60):
        yield mutant(f"header bits/{number}", flipped(whole, rng, 0, 44))
    for number, length in enumerate(
        [*range(0, 46), *(rng.randrange(len(whole)) for _ in range(10)), len(whole) - 1]
    ):
        yield mutant(f"cut/{number}", whole[:length])
    for offset, width in ((4, 4), (16, 4), (20, 2), (22, 2), (24, 4), (28, 4), (32, 2), (34, 2), (40, 4)):
        for value in (0, 1, 2, 3, 7, 0x7F, 0xFF, 0x7FFF, 0xFFFE, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF):
            if value < 256**width:
                yield mutant(f"{value:#x} at {offset}", put(whole, offset, value.to_bytes(width, "little")))
    chunk = struct.pack("<4sI", b"LIST", 10) + bytes(10)
    yield mutant(
        "another chunk first", put(whole[:36] + chunk + whole[36:], 4, struct.pack("<I", len(whole) + 10))
    )
    yield mutant("a thousand chunks", whole[:36] + chunk * 1000 + whole[36:])
    yield mutant("two formats", whole[:36] + whole[12:36] + whole[36:])
    yield mutant("no format", whole[:12] + whole[36:])
    yield mutant("data twice", whole + whole[36:])
    yield mutant("bytes behind it", whole + b"x")
    yield mutant("a megabyte behind it", whole + bytes(1_000_000))
    for kind in (b"RIFX", b"RF64", b"FORM", b"OggS", b"fLaC", b"ID3\3"):
        yield mutant(f"{kind!r}", put(whole, 0, kind))
    for options in (
        {"num_samples": 1},
        {"num_samples": 48_000, "sample_rate": 48_000},
        {"num_samples": 12_000, "num_channels": 2},
    ):
        yield mutant(f"{options}", wav_file(**options))


# key.mp4.


def enclosing(data: bytes, offset: int) -> Iterator[int]:
    """Starts of the boxes around an offset, those of a sample description too."""
    for _, start, end in boxes(data):
        if start < offset < end:
            yield start
    for name in (b"avc1", b"avcC"):
        start = data.find(name, data.find(b"stsd")) - 4  # the first one is a brand, too
        if 0 <= start < offset < start + int.from_bytes(data[start : start + 4], "big"):
            yield start


def inserted(data: bytes, offset: int, new: bytes) -> bytes:
    """new put at an offset of a clip whose moov comes last; the boxes around it grow."""
    for start in enclosing(data, offset):
        size = int.from_bytes(data[start : start + 4], "big") + len(new)
        data = put(data, start, struct.pack(">I", size))
    return data[:offset] + new + data[offset:]


def nested(name: bytes, depth: int) -> bytes:
    """Boxes in boxes, 8 bytes each."""
    return b"".join(struct.pack(">I4s", 8 * (depth - level), name) for level in range(depth))


def crafted_videos(whole: bytes) -> dict[str, bytes]:
    """Files made by hand to cost time or memory."""
    found = {name: (start, end) for name, start, end in boxes(whole)}
    configuration = whole.index(b"avcC") - 4
    table, durations, runs, offsets = (found[name][0] for name in ("stsz", "stts", "stsc", "stco"))
    words = struct.Struct(">I").pack
    videos = {}
    for name in (b"moov", b"trak", b"stbl", b"edts", b"free"):
        for depth in (2, 900, 60_000):
            videos[f"{depth} {name!r} boxes in avc1"] = inserted(whole, configuration, nested(name, depth))
            videos[f"{depth} {name!r} boxes in moov"] = inserted(whole, found["trak"][0], nested(name, depth))
            videos[f"{depth} {name!r} boxes at the end"] = whole + nested(name, depth)
    videos["a million empty boxes"] = whole + struct.pack(">I4s", 8, b"free") * 500_000
    videos["a million empty boxes in avc1"] = inserted(
        whole, configuration, struct.pack(">I4s", 8, b"free") * 500_000
    )
    videos["avcC of a megabyte"] = inserted(whole, configuration + 40, bytes(1_000_000))
    # 32 and 1000 samples that all lie in the same place, which is full of units of one byte.
    units = b"\0\0\0\1\x65" * 100_000
    for count in (32, 1000):
        extra = 4 * (count - 32)
        same = inserted(whole, offsets + 17, words(0) * (count - 1))  # a chunk for each sample
        same = put(same, offsets + 12, words(count) + words(len(whole) + 4 * (count - 1) + extra + 8) * count)
        same = put(same, runs + 12, words(1) + words(1) + words(1) + words(1))
        same = put(same, durations + 12, words(1) + words(count))
        same = inserted(same, table + 21, bytes(extra))
        same = put(same, table + 16, words(count) + words(len(units)) * count)
        videos[f"{count} samples of one place, of small units"] = (
            same + struct.pack(">I4s", 8 + len(units), b"free") + units
        )
    for name, offset in (
        ("stsz", 16),
        ("stts", 12),
        ("stsc", 12),
        ("stco", 12),
        ("stsd", 12),
        ("stsz", 12),
        ("stss", 12),
    ):
        for value in (0, 1, 31, 33, 1000, 1001, 65_536, 8_000_000, 2**31 - 1, 2**32 - 1):
            if name in found:
                videos[f"{value} at {offset} of {name}"] = put(whole, found[name][0] + offset, words(value))
    for value in (0, 1, 2, 31, 2**16, 2**31 - 1, 2**32 - 1):
        videos[f"{value} samples in a chunk"] = put(whole, runs + 20, words(value))
        videos[f"chunk at {value}"] = put(whole, offsets + 16, words(value))
        videos[f"first sample of {value} bytes"] = put(whole, table + 20, words(value))
    return videos


def parameter_sets() -> dict[str, bytes]:
    """avcC of other encodings for the clip's frames: they promise other sizes."""
    sets = {}
    for width, height in ((16, 16), (160, 144), (640, 480), (2048, 16), (16, 2048)):
        other = encode_clip(width, height, 0, num_frames=1)
        start = other.index(b"avcC") - 4
        sets[f"{width}x{height}"] = other[start : start + int.from_bytes(other[start : start + 4], "big")]
    return sets


def giant_sps(size: int) -> bytes:
    """avcC with a parameter set of size x size pixels, written bit by bit (ITU-T H.264, 7.3.2.1.1)."""
    bits = ""

    def ue(value: int) -> str:
        code = bin(value + 1)[2:]
        return "0" * (len(code) - 1) + code

    blocks = size // 16 - 1
    bits += (
        f"{66:08b}{0:08b}{52:08b}"
        + ue(0)
        + ue(0)
        + ue(2)
        + ue(1)
        + "0"
        + ue(blocks)
        + ue(blocks)
        + "1"
        + "1"
        + "0"
        + "0"
        + "1"
    )
    bits += "0" * (-len(bits) % 8)
    sps = b"\x67" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    pps = b"\x68\xce\x3c\x80"
    body = (
        b"\x01\x42\x00\x34\xff\xe1"
        + struct.pack(">H", len(sps))
        + sps
        + b"\x01"
        + struct.pack(">H", len(pps))
        + pps
    )
    return struct.pack(">I4s", 8 + len(body), b"avcC") + body


def video_mutants(base: Base, rng: random.Random) -> Iterator[Mutant]:
    """Damage to key.mp4, its checksum fitting."""
    whole = base.member(POSITION, "mp4").data
    rewritten = frozenset((base.key(POSITION),))
    found = list(boxes(whole))
    places = {name: (start, end) for name, start, end in found}

    def mutant(what: str, data: bytes) -> Mutant:
        return Mutant(f"mp4: {what}", base.with_member("mp4", data), rewritten)

    for number in range(120):
        yield mutant(f"moov bits/{number}", flipped(whole, rng, *places["moov"]))
    start = whole.index(b"avcC") + 4
    for number in range(60):
        yield mutant(f"avcC bits/{number}", flipped(whole, rng, start, start + 40))
    for number in range(50):
        yield mutant(f"frame bits/{number}", flipped(whole, rng, *places["mdat"]))
    first = places["mdat"][0] + 8
    for number in range(40):
        yield mutant(f"bits of the first frame/{number}", flipped(whole, rng, first, first + 800))
    for number in range(40):
        yield mutant(
            f"box sizes and names, bits/{number}",
            flipped(whole, rng, (at := rng.choice(found)[1]), at + 8, 2),
        )
    for length in lengths(len(whole), rng, 30):
        yield mutant(f"cut/{length}", whole[:length])
    for name, start, end in found:
        for size in sorted({0, 1, 7, 8, 9, end - start - 1, end - start + 1, 2**31, 2**32 - 1}):
            yield mutant(f"{name} of {size} bytes", put(whole, start, struct.pack(">I", size)))
        yield mutant(
            f"{name} of 2**63 bytes", put(whole, start, struct.pack(">I4sQ", 1, name.encode(), 2**63))
        )
        yield mutant(f"no {name}", put(whole, start + 4, b"free"))
        yield mutant(
            f"{name} twice",
            inserted(whole, end, whole[start:end])
            if start >= places["moov"][0]
            else whole + whole[start:end],
        )
        yield mutant(f"{name} of zeros", put(whole, start + 8, bytes(end - start - 8)))
        yield mutant(f"{name} of ones", put(whole, start + 8, b"\xff" * (end - start - 8)))
    for number in range(20):
        (_, a, b), (_, c, d) = sorted(rng.sample(found, 2), key=lambda box: box[1])
        if b <= c:
            yield mutant(
                f"swapped boxes/{number}", whole[:a] + whole[c:d] + whole[b:c] + whole[a:b] + whole[d:]
            )
    for number in range(60):
        position = _unit(whole, rng.randrange(32))
        kind = whole[position + 4] & 0xE0 | rng.randrange(32)
        yield mutant(f"type of a unit/{number}", put(whole, position + 4, bytes([kind])))
    for number in range(20):
        position = _unit(whole, rng.randrange(32))
        length = rng.choice((0, 1, 2, 2**24, 2**31, 2**32 - 1))
        yield mutant(f"length of a unit/{number}", put(whole, position, struct.pack(">I", length)))
    for what, data in crafted_videos(whole).items():
        yield mutant(what, data)
    start = whole.index(b"avcC") - 4
    end = start + int.from_bytes(whole[start : start + 4], "big")
    without = whole
    for outer in enclosing(whole, start + 1):
        if outer != start:
            size = int.from_bytes(whole[outer : outer + 4], "big") - (end - start)
            without = put(without, outer, struct.pack(">I", size))
    without = without[:start] + without[end:]
    sets = parameter_sets() | {f"{size}x{size} pixels": giant_sps(size) for size in (144, 4096, 16384, 65536)}
    for what, configuration in sets.items():
        yield mutant(f"parameter sets of {what}", inserted(without, start, configuration))
    for width, height in ((16, 16), (48, 144), (320, 240), (2048, 16)):
        fields = {"frame_width": width, "frame_height": height}
        video = encode_clip(width, height, 0, x264=(("preset", "ultrafast"),))
        yield Mutant(
            f"frames of {width}x{height}, as key.json says",
            base.with_member("mp4", video, **fields),
            rewritten,
        )
    yield mutant("sound alone", encode_clip(SIZE, SIZE, 0, with_video=False, with_audio=True))
    yield mutant("two videos", whole + base.member(0, "mp4").data)
    yield mutant("video of another clip", base.member(0, "mp4").data)


def _unit(whole: bytes, number: int) -> int:
    """Offset of the first NAL unit of a frame."""
    position = next(start for name, start, _ in boxes(whole) if name == "mdat") + 8
    table = whole.index(b"stsz") + 16
    for index in range(number):
        position += int.from_bytes(whole[table + 4 * index : table + 4 * index + 4], "big")
    return position


# manifest.json.

NAMES: tuple[object, ...] = (
    "", ".", "..", "../outside.tar", "../../secret.txt", "a/../../outside.tar", "/etc/passwd", "/dev/zero",
    "/dev/stdin", "sub/x.tar", "..\\outside.tar", "C:\\x.tar", "http://127.0.0.1:9/x.tar", "s3://bucket/x.tar",
    "file:///etc/passwd", "pipe:cat /etc/passwd", "x.tar\0", "\0", "x\n.tar", "a" * 300 + ".tar", ".tar",
    ".hidden.tar", "-x.tar", "~/x.tar", "$HOME/x.tar", "x.idx", "manifest.json", OTHER_TAR, TAR + ".gz", TAR.upper(),
    "\ud800.tar", "\udcff.tar", " ", TAR + "/", "./" + TAR, "x?.tar", "train-slot00-000000", "é.tar",
)  # fmt: skip


def manifest_mutants(base: Base, rng: random.Random) -> Iterator[Mutant]:
    """Damage to manifest.json."""
    whole = base.files[MANIFEST_NAME]

    def mutant(what: str, data: bytes) -> Mutant:
        return Mutant(f"manifest: {what}", {MANIFEST_NAME: data})

    for what, data in broken_json(whole).items():
        yield mutant(what, data)
    record = json.loads(whole)
    for name in record:
        for number, value in enumerate(NASTY):
            fields = ",".join(
                f"{raw_json(key)}:{raw_json(value if key == name else old)}" for key, old in record.items()
            )
            yield mutant(f"{name}/{number}", b"{%s}" % fields.encode())
        yield mutant(
            f"no {name}", json.dumps({key: value for key, value in record.items() if key != name}).encode()
        )

    def with_entries(what: str, entries: object) -> Mutant:
        return mutant(what, json.dumps(record | {"shards": entries}).encode())

    first, second = record["shards"]
    for name in first:
        for number, value in enumerate(NASTY):
            if raw_json(value) == json.dumps(value, allow_nan=True) or not isinstance(value, int):
                yield with_entries(f"{name} of a shard/{number}", [first | {name: value}, second])
        yield with_entries(
            f"no {name} of a shard", [{key: value for key, value in first.items() if key != name}, second]
        )
    for number, name in enumerate(NAMES):
        yield with_entries(f"name of a shard/{number} {name!r}"[:60], [first | {"name": name}, second])
    yield with_entries("a shard twice", [first, first])
    yield with_entries("a shard twice and another", [first, first, second])
    yield with_entries("shards in another order", [second, first])
    yield with_entries("one shard of two", [first])
    yield with_entries("a field more", [first | {"more": 1}, second])
    yield with_entries("a shard that is a list", [list(first.values()), second])
    yield with_entries("a shard that is a name", [TAR, OTHER_TAR])
    yield with_entries(
        "two thousand shards",
        [first | {"index": n, "name": f"train-slot00-{n:06d}.tar"} for n in range(2_000)],
    )
    for slot in (-1, 1, 2, 99, 2**40, 2**62):
        yield with_entries(f"slot {slot}", [first | {"slot": slot}, second])
        yield mutant(f"{slot} slots", json.dumps(record | {"num_slots": slot}).encode())
    for number in (0, 1, 4, 10**6, 2**40, 2**62):
        yield with_entries(f"{number} clips", [first | {"num_clips": number}, second | {"num_clips": number}])
    for number in range(100):
        yield mutant(f"bits/{number}", flipped(whole, rng))
    for length in lengths(len(whole), rng, 25):
        yield mutant(f"cut/{length}", whole[:length])


GROUPS: dict[str, Callable[[Base, random.Random], Iterator[Mutant]]] = {
    "tar": tar_mutants,
    "fields": field_mutants,
    "members": member_mutants,
    "files": file_mutants,
    "index": index_mutants,
    "json": json_mutants,
    "wav": wav_mutants,
    "video": video_mutants,
    "manifest": manifest_mutants,
}


def mutants(base: Base) -> Iterator[Mutant]:
    """All of them, the same ones each time; names are unique."""
    for seed, (group, make) in enumerate(GROUPS.items()):
        for mutant in make(base, random.Random(seed)):
            yield Mutant(f"{group}/{mutant.name}", mutant.files, mutant.rewritten, mutant.noticed)
