"""How much of bare ffmpeg's speed make_shards keeps.

    python benchmarks/make_shards.py [--videos FOLDER] [--num-videos 48] [--repeats 3] [--workers N]
        [--note TEXT]

Both sides slice the same videos with the same number of processes, in turns, and are judged by CPU time per
clip, so that other work on the machine disturbs less, and by wall time. The bare side is one ffmpeg command
per video that decodes, converts and encodes the same seconds with the same options, with nothing checked and
no tar written. make_shards is measured whole: starting processes, probing, ffmpeg, decoding every clip back,
results on disk, shards. Starting the processes costs the same for 10 videos and for 300,000; it is measured
apart, too.
"""

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (  # noqa: E402
    append_row,
    cpu_seconds,
    make_row,
    peak_memory_bytes,
    quantiles,
    usable_cores,
)
from shards.ffmpeg import SliceCommand, ffmpeg_version, find_ffmpeg, run_ffmpeg  # noqa: E402
from shards.make import ShardConfig, make_shards  # noqa: E402
from shards.pool import run_jobs  # noqa: E402
from shards.results import ResultFile, write_result  # noqa: E402
from shards.schema import FPS  # noqa: E402
from shards.slicing import (  # noqa: E402
    SliceSettings,
    Unusable,
    decoded_frames,
    frame_geometry,
    probe_video,
    slice_video,
)
from shards.sources import SourceVideo, videos_of_folder  # noqa: E402
from tools.make_synthetic_videos import make_flash_beep_video  # noqa: E402

TARGET = 0.85
TIMEOUT_SECONDS = 600.0
SIZES = ((340, 256), (640, 360), (480, 360), (320, 240))
"""Of the generated videos: what web video collections have."""


def make_videos(folder: Path, num_videos: int) -> None:
    """10-second videos of common sizes and rates."""
    for number in range(num_videos):
        make_flash_beep_video(
            folder / f"video_{number:03d}.mp4",
            seconds=10.1,
            size=SIZES[number % len(SIZES)],
            fps=("25", "30", "30000/1001")[number % 3],
            channels=2,
        )


def bare_commands(
    videos: list[SourceVideo], settings: SliceSettings, program: str
) -> tuple[list[list[str]], int]:
    """One command per usable video, and how many clips they give together."""
    commands, num_clips = [], 0
    for video in videos:
        assert video.path is not None
        try:
            probe = probe_video(video.path)
        except Unusable:
            continue
        num_seconds = min(int(probe.promised_seconds(settings.max_seconds) or 0), settings.max_clips)
        if not num_seconds:
            continue
        geometry = frame_geometry(probe.width, probe.height, probe.pixel_aspect)
        command = SliceCommand(
            path=video.path,
            video_stream=probe.video_stream,
            audio_stream=probe.audio_stream,
            start_seconds=probe.start_seconds,
            read_seconds=probe.start_seconds + settings.max_seconds + 1,
            seconds=tuple(range(num_seconds)),
            scaled_size=geometry.scaled_size,
            crop_offset=geometry.crop_offset,
            frame_size=geometry.frame_size,
            scale_first=probe.fps < FPS,
            crf=settings.crf,
            preset=settings.preset,
        )
        commands.append(command.build(program))
        num_clips += num_seconds
    return commands, num_clips


def run_bare(commands: list[list[str]], workers: int) -> None:
    def one(command: list[str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            run_ffmpeg(command, Path(folder), TIMEOUT_SECONDS)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, commands))


def start_cpu_seconds(workers: int) -> float:
    """CPU time of starting and ending the worker processes."""
    used = cpu_seconds()
    jobs = [1] * workers
    list(run_jobs(abs, lambda: jobs.pop() if jobs else None, workers, TIMEOUT_SECONDS))
    return cpu_seconds() - used


