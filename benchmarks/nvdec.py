"""Does the GPU's decoder take the clips that shards hold, and how fast, over the number of sessions?

    python benchmarks/nvdec.py --shards FOLDER [--threads 1 2 4 8 16 32] [--num-clips 512] [--rounds 3] [--note TEXT]

Clips are in memory already; each is decoded by DALI with as many sessions as it has threads, cropped and flipped,
and its log-mel computed, as in loader backend dali-gpu. Once with all clips of the most common frame size (a decoder
can be kept) and once with all sizes mixed. First eight clips of each size are compared with the CPU's decoding: the
PSNR is that of the worst. `decoder` is the utilization that nvidia-smi reports, the mean of samples while it runs.
Without a GPU it says so and exits 1.
"""

import argparse
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.common import append_row, make_row, peak_memory_bytes, quantiles  # noqa: E402
from loaders.augment import draw_augmentation  # noqa: E402
from loaders.config import AudioConfig, LoaderConfig, VideoConfig  # noqa: E402
from loaders.decode import decode_frames, waveform_samples  # noqa: E402
from shards.manifest import read_manifest  # noqa: E402
from shards.reader import RawClip, ShardReader  # noqa: E402

BATCH_SIZE = 32
CHECKED = 8  # clips of each size
LEAST_PSNR = 40.0
TARGET_CLIPS_PER_SECOND = 1000.0


