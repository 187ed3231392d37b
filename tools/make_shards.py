"""Turn videos into tar shards of 1-second clips with sound.

    python tools/make_shards.py --videos FOLDER --out OUT [--csv FILE | --list FILE] [--split train]

OUT gets {split}-slot{SS}-{NNNNNN}.tar and .idx, manifest.json, and report.csv with one line per video.
Running the same command again goes on where a stopped run was, makes shards again that are missing or cut, and
does nothing when all is done. FOLDER, FILE and OUT may be URLs (s3://..., gs://...).

On more than one machine, with the same bytes as result:

    python tools/make_shards.py ... --engine ray --ray-address auto --workers 512
    python tools/make_shards.py ... --engine slurm --workers 64 --slurm-option partition=cpu --slurm-option time=60

All machines have to have this project installed and reach FOLDER, OUT and the work area (OUT/.work, or --work) under
the same names. Exit status: 0 (also when some videos were skipped), 1 if no video gave a clip or the machine failed, 2
for wrong input, 130 after Ctrl-C.
"""

import argparse
import signal
import sys
from types import FrameType

from shards.engines import ENGINES, EngineConfig
from shards.make import Estimate, NothingKept, ShardConfig, estimate_shards, make_shards
from shards.manifest import Manifest
from shards.media import SourceLimits
from shards.pool import JobFailed, usable_cores
from shards.progress import TextProgress, print_any_name
from shards.slicing import SliceSettings


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make_shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--videos", required=True, metavar="FOLDER", help="folder of videos, searched with all folders in it")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--csv",
        metavar="FILE",
        help="annotations of Kinetics, AudioSet or VGGSound, told apart by their first lines",
    )
    source.add_argument("--list", metavar="FILE", help="file with one path per line, relative to --videos")
    add("--class-names", metavar="FILE", help="AudioSet's class_labels_indices.csv, for labels with names")
    add("--out", required=True, metavar="OUT", help="folder for the shards of one split")
    add("--split", default="train", help="name that shards start with, and split of the csv (default: train)")
    add("--seed", type=int, default=0, help="for the order of videos and the choice of seconds (default: 0)")
    add(
        "--workers",
        type=int,
        default=usable_cores(),
        metavar="N",
        help="videos at the same time; with --engine slurm, Slurm jobs (default: all cores of this machine)",
    )
    add("--engine", choices=ENGINES, default="local", help="what runs the workers (default: local)")
    add(
        "--ray-address",
        metavar="ADDRESS",
        help="Ray cluster to join: auto, or host:port (default: a Ray of this machine)",
    )
    add(
        "--slurm-chunk",
        type=int,
        default=EngineConfig.slurm_chunk,
        metavar="N",
        help=f"videos per Slurm job (default: {EngineConfig.slurm_chunk})",
    )
    add(
        "--slurm-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of sbatch, may be repeated: partition=cpu, time=04:00:00, account=x, cpus-per-task=8, mem=16G; "
        "also folder=PATH for the files of the Slurm jobs",
    )
    add(
        "--work",
        metavar="LOCATION",
        help="folder or URL for what workers leave until it is in shards (default: OUT/.work)",
    )
    add(
        "--verify",
        action="store_true",
        help="of finished shards, compare SHA-256 and not only sizes; what differs is made again",
    )
    add(
        "--max-clips", type=int, default=10, metavar="N", help="slots = seconds kept of a video (default: 10)"
    )
    add(
        "--max-seconds", type=int, default=60, metavar="N", help="read only the first N seconds (default: 60)"
    )
    add("--videos-per-shard", type=int, default=1000, metavar="N", help="default: 1000, about 70 MB")
    add(
        "--silence-dbfs",
        type=float,
        default=-60.0,
        metavar="DB",
        help="drop seconds whose sound is quieter than this, root mean square (default: -60; -120 keeps all)",
    )
    add("--crf", type=int, default=23, help="x264 quality, lower is better and larger (default: 23)")
    add("--preset", default="medium", help="x264 preset (default: medium)")
    add(
        "--timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="for one pass over a video (default: 300)",
    )
    add(
        "--max-source-gib",
        type=float,
        default=ShardConfig.max_source_bytes / 2**30,
        metavar="GIB",
        help=f"leave out larger files (default: {ShardConfig.max_source_bytes / 2**30:g})",
    )
    add(
        "--skip-unavailable",
        action="store_true",
        help="leave out videos whose URLs are refused (401, 403, 410 ...) or cannot be read while others can; if not "
        "given, the first stops the run, as that is how expired credentials and a lost network look, too",
    )
    add(
        "--max-pixels",
        type=int,
        default=SourceLimits.max_pixels,
        metavar="N",
        help=f"leave out videos with larger pictures (default: {SourceLimits.max_pixels})",
    )
    add(
        "--max-hours",
        type=float,
        default=SourceLimits.max_hours,
        metavar="H",
        help=f"leave out longer videos (default: {SourceLimits.max_hours:g})",
    )
    add(
        "--max-memory-gib",
        type=float,
        default=SourceLimits.max_memory_bytes / 2**30,
        metavar="GIB",
        help=f"for one video (default: {SourceLimits.max_memory_bytes / 2**30:g})",
    )
    add("--dry-run", action="store_true", help="slice a few videos and estimate clips, bytes and time")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = build_parser().parse_args(argv)
    print_any_name()
    # A plain kill ends the workers and their ffmpeg too.
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        config = ShardConfig(
            videos=args.videos,
            out=args.out,
            csv=args.csv,
            class_names=args.class_names,
            list_file=args.list,
            split=args.split,
            seed=args.seed,
            workers=args.workers,
            videos_per_shard=args.videos_per_shard,
            engine=EngineConfig(
                name=args.engine,
                ray_address=args.ray_address,
                slurm_chunk=args.slurm_chunk,
                slurm_options=tuple(map(_key_value, args.slurm_option)),
            ),
            work=args.work,
            verify=args.verify,
            timeout_seconds=args.timeout,
            max_source_bytes=round(args.max_source_gib * 2**30),
            skip_unavailable=args.skip_unavailable,
            limits=SourceLimits(
                max_pixels=args.max_pixels,
                max_hours=args.max_hours,
                max_memory_bytes=round(args.max_memory_gib * 2**30),
            ),
            slicing=SliceSettings(
                max_clips=args.max_clips,
                max_seconds=args.max_seconds,
                silence_dbfs=args.silence_dbfs,
                crf=args.crf,
                preset=args.preset,
            ),
        )
        with TextProgress() as progress:
            if args.dry_run:
                print(_describe_estimate(estimate_shards(config, progress)))
            else:
                manifest = make_shards(config, progress)
                print(_describe(manifest, args.out))
    except NothingKept as error:
        return _fail(error, 1)
    except ValueError as error:
        return _fail(error, 2)
    except (OSError, JobFailed) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again, it goes on where it stopped", 130)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _key_value(text: str) -> tuple[str, str | bool]:
    """KEY=VALUE, or KEY alone for an option without a value."""
    key, equals, value = text.partition("=")
    key = key.strip().lstrip("-")
    if not key:
        raise ValueError(f"--slurm-option is {text!r}, expected KEY=VALUE, for example partition=cpu")
    return key, value if equals else True


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(error: object, status: int) -> int:
    text = str(error).encode("utf-8", "backslashreplace").decode("utf-8")
    print(f"make_shards: {text}", file=sys.stderr)
    return status


def _describe(manifest: Manifest, out: str) -> str:
    lines = [
        f"{manifest.num_videos} videos kept: {manifest.num_distinct_clips} different seconds, "
        f"{manifest.num_clips} clips in {manifest.num_slots} slots, {len(manifest.shards)} shards, "
        f"{manifest.num_bytes / 1e6:.1f} MB in {out}"
    ]
    if manifest.skipped:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(manifest.skipped.items()))
        lines.append(f"{sum(manifest.skipped.values())} videos skipped: {reasons} (report.csv has each)")
    return "\n".join(lines)


def _describe_estimate(estimate: Estimate) -> str:
    lines = [
        f"{estimate.num_videos} videos; sliced {estimate.num_sampled} of them, kept {estimate.num_kept}",
        f"expected: {estimate.num_distinct_clips} different seconds, {estimate.num_clips} clips, "
        f"{estimate.num_bytes / 1e9:.2f} GB, {estimate.seconds / 60:.1f} minutes (worker processes: "
        f"{estimate.workers}, each as fast as a core of this machine)",
    ]
    if estimate.skipped:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(estimate.skipped.items()))
        lines.insert(1, f"skipped in the sample: {reasons}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
