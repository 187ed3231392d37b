"""What a run's figures cost: steps that measure gradient norms beside steps that do not, and a log row.

    python benchmarks/logging_overhead.py [--preset demo] [--batch 8] [--device cpu] [--rounds 10] [--note TEXT]

Each round takes a plain step, a step that measures gradient norms and writes a row (log.jsonl, TensorBoard and a plain
line, into a temporary folder), in turn. Clips are noise and already in memory. The share of a run follows from the
preset's `gradient_norms_every` and `log_every`. Needs no data; the demo's preset takes about a minute on two CPU cores.
"""

import argparse
import contextlib
import dataclasses
import io
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks.common import RESULTS, append_row, make_row, quantiles  # noqa: E402
from benchmarks.timing import finite, milliseconds, ratios, time_interleaved  # noqa: E402
from cmac.config import PRESETS, RunConfig, config_to_dict  # noqa: E402
from cmac.meter import Meter  # noqa: E402
from cmac.pretrain import Pretraining  # noqa: E402
from cmac.run_log import RunLog  # noqa: E402
from loaders.batch import ClipBatch  # noqa: E402

PLAIN, MEASURING, ROW = "step", "step that measures gradients", "row"
ENDLESS = 10**9


def noise(config: RunConfig, device: torch.device) -> ClipBatch:
    """A batch of the run's shapes on the device."""
    num_clips, video, audio = config.loader.global_batch_size, config.loader.video, config.loader.audio
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(
        0,
        256,
        (num_clips, 3, video.num_frames, video.crop_size, video.crop_size),
        dtype=torch.uint8,
        generator=generator,
    )
    batch = ClipBatch(
        frames=frames.contiguous(memory_format=torch.channels_last_3d),
        log_mel=torch.randn(num_clips, 1, audio.num_mel_bins, 101, generator=generator),
        keys=tuple(map(str, range(num_clips))),
        video_ids=torch.arange(num_clips),
        valid=torch.ones(num_clips, dtype=torch.bool),
        clips=(None,) * num_clips,
        augmentations=(None,) * num_clips,
        bad=(),
        epoch=0,
        step=0,
    )
    return batch.to(device)


def main() -> None:
    """Time, print a table and one JSON document, and append a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="demo")
    parser.add_argument("--batch", type=int, default=8, help="clips of a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--max-seconds", type=float, default=90.0)
    parser.add_argument("--note", default=None)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()

    device = torch.device(args.device)
    config = PRESETS[args.preset]()
    config = dataclasses.replace(
        config,
        device=device.type,
        epochs=ENDLESS,
        max_steps=None,
        precision="auto",
        loader=dataclasses.replace(config.loader, global_batch_size=args.batch),
    )
    batch = noise(config, device)
    plain = dataclasses.replace(config, gradient_norms_every=0)
    measuring = dataclasses.replace(config, gradient_norms_every=1)
    training = Pretraining(plain, device, steps_per_epoch=1000)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        meter, log = Meter(training), RunLog(Path(folder), ENDLESS, 0)

        def step(settings: RunConfig) -> None:
            training.config = settings
            meter.add(training.train_step(batch), batch)

        def write_row() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                log.write(meter.row())

        times, failed = time_interleaved(
            {
                PLAIN: [lambda _: step(plain)],
                MEASURING: [lambda _: step(measuring)],
                ROW: [lambda _: write_row()],
            },
            device,
            rounds=args.rounds,
            warm_up=2,
            max_seconds=args.max_seconds,
        )
        log.close()
    for name, reason in failed.items():
        raise SystemExit(f"{name}: {reason}")
    seconds = {name: [taken["wall"] for taken in rounds] for name, rounds in times.items()}
    ratio = ratios(seconds[PLAIN], seconds[MEASURING])
    median = {name: quantiles(values)["median"] for name, values in seconds.items()}
    every, log_every = config.gradient_norms_every, config.log_every
    shares = {
        "gradient_norms": (median[MEASURING] - median[PLAIN]) / every / median[PLAIN] if every else 0.0,
        "rows": median[ROW] / log_every / median[PLAIN],
    }
    print(f"{args.preset}, {args.batch} clips on {device}, median of {len(seconds[PLAIN])} rounds")
    for name, value in median.items():
        print(f"{name:32}{1000 * value:10.1f} ms")
    print(f"measuring / plain: {ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})")
    print(f"of a run's steps: gradient norms every {every} steps {shares['gradient_norms']:.2%}, ", end="")
    print(f"rows every {log_every} steps {shares['rows']:.2%}")
    row = make_row(
        "logging_overhead",
        args.preset,
        {**config_to_dict(config), "batch": args.batch},
        clips_per_second=quantiles([args.batch / value for value in seconds[PLAIN]]),
        repeats=len(seconds[PLAIN]),
        milliseconds={name: milliseconds(values) for name, values in seconds.items()},
        ratio=ratio,
        shares=shares,
        note=args.note,
    )
    print(append_row(finite(row), args.results))


if __name__ == "__main__":
    main()