def where_time_goes(videos: list[SourceVideo], settings: SliceSettings, program: str) -> dict[str, float]:
    """CPU milliseconds per clip of the steps around ffmpeg, in one process."""
    spent = dict.fromkeys(("probe", "ffmpeg and collecting", "of it: decode back", "result file"), 0.0)
    num_clips = 0
    with tempfile.TemporaryDirectory() as folder:
        for video in videos[:6]:
            assert video.path is not None
            begin = cpu_seconds()
            try:
                probe_video(video.path)
            except Unusable:
                continue
            spent["probe"] += cpu_seconds() - begin
            begin = cpu_seconds()
            sliced = slice_video(video.path, video.video_id, 0, settings, program, TIMEOUT_SECONDS, folder)
            spent["ffmpeg and collecting"] += cpu_seconds() - begin
            begin = cpu_seconds()
            for clip in sliced.clips:
                decoded_frames(clip.video)
            spent["of it: decode back"] += cpu_seconds() - begin
            begin = cpu_seconds()
            path = Path(folder) / "result"
            write_result(path, video, sliced)
            with ResultFile(path) as file:
                for number in range(len(sliced.clips)):
                    file.clip(number, 0, video.key_hash)
            spent["result file"] += cpu_seconds() - begin
            num_clips += len(sliced.clips)
    return {name: 1000 * seconds / max(num_clips, 1) for name, seconds in spent.items()}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="make_shards benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--videos", metavar="FOLDER", help="real videos (default: generated ones)")
    parser.add_argument("--num-videos", type=int, default=48, help="to generate (default: 48)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--note", help="goes into the row, for example what else the machine was doing")
    args = parser.parse_args(argv)
    settings = SliceSettings()
    program = find_ffmpeg()
    with tempfile.TemporaryDirectory() as scratch:
        if args.videos is None:
            folder = Path(scratch) / "videos"
            folder.mkdir()
            make_videos(folder, args.num_videos)
        else:
            folder = Path(args.videos)
        videos = videos_of_folder(str(folder))
        commands, bare_clips = bare_commands(videos, settings, program)
        run_bare(commands[:2], args.workers)  # warm: files and program are in memory from here on
        rates: dict[str, list[float]] = {"bare": [], "make": []}
        cpu: dict[str, list[float]] = {"bare": [], "make": []}
        shares: list[float] = []
        cpu_shares: list[float] = []
        read_bytes = sum(Path(video.path).stat().st_size for video in videos if video.path)
        begin_all = time.monotonic()
        start = quantiles([start_cpu_seconds(args.workers) for _ in range(3)])["median"]
        steady_shares: list[float] = []
        num_bad = 0
        for repeat in range(args.repeats):
            begin, used = time.monotonic(), cpu_seconds()
            run_bare(commands, args.workers)
            rates["bare"].append(bare_clips / (time.monotonic() - begin))
            cpu["bare"].append((cpu_seconds() - used) / bare_clips)
            begin, used = time.monotonic(), cpu_seconds()
            config = ShardConfig(
                videos=str(folder),
                out=str(Path(scratch) / f"out{repeat}"),
                workers=args.workers,
                slicing=settings,
            )
            manifest = make_shards(config)
            rates["make"].append(manifest.num_distinct_clips / (time.monotonic() - begin))
            cpu["make"].append((cpu_seconds() - used) / manifest.num_distinct_clips)
            shares.append(rates["make"][-1] / rates["bare"][-1])
            cpu_shares.append(cpu["bare"][-1] / cpu["make"][-1])
            steady_shares.append(cpu["bare"][-1] / (cpu["make"][-1] - start / manifest.num_distinct_clips))
            num_bad = sum(manifest.skipped.values())
        seconds = time.monotonic() - begin_all
        steps = where_time_goes(videos, settings, program)

    ceiling = quantiles([1 / value for value in cpu["bare"]])
    mine = quantiles([1 / value for value in cpu["make"]])
    print(f"ceiling: bare ffmpeg, {ceiling['median']:.1f} clips/s per core")
    print(f"{'':24s}{'clips/s per core':>18s}{'CPU ms per clip':>18s}{'clips/s, wall':>16s}")
    for name, label in (("bare", "bare ffmpeg"), ("make", "make_shards")):
        cost = quantiles(cpu[name])["median"]
        print(f"{label:24s}{1 / cost:18.1f}{1000 * cost:18.1f}{quantiles(rates[name])['median']:16.1f}")
    share = quantiles(cpu_shares)["median"]
    print(
        f"make_shards / bare: {share:.3f} per core, {quantiles(shares)['median']:.3f} by wall time with "
        f"{args.workers} workers, start of processes included (target {TARGET} per core)"
    )
    print(
        f"without the start of {args.workers} processes ({1000 * start:.0f} CPU ms, once per run): "
        f"{quantiles(steady_shares)['median']:.3f} per core"
    )
    for name, value in steps.items():
        print(f"  {name:24s}{value:8.2f} CPU ms per clip")
    row = make_row(
        "make_shards",
        "generated" if args.videos is None else "real",
        {
            "num_videos": len(videos),
            "num_clips": manifest.num_distinct_clips,
            "workers": args.workers,
            **asdict(settings),
            "ffmpeg": ffmpeg_version(program),
        },
        clips_per_second=mine,
        clips_per_second_unit="per core: 1 / CPU seconds per clip",
        clips_per_second_wall=quantiles(rates["make"]),
        repeats=args.repeats,
        seconds=seconds,
        read_bytes_per_second=read_bytes * quantiles(rates["make"])["median"] / manifest.num_distinct_clips,
        cpu_seconds_per_clip=quantiles(cpu["make"])["median"],
        cpu_ms_per_clip_by_step=steps,
        peak_memory_bytes=peak_memory_bytes(),
        num_bad=num_bad,
        cache="warm",
        ceiling={"clips_per_second": ceiling, "clips_per_second_wall": quantiles(rates["bare"])},
        share_of_ceiling=quantiles(cpu_shares),
        share_of_ceiling_without_start=quantiles(steady_shares),
        start_cpu_seconds=start,
        share_of_ceiling_wall=quantiles(shares),
        target=TARGET,
        note=args.note,
    )
    print(append_row(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
