"""Does pretraining here teach anything about real sounds? A linear probe on ESC-10, beside random weights and log-mel.

    python benchmarks/esc10_probe.py --videos FOLDER --esc ESC-50 [--out runs/esc10] [-- OPTIONS OF TRAIN.PY]

generates videos of sounding objects, cuts them and the videos of FOLDER (which must have sound) into shards, pretrains
(`tiny-sounds:within-both`, minutes on two cores), and classifies ESC-10 with tools/classify_audio.py: the network, the
same with several random weights, and log-mel statistics. Nothing of ESC-50 is seen in pretraining. Each step is a
command, printed before it runs; a second run takes up what is finished. The figures are in OUT/results.jsonl.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shards.manifest import write_atomically
from shards.pool import usable_cores
from shards.sources import videos_of_folder

ROOT = Path(__file__).resolve().parents[1]


def run_step(title: str, command: list[str], **variables: str) -> None:
    """Print a step and run it from the project's folder, with further environment variables.

    Raises:
        SystemExit: it failed; its own message is on the terminal.
    """
    print(f"\n== {title}\n$ {shlex.join(command)}", flush=True)
    began = time.monotonic()
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=False).returncode
    if code != 0:
        raise SystemExit(
            f"esc10_probe: '{title}' ended with exit status {code}; mend it and run the same command again"
        )
    print(f"-- {time.monotonic() - began:.0f} s", flush=True)


def write_list(path: Path, folders: list[Path]) -> None:
    """All videos of some folders, one path per line."""
    names = [f"{folder / video.video_id}\n" for folder in folders for video in videos_of_folder(str(folder))]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(names).encode("utf-8", "surrogateescape"))


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 when the figures are there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--videos", type=Path, required=True, help="folder of real videos with sound")
    add("--esc", type=Path, required=True, help="ESC-50's folder")
    add("--out", type=Path, default=Path("runs/esc10"), help="default: runs/esc10")
    add("--world-videos", type=int, help="generated videos beside the real ones (default: as many as these)")
    add("--steps", type=int, help="of pretraining (default: the preset's)")
    add("--seed", type=int, default=0, help="of pretraining")
    add("--random-networks", type=int, default=3, help="default: 3")
    add("--features", nargs="+", default=["map"], help="see tools/classify_audio.py (default: map)")
    add("options", nargs="*", help="after --: for train.py, such as -- --loss.negatives batch")
    args = parser.parse_args(argv)
    out, videos, esc = (path.expanduser().resolve() for path in (args.out, args.videos, args.esc))
    python, cores = sys.executable, usable_cores()
    began = time.monotonic()

    folders = [videos]
    num_world = len(videos_of_folder(str(videos))) if args.world_videos is None else args.world_videos
    if num_world:
        world = out / "world"
        command = [python, "tools/make_world.py", "--out", str(world), "--test-videos", "1"]
        run_step("generate a world", [*command, "--train-videos", str(num_world)])
        folders.append(world / "train")
    write_list(out / "videos.txt", folders)
    command = [python, "tools/make_shards.py", "--videos", "/", "--list", str(out / "videos.txt")]
    command += ["--out", str(out / "shards"), "--preset", "veryfast", "--max-clips", "60"]
    run_step("cut all videos into shards", command)
    ranks = min(2, cores)
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [
        "train.py",
        "tiny-sounds:within-both",
        "--run-dir",
        str(out),
        "--loader.shards",
        str(out / "shards"),
    ]
    command += ["--seed", str(args.seed)]
    if args.steps is not None:
        command += ["--max-steps", str(args.steps)]
    command += args.options
    run_step("pretrain", command, OMP_NUM_THREADS="1")
    command = [python, "-m", "tools.classify_audio", str(out), "--dataset", "esc10", "--data", str(esc)]
    command += ["--out", str(out / "evaluation"), "--results", str(out / "results.jsonl")]
    command += ["--random-networks", str(args.random_networks), "--features", *args.features]
    run_step("classify ESC-10", command)
    print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes; figures: {out / 'results.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
