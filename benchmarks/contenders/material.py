"""What all contenders read: the same seconds of the same videos in the form that each of them takes.

Made once into a cache folder, outside of all timing: videos at the size that web video collections have, H.264 shards,
the same clips as files, and encoded once more as VP9 and Motion JPEG shards for DALI's CPU decoder.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from shards.ffmpeg import find_ffmpeg
from shards.make import ShardConfig, make_shards
from shards.manifest import read_manifest, write_atomically
from shards.media import FORMATS, PROTOCOLS
from shards.pool import usable_cores
from shards.slicing import SliceSettings
from shards.sources import videos_of_folder
from tools.make_synthetic_videos import make_flash_beep_video

VIDEO_SHORT_SIDE = 256
"""Originals that are larger are brought to this short side (pixels), as Kinetics is usually stored: otherwise the
loaders that read originals would be slow for a reason that is not theirs."""
SYNTHETIC_SIZES = ((340, 256), (454, 256), (340, 256), (256, 340))


@dataclass(frozen=True, kw_only=True)
class Material:
    """Paths; lists are empty where something cannot be had, `missing` says why."""

    folder: Path
    shard_folder: Path
    shards: list[str]
    video_folder: str
    videos: list[list]
    """[path, seconds]."""
    clip_files: list[list[str]]
    """[key, mp4, wav]."""
    vp9_shards: list[str]
    mjpeg_shards: list[str]
    num_clips: int
    """Clips in the shards."""
    first_shard_clips: int
    """Clips in the first of them."""
    source: str
    """Which videos: `synthetic`, `none`, or the name of the folder."""


def synthetic_videos(folder: Path, num_videos: int, seconds: float) -> None:
    """Videos of moving test pictures with sound at 340x256 and the like."""

    def make(number: int) -> None:
        make_flash_beep_video(
            folder / f"video_{number:03d}.mp4",
            seconds=seconds,
            size=SYNTHETIC_SIZES[number % len(SYNTHETIC_SIZES)],
            fps=("25", "30", "30000/1001")[number % 3],
            gop_frames=250,
            channels=2,
        )

    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(make, range(num_videos)))


def stored_copies(videos: Path, folder: Path) -> None:
    """Copies of a folder's videos at no more than VIDEO_SHORT_SIDE, x264 and AAC with default settings. What ffmpeg
    cannot read, or what has no picture and sound, is left out."""
    program = find_ffmpeg()

    def copy(job: tuple[int, str]) -> None:
        number, path = job
        target = folder / f"video_{number:04d}.mp4"
        side = f"min({VIDEO_SHORT_SIDE},min(iw,ih))"
        fitted = f"scale=w='if(gte(iw,ih),-2,trunc({side}/2)*2)':h='if(gte(iw,ih),trunc({side}/2)*2,-2)'"
        guards = ["-protocol_whitelist", PROTOCOLS, "-format_whitelist", FORMATS]
        command = [
            program,
            "-v",
            "error",
            "-y",
            *guards,
            "-i",
            f"file:{path}",
            "-map",
            "0:v:0",
            "-map",
            "0:a:0",
            "-vf",
            fitted,
        ]
        command += ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-threads", "1", "-c:a", "aac", str(target)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode:
            target.unlink(missing_ok=True)

    paths = [str(video.path) for video in videos_of_folder(str(videos)) if video.path is not None]
    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(copy, enumerate(paths)))


def prepare(
    cache: Path,
    *,
    shards: str | None,
    videos: str | None,
    num_synthetic: int,
    synthetic_seconds: float,
    max_clips: int,
    need_recoded: bool,
    need_files: bool,
    say: Callable[[str], None] = print,
) -> Material:
    """All that contenders need; what an earlier call made in `cache` is used again.

    Args:
        cache: folder for everything that is made; one for each combination of the other arguments.
        shards: folder of H.264 shards, or None: they are made from the videos.
        videos: folder of original videos, or None: with shards, loaders that read originals are left out; without,
            synthetic ones are made.
        num_synthetic: how many.
        synthetic_seconds: how long.
        max_clips: slots of the shards that are made.
        need_recoded: also VP9 and Motion JPEG shards.
        need_files: also clips as files.
        say: told what takes long.

    Raises:
        ValueError: a folder that was given is not what it should be.
    """
    cache.mkdir(parents=True, exist_ok=True)
    source = videos or ("none" if shards else "synthetic")
    video_folder = None
    if videos is not None:
        video_folder = _made(cache / "videos", lambda out: stored_copies(Path(videos), out), say)
    elif shards is None:
        video_folder = _made(
            cache / "videos", lambda out: synthetic_videos(out, num_synthetic, synthetic_seconds), say
        )
    if shards is None:
        shard_folder = cache / "shards"
        if not (shard_folder / "manifest.json").exists():
            say(f"making {shard_folder}")
        config = ShardConfig(
            videos=str(video_folder),
            out=str(shard_folder),
            videos_per_shard=max(4, min(64, num_synthetic // 2 if source == "synthetic" else 16)),
            slicing=SliceSettings(max_clips=max_clips),
        )
        make_shards(config)
    else:
        shard_folder = Path(shards)
    manifest = read_manifest(shard_folder)
    tars = [str(shard_folder / entry.name) for entry in manifest.shards]
    files: list[list[str]] = []
    if need_files:
        folder = _made(cache / "clip_files", lambda out: _extract(tars, out), say)
        files = [
            [video.stem, str(video), str(video.with_suffix(".wav"))] for video in sorted(folder.glob("*.mp4"))
        ]
    recoded = {"vp9": [], "mjpeg": []}
    if need_recoded:
        for codec in recoded:
            folder = _made(cache / codec, lambda out, codec=codec: _recode(tars, out, codec), say)
            recoded[codec] = [str(path) for path in sorted(folder.glob("*.tar"))]
    return Material(
        folder=cache,
        shard_folder=shard_folder,
        shards=tars,
        video_folder=str(video_folder or ""),
        videos=_durations(video_folder) if video_folder else [],
        clip_files=files,
        vp9_shards=recoded["vp9"],
        mjpeg_shards=recoded["mjpeg"],
        num_clips=manifest.num_clips,
        first_shard_clips=manifest.shards[0].num_clips,
        source=Path(videos).name if videos else source,
    )


def _made(folder: Path, make: Callable[[Path], None], say: Callable[[str], None]) -> Path:
    """folder, made by make(temporary folder) unless it is there."""
    if not folder.exists():
        say(f"making {folder}")
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        make(temporary)
        temporary.rename(folder)
    return folder


def _durations(folder: Path) -> list[list]:
    """[path, seconds] of the videos with at least one second of picture and sound."""
    import av

    found = []
    for path in sorted(folder.iterdir()):
        with contextlib.suppress(av.error.FFmpegError), av.open(str(path)) as container:
            if container.streams.video and container.streams.audio and container.duration:
                seconds = container.duration / av.time_base
                if seconds >= 1.2:
                    found.append([str(path), seconds])
    return found


def _members(tar_path: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(tar_path) as tar:
        for member in tar:
            yield member.name, tar.extractfile(member).read()


def _extract(tars: list[str], out: Path) -> None:
    for path in tars:
        for name, data in _members(path):
            if not name.endswith(".json"):
                (out / Path(name).name).write_bytes(data)


def _recode(tars: list[str], out: Path, codec: str) -> None:
    """Tars with an index of the same clips in another codec; in processes of their own, as PyAV threads stand still."""
    jobs = [json.dumps([path, str(out), codec]) for path in tars]
    root = Path(__file__).resolve().parents[2]

    def run(job: str) -> None:
        command = [sys.executable, "-m", "benchmarks.contenders.material", job]
        subprocess.run(command, cwd=root, check=True, stdin=subprocess.DEVNULL)

    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(run, jobs))


def _recode_tar(path: str, out: str, codec: str) -> None:
    suffix = "avi" if codec == "mjpeg" else "mp4"
    target = Path(out) / Path(path).name
    samples: dict[str, list[str]] = {}
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in _members(path):
            key, _, kind = name.partition(".")
            if kind == "mp4":
                data, kind = recode_clip(data, codec), suffix
            info = tarfile.TarInfo(f"{key}.{kind}")
            info.size = len(data)
            begin = tar.offset + tarfile.BLOCKSIZE
            tar.addfile(info, io.BytesIO(data))
            samples.setdefault(key, []).append(f"{kind} {begin} {len(data)} {info.name}")
    lines = [f"v1.2 {len(samples)}", *(" ".join(members) for members in samples.values())]
    write_atomically(target.with_suffix(".idx"), ("\n".join(lines) + "\n").encode("ascii"))


def recode_clip(video: bytes, codec: str) -> bytes:
    """A clip's frames as `vp9` in mp4 (crf 24) or `mjpeg` in avi (q 3)."""
    import av

    name, container_format, options = {
        "vp9": ("libvpx-vp9", "mp4", {"crf": "24", "b": "0", "cpu-used": "4", "deadline": "good", "g": "32"}),
        "mjpeg": ("mjpeg", "avi", {"flags": "+qscale", "global_quality": str(3 * 118)}),
    }[codec]
    buffer = io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(buffer, "w", format=container_format) as sink:
        template = source.streams.video[0]
        template.thread_type = "NONE"
        stream = sink.add_stream(name, rate=32, options=options)
        stream.width, stream.height = template.width, template.height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(source.decode(template)):
            if codec == "mjpeg":
                frame = frame.reformat(
                    format="yuvj420p", src_color_range="MPEG", dst_color_range="JPEG",
                    src_colorspace="ITU601", dst_colorspace="ITU601",
                )  # fmt: skip
            frame.pts, frame.time_base = number, Fraction(1, 32)
            frame.pict_type = 0
            sink.mux(stream.encode(frame))
        sink.mux(stream.encode(None))
    return buffer.getvalue()


if __name__ == "__main__":
    _recode_tar(*json.loads(sys.argv[1]))
