"""Everything from videos to a report: generate a world (or take your videos), make shards, pretrain, evaluate.

    python tools/demo.py                      # what `make demo` runs
    python tools/demo.py --videos FOLDER      # on your own videos, without figures that need ground truth

Each step is a command of its own, printed before it runs. A second run takes up what is finished.
"""

import argparse
import functools
import hashlib
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from shards.manifest import read_manifest
from shards.pool import usable_cores
from shards.sources import videos_of_folder

ROOT = Path(__file__).resolve().parents[1]
TRAIN_VIDEOS = 800
TEST_VIDEOS = (
    560  # half of them easy, nine in ten of those with the sounding object in view: 256 to retrieve from
)
WORLD_SLOTS = 4
"""Seconds taken of a generated training video; they last 4 to 10."""
BATCH = 32


def run_step(title: str, command: list[str], run_dir: Path, **variables: str) -> None:
    """Print a step and run it from the project's folder, with further environment variables.

    Raises:
        SystemExit: the step failed; its own message is on the terminal.
    """
    print(f"\n== {title}\n$ {shlex.join(command)}", flush=True)
    started = time.monotonic()
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=False).returncode
    if code != 0:
        raise SystemExit(
            f"demo: '{title}' ended with exit status {code}; mend what it says above and run it again, "
            f"or start over: rm -r {run_dir}"
        )
    print(f"-- {time.monotonic() - started:.0f} s", flush=True)


def run_name(videos: Path) -> str:
    """The folder's name, with a digest of its path, since many folders are called "videos"."""
    return f"{videos.name}-{hashlib.blake2b(os.fsencode(videos), digest_size=3).hexdigest()}"


def choose_videos(folder: Path, limit: int, list_path: Path) -> list[str]:
    """Arguments for make_shards: the whole folder, or a random choice of `limit` videos when it holds more."""
    arguments = ["--videos", str(folder)]
    videos = videos_of_folder(str(folder))
    if len(videos) > limit:
        chosen = sorted(np.random.default_rng(0).choice(len(videos), limit, replace=False))
        list_path.parent.mkdir(parents=True, exist_ok=True)
        names = "".join(f"{videos[index].video_id}\n" for index in chosen)
        list_path.write_bytes(names.encode("utf-8", "surrogateescape"))
        print(f"{folder} holds {len(videos)} videos; the demo takes {limit} of them (--max-videos)")
        arguments += ["--list", str(list_path)]
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 when the report is written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--videos", type=Path, help="folder of your own videos in place of the generated world"
    )
    parser.add_argument(
        "--run", type=Path, help="run folder (default: runs/demo, or runs/demo-NAME of your folder)"
    )
    parser.add_argument(
        "--steps", type=int, help="optimization steps (default: the preset's; 300 on your videos)"
    )
    parser.add_argument(
        "--max-videos", type=int, default=300, help="at most so many of your videos (default: 300)"
    )
    parser.add_argument("--train-videos", type=int, default=TRAIN_VIDEOS, help="of the generated world")
    parser.add_argument("--test-videos", type=int, default=TEST_VIDEOS, help="of the generated world")
    args = parser.parse_args(argv)
    for name in ("steps", "max_videos", "train_videos", "test_videos"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    if args.videos is not None:
        args.videos = args.videos.expanduser().resolve()
        if not args.videos.is_dir():
            parser.error(f"--videos {args.videos}: no such folder")
    started = time.monotonic()

    python = sys.executable
    default = "runs/demo" if args.videos is None else f"runs/demo-{run_name(args.videos)}"
    run_dir = Path(default) if args.run is None else args.run.resolve()
    absolute = ROOT / run_dir
    step = functools.partial(run_step, run_dir=absolute)
    train_shards, test_shards = run_dir / "shards/train", run_dir / "shards/test"
    steps = args.steps
    if args.videos is None:
        world = run_dir / "world"
        videos = ["--train-videos", str(args.train_videos), "--test-videos", str(args.test_videos)]
        step(
            "generate a world of sounding objects",
            [python, "tools/make_world.py", "--out", str(world), *videos],
        )
        make = [python, "tools/make_shards.py", "--preset", "veryfast"]
        source = ["--videos", str(world / "train"), "--max-clips", str(WORLD_SLOTS)]
        step("cut the training videos into shards", [*make, *source, "--out", str(train_shards)])
        source = ["--videos", str(world / "test"), "--max-clips", "2", "--split", "test"]
        step("cut the unseen test videos into shards", [*make, *source, "--out", str(test_shards)])
        truth = ["--world", str(world)]
    else:
        steps = steps or 300
        source = choose_videos(args.videos, args.max_videos, absolute / "videos.txt")
        make = [python, "tools/make_shards.py", *source, "--out", str(train_shards)]
        step(f"cut the videos of {args.videos} into shards", make)
        test_shards, truth = train_shards, []

    num_videos = read_manifest(ROOT / train_shards).num_videos
    if num_videos < 2:
        report = ROOT / train_shards / "report.csv"
        raise SystemExit(
            f"demo: {num_videos} video gave clips, contrastive learning needs at least 2; see {report}"
        )
    ranks = min(2, usable_cores())
    torchrun = [
        python,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
    ]  # torchrun
    train = [*torchrun, "train.py", "demo", "--run-dir", str(run_dir), "--loader.shards", str(train_shards)]
    if num_videos < BATCH:
        train += ["--loader.global-batch-size", str(num_videos - num_videos % ranks)]
    if steps is not None:
        train += ["--max-steps", str(steps)]
    step(
        "pretrain", train, OMP_NUM_THREADS="1"
    )  # what torchrun would set, with a warning; train.py sets more
    command = "make demo" if args.videos is None else f"make demo VIDEOS={args.videos}"
    evaluate = [
        python,
        "tools/evaluate_demo.py",
        "--run",
        str(run_dir),
        "--shards-test",
        str(test_shards),
        *truth,
    ]
    step("evaluate", [*evaluate, "--command", command])

    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.")
    print(f"Open {absolute / 'report.html'} in a browser; the figures are in {absolute / 'metrics.json'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
