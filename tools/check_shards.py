"""Verify a folder of shards against its manifest, print what is in it, and draw a contact sheet.

    python tools/check_shards.py OUT [--decode] [--contact-sheet FILE] [--log-mel-stats [N]]

Every shard's size and SHA-256 are compared with the manifest, every clip's checksums with its key.json, the
index with the tar, and slots with each other. A contact sheet that cannot be written is told and changes nothing.
Exit status: 0 if all is well, 1 if there are problems, 2 for wrong input.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from shards import storage
from shards.check import CheckResult, check_shards, spread_clips, waveform, write_contact_sheet
from shards.manifest import Manifest, ShardEntry, read_manifest
from shards.progress import LINE_SECONDS, print_any_name

DEFAULT_SHEET = "contact_sheet.png"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="check_shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="OUT", help="folder written by make_shards")
    parser.add_argument("--decode", action="store_true", help="decode the video of every clip, too")
    parser.add_argument(
        "--contact-sheet",
        metavar="FILE",
        help=f"PNG with middle frames and waveforms (default: OUT/{DEFAULT_SHEET}; '' for none)",
    )
    parser.add_argument(
        "--clips", type=int, default=48, metavar="N", help="on the contact sheet (default: 48)"
    )
    parser.add_argument(
        "--log-mel-stats",
        type=int,
        nargs="?",
        const=1000,
        metavar="N",
        help="mean and standard deviation of the log-mel of up to N clips (default: 1000)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = build_parser().parse_args(argv)
    print_any_name()
    try:
        if args.clips < 1 or (args.log_mel_stats is not None and args.log_mel_stats < 1):
            raise ValueError("--clips and --log-mel-stats expect at least 1")
        if storage.is_url(args.folder):
            raise ValueError(
                f"{args.folder} is a URL, expected a folder of this machine; copy it, or let make_shards --verify "
                f"compare the checksums there"
            )
        progress = _Progress(read_manifest(args.folder))
        result = check_shards(args.folder, decode=args.decode, on_shard=progress.shard_done)
    except (ValueError, OSError) as error:
        return _fail(error)
    print(_describe(result))
    for problem in result.problems:
        print(f"PROBLEM {problem}", file=sys.stderr)
    if result.problems:
        print(f"check_shards: {len(result.problems)} problems in {args.folder}", file=sys.stderr)
    else:
        print("all is well")
    sys.stdout.flush()
    if args.contact_sheet != "":
        sheet = args.contact_sheet or str(Path(args.folder) / DEFAULT_SHEET)
        try:
            num_clips = write_contact_sheet(sheet, args.folder, result.manifest, args.clips)
            print(f"contact sheet of {num_clips} clips: {sheet}")
        except OSError as error:
            _fail(f"no contact sheet ({error}); choose another place with --contact-sheet FILE")
        except ValueError as error:
            _fail(f"no contact sheet ({error})")
    status = 1 if result.problems else 0
    if args.log_mel_stats is not None:
        try:
            print(_log_mel_stats(args.folder, result.manifest, args.log_mel_stats))
        except (ValueError, OSError) as error:
            failed = _fail(error)
            return status or failed
    return status


def _fail(error: object) -> int:
    print(f"check_shards: {error}", file=sys.stderr)
    return 2


class _Progress:
    """A line on standard error now and then."""

    def __init__(self, manifest: Manifest) -> None:
        self.num_shards = len(manifest.shards)
        self.num_bytes = sum(entry.bytes for entry in manifest.shards)
        self.shards_done = self.bytes_done = 0
        self.begin = self.last = time.monotonic()

    def shard_done(self, entry: ShardEntry) -> None:
        self.shards_done += 1
        self.bytes_done += entry.bytes
        now = time.monotonic()
        if now - self.last < LINE_SECONDS:
            return
        self.last = now
        elapsed = now - self.begin
        left = elapsed * (self.num_bytes / max(self.bytes_done, 1) - 1)
        print(
            f"{self.shards_done}/{self.num_shards} shards  {self.bytes_done / 1e9:.2f} of {self.num_bytes / 1e9:.2f} "
            f"GB  {elapsed:.0f} s, about {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def _describe(result: CheckResult) -> str:
    manifest, counts = result.manifest, result.statistics
    lines = [
        f"{manifest.split}: {counts.num_videos} videos in {manifest.num_slots} slots, "
        f"{counts.num_clips} clips ({counts.num_distinct_clips} different), {len(manifest.shards)} shards, "
        f"{manifest.num_bytes / 1e6:.1f} MB",
        f"made with seed {manifest.seed}, "
        f"{', '.join(f'{k} {v}' for k, v in sorted(manifest.settings.items()))}",
    ]
    if manifest.skipped:
        skipped = ", ".join(f"{reason} {count}" for reason, count in sorted(manifest.skipped.items()))
        lines.append(f"skipped {sum(manifest.skipped.values())} videos: {skipped}")
    if counts.num_clips:
        lines += [
            f"bytes per clip: video {counts.video_bytes / counts.num_clips:.0f}, "
            f"audio {counts.audio_bytes / counts.num_clips:.0f}",
            f"frame sizes: {_most_common(counts.frame_sizes)}",
            f"source sizes: {_most_common(counts.source_sizes)}",
            f"source frames per second: {_quantiles(counts.source_fps)}",
            f"loudness, dBFS: {_quantiles(counts.loudness_dbfs)}",
            "videos by number of different seconds: "
            + ", ".join(
                f"{seconds} s: {count}" for seconds, count in sorted(counts.seconds_per_video.items())
            ),
        ]
    if counts.labels:
        lines.append(f"{len(counts.labels)} labels: {_most_common(counts.labels)}")
    text = "\n".join(lines)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _most_common(counter: Counter, num: int = 8) -> str:
    parts = [
        f"{'x'.join(map(str, value)) if isinstance(value, tuple) else value} {count}"
        for value, count in counter.most_common(num)
    ]
    return ", ".join(parts + (["..."] if len(counter) > num else []))


def _quantiles(counter: Counter[float]) -> str:
    values = np.repeat(list(counter), list(counter.values()))
    low, q20, median, q80, high = np.quantile(values, (0, 0.2, 0.5, 0.8, 1))
    return f"median {median:.2f}, 20-80 % {q20:.2f} to {q80:.2f}, all {low:.2f} to {high:.2f}"


def _log_mel_stats(folder: str, manifest: Manifest, num_clips: int) -> str:
    """Needs torch, which checking does not."""
    import torch

    from loaders.audio_ops import log_mel_statistics
    from loaders.config import AudioConfig

    waveforms = [
        torch.from_numpy(waveform(clip).astype(np.float32) / 32768)
        for clip in spread_clips(folder, manifest, num_clips)
    ]
    mean, std = log_mel_statistics(waveforms, AudioConfig())
    return f"log-mel of {len(waveforms)} clips: mean {mean:.3f}, standard deviation {std:.3f}"


if __name__ == "__main__":
    sys.exit(main())