def main() -> None:
    arguments = parse()
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks/nvdec.py: torch sees no CUDA device, expected one with a hardware decoder (NVDEC)"
        )
    from loaders.dali_video import DaliDecoder  # here: needs DALI

    clips = read_clips(arguments.shards, arguments.num_clips)
    sizes = Counter((clip.info.frame_width, clip.info.frame_height) for clip in clips)
    console, rows = Console(), []
    for size in sizes:
        checked = [clip for clip in clips if (clip.info.frame_width, clip.info.frame_height) == size][
            :CHECKED
        ]
        decibels = worst_psnr(DaliDecoder, checked, arguments.shards)
        console.print(f"{size[0]}x{size[1]}: {sizes[size]} clips, worst of {len(checked)}: {decibels:.1f} dB")
        if decibels < LEAST_PSNR:
            sys.exit(f"frames of {size} differ from the CPU's: {decibels:.1f} dB, expected {LEAST_PSNR:g}")
    common = sizes.most_common(1)[0][0]
    same = [clip for clip in clips if (clip.info.frame_width, clip.info.frame_height) == common]
    contenders = {
        (threads, name): (some, LoaderConfig(shards=arguments.shards, dali_threads=threads))
        for threads in arguments.threads
        for name, some in ((f"{common[0]}x{common[1]}", same), ("all sizes", clips))
    }
    rates: dict[tuple[int, str], list[float]] = {key: [] for key in contenders}
    busy: dict[tuple[int, str], list[float]] = {key: [] for key in contenders}
    for _ in range(arguments.rounds):
        for key, (some, config) in contenders.items():
            rate, utilization = measure(DaliDecoder, some, config)
            rates[key].append(rate)
            busy[key] += utilization
    table = Table("threads", "clips", "clips/s", "20 %", "80 %", "decoder", title="NVDEC through DALI")
    for (threads, name), values in rates.items():
        spread = quantiles(values)
        load = float(np.mean(busy[threads, name])) if busy[threads, name] else None
        table.add_row(
            str(threads), name, f"{spread['median']:,.0f}", f"{spread['p20']:,.0f}", f"{spread['p80']:,.0f}",
            "unknown" if load is None else f"{load:.0f} %",
        )  # fmt: skip
        row = make_row(
            "nvdec",
            f"{name}, {threads} threads",
            {
                "threads": threads,
                "batch_size": BATCH_SIZE,
                "sizes": {f"{w}x{h}": n for (w, h), n in sizes.items()},
            },
            clips_per_second=spread,
            repeats=len(values),
            peak_memory_bytes=peak_memory_bytes(),
            peak_gpu_memory_bytes=used_gpu_memory(),
            cache="in memory",
            note=arguments.note,
            decoder_utilization_percent=load,
        )
        rows.append(append_row(row))
    console.print(table)
    best = max(quantiles(values)["median"] for values in rates.values())
    console.print(f"best {best:,.0f} clips/s, wanted at least {TARGET_CLIPS_PER_SECOND:,.0f}")
    print(rows[-1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", required=True, help="folder written by tools/make_shards.py")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument(
        "--num-clips", type=int, default=512, help="decoded per measurement, repeated as needed"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default=None, help="kept in the result rows")
    return parser.parse_args()


def read_clips(folder: str, num_clips: int) -> list[RawClip]:
    clips = []
    for shard in read_manifest(folder).shards:
        with ShardReader(Path(folder) / shard.name) as reader:
            clips += [reader.read(position) for position in range(len(reader))]
        if len(clips) >= num_clips:
            break
    return [clips[number % len(clips)] for number in range(num_clips)]


def encoded(clips: list[RawClip], config: LoaderConfig):
    from loaders.dali_video import EncodedClips

    infos = [clip.info for clip in clips]
    return EncodedClips(
        videos=[clip.video for clip in clips],
        sizes=[(info.frame_width, info.frame_height) for info in infos],
        waveforms=[waveform_samples(clip.audio) for clip in clips],
        augmentations=[
            draw_augmentation(
                config.video, config.audio, 0, 0, info.key, info.frame_height, info.frame_width, 101
            )
            for info in infos
        ],
    )


def worst_psnr(decoder_type, clips: list[RawClip], shards: str) -> float:
    """Of the center crops of clips, dB, by the GPU's decoder beside the CPU's."""
    still = LoaderConfig(
        shards=shards, video=VideoConfig(augment=False), audio=AudioConfig(augment=False), dali_threads=4
    )
    device = torch.device("cuda", torch.cuda.current_device())
    decoder = decoder_type(still, len(clips), device)
    batch = encoded(clips, still)
    decoder.submit(batch)
    decoded = decoder.take()
    if decoded.faults:
        sys.exit(f"the GPU does not decode {len(decoded.faults)} of {len(clips)} clips: {decoded.faults}")
    worst = float("inf")
    for frames, clip, done in zip(decoded.frames.cpu(), clips, batch.augmentations):
        window = (done.crop_top, done.crop_left, done.crop_size, done.crop_size)
        expected = decode_frames(clip.video, range(32), 144, window=window).astype(float)
        error = np.square(frames.numpy() - expected).mean()
        worst = min(worst, 10 * np.log10(255**2 / max(error, 1e-9)))
    return worst


def measure(decoder_type, clips: list[RawClip], config: LoaderConfig) -> tuple[float, list[float]]:
    """(clips per second, utilization of the decoder in percent, sampled)."""
    device = torch.device("cuda", torch.cuda.current_device())
    batches = [
        encoded(clips[start : start + BATCH_SIZE], config) for start in range(0, len(clips), BATCH_SIZE)
    ]
    decoder = decoder_type(config, BATCH_SIZE, device)
    for batch in batches[:4]:  # decoders are created
        decoder.submit(batch)
        decoder.take()
    torch.cuda.synchronize()
    samples: list[float] = []
    done = threading.Event()
    sampler = threading.Thread(target=sample_decoder, args=(samples, done))
    sampler.start()
    start, taken, pending = time.perf_counter(), 0, iter(batches)
    submitted = 0
    while taken < len(batches):
        while decoder.has_room and submitted < len(batches):
            decoder.submit(next(pending))
            submitted += 1
        assert not decoder.take().faults
        taken += 1
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    return len(clips) / seconds, samples


def sample_decoder(samples: list[float], done: threading.Event) -> None:
    command = ["nvidia-smi", "--query-gpu=utilization.decoder", "--format=csv,noheader,nounits"]
    while shutil.which("nvidia-smi") and not done.wait(0.2):
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        value = result.stdout.split("\n")[0].strip()
        if value.isdigit():
            samples.append(float(value))


def used_gpu_memory() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


if __name__ == "__main__":
    main()
