"""What finishing a clip's frames costs on a GPU: the fused kernel beside plain torch, torchvision and DALI.

    python benchmarks/frame_kernel.py [--num-clips 128] [--rounds 20] [--sweep] [--note TEXT]

Finishing is crop, YUV to RGB, flip, color jitter. All contenders start with their input in GPU memory and end
with uint8 frames there, are given the same draws, and are checked against the reference before anything is
timed. torchvision and DALI have no 4:2:0 input: they start from whole RGB frames, so the conversion is not in
their time, and are compared with the kernel on RGB. DALI's contrast is around a fixed grey instead of the
frame's mean and always comes before saturation: it is checked with contrast 1 and timed with the contrast drawn.

Each round runs every contender, in turn, once for each of two times: between CUDA events on the stream, the
work of the first millisecond queued before (what a training step sees), and of the wall from an idle device
(launches included). DALI has streams of its own, so it has wall time only. The ceiling is a copy in GPU memory
that moves as many bytes as the kernel has to.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.common import append_row, make_row, peak_memory_bytes, quantiles  # noqa: E402
from loaders.augment import ClipAugmentation, draw_augmentation, yuv_window_size  # noqa: E402
from loaders.config import AudioConfig, VideoConfig  # noqa: E402
from loaders.kernels.frames import finish_frames  # noqa: E402
from loaders.video_ops import (  # noqa: E402
    frame_parameters,
    yuv_windows_to_rgb,
)

TARGET_MICROSECONDS = 3.0
TARGET_RATIO = 5.0
WARM_UP = 5
BUSY_CYCLES = 2_000_000
"""The device counts for about 1 ms before an event-timed call, so that the work is queued when its time begins."""
HEIGHT, WIDTH = 144, 192
"""Of whole frames, as shards hold them."""
STATISTICS = {"mean": 0.45, "std": 0.225}

Contender = Callable[[], Tensor]
"""Finishes all clips; its result has the values of (N, T, H, W, 3) in any layout, see `channels_last`."""


class Inputs:
    """Clips in GPU memory in the forms that the contenders start from, and what is to be done to them."""

    def __init__(self, num_clips: int, num_frames: int, crop_size: int, device: torch.device) -> None:
        video = VideoConfig(crop_size=crop_size, num_frames=num_frames, color_jitter=True)
        self.crop_size = crop_size
        self.clips = [
            draw_augmentation(video, AudioConfig(), 0, 0, str(row), HEIGHT, WIDTH, 101)
            for row in range(num_clips)
        ]
        self.plain = [replace(clip, color_order=()) for clip in self.clips]
        side = yuv_window_size(crop_size)
        generator = torch.Generator(device).manual_seed(0)
        self.yuv = torch.randint(
            0, 256, (num_clips, num_frames, side * side * 3 // 2),
            dtype=torch.uint8, device=device, generator=generator,
        )  # fmt: skip
        # The same clips as whole RGB frames: the window where the crop is, black elsewhere.
        self.frames = torch.zeros(num_clips, num_frames, HEIGHT, WIDTH, 3, dtype=torch.uint8, device=device)
        self.crops = torch.empty(
            num_clips, num_frames, crop_size, crop_size, 3, dtype=torch.uint8, device=device
        )
        for row, clip in enumerate(self.clips):
            top, left = clip.crop_top, clip.crop_left
            window = yuv_windows_to_rgb(self.yuv[row])  # (T, side, side, 3)
            cut = window[:, top % 2 : top % 2 + crop_size, left % 2 : left % 2 + crop_size]
            self.crops[row] = cut
            self.frames[row, :, top : top + crop_size, left : left + crop_size] = cut
        self.parameters = frame_parameters(self.clips).to(device)
        self.plain_parameters = frame_parameters(self.plain).to(device)

    def finish(
        self, pixels: Tensor, parameters: Tensor, impl: str, dtype: torch.dtype = torch.uint8
    ) -> Tensor:
        return finish_frames(pixels, parameters, self.crop_size, **STATISTICS, dtype=dtype, impl=impl)


def torchvision_chain(inputs: Inputs) -> Contender:
    """torchvision.transforms.v2, clip by clip: each draws its own crop, flip and colors."""
    from torchvision.transforms.v2 import functional

    planes = inputs.frames.permute(0, 1, 4, 2, 3).contiguous()  # (N, T, 3, H, W), what torchvision likes best

    def run() -> Tensor:
        done = []
        for frames, clip in zip(planes, inputs.clips):
            frames = functional.crop(frames, clip.crop_top, clip.crop_left, clip.crop_size, clip.crop_size)
            if clip.flip:
                frames = functional.horizontal_flip(frames)
            for name in clip.color_order:
                frames = getattr(functional, f"adjust_{name}")(frames, getattr(clip, name))
            done.append(frames)
        return torch.stack(done).permute(0, 2, 1, 3, 4)  # (N, 3, T, H, W)

    return run


def dali_chain(inputs: Inputs, clips: list[ClipAugmentation]) -> Contender:
    """DALI: crop, flip, brightness and contrast, saturation, one pipeline."""
    from nvidia.dali import fn, pipeline_def, types

    device = "gpu" if inputs.frames.is_cuda else "cpu"

    @pipeline_def(
        batch_size=len(clips), num_threads=2, device_id=0 if device == "gpu" else None, prefetch_queue_depth=1
    )
    def pipeline():  # noqa: ANN202 (DALI's own type)
        frames = fn.external_source(name="frames", device=device, layout="FHWC", no_copy=True)
        numbers = {
            name: fn.external_source(name=name)
            for name in ("top", "left", "flip", "brightness", "contrast", "saturation")
        }
        frames = fn.crop(
            frames, crop=(inputs.crop_size, inputs.crop_size),
            crop_pos_y=numbers["top"], crop_pos_x=numbers["left"],
        )  # fmt: skip
        frames = fn.flip(frames, horizontal=numbers["flip"])
        frames = fn.brightness_contrast(
            frames, brightness=numbers["brightness"], contrast=numbers["contrast"], dtype=types.UINT8
        )
        return fn.saturation(frames, saturation=numbers["saturation"])

    pipe = pipeline()
    pipe.build()
    room_y, room_x = HEIGHT - inputs.crop_size, WIDTH - inputs.crop_size
    numbers = {
        "top": [np.float32(clip.crop_top / room_y) for clip in clips],
        "left": [np.float32(clip.crop_left / room_x) for clip in clips],
        "flip": [np.int32(clip.flip) for clip in clips],
        **{
            name: [np.float32(getattr(clip, name)) for clip in clips]
            for name in ("brightness", "contrast", "saturation")
        },
    }

    def run() -> Tensor:
        pipe.feed_input("frames", list(inputs.frames) if device == "gpu" else list(inputs.frames.numpy()))
        for name, values in numbers.items():
            pipe.feed_input(name, values)
        (frames,) = pipe.run()
        frames = frames.as_tensor()
        frames = torch.from_dlpack(frames) if device == "gpu" else torch.from_numpy(np.array(frames))
        return frames.permute(0, 4, 1, 2, 3)

    return run


def check(name: str, result: Tensor, expected: Tensor, levels: int, share: float) -> None:
    """Raises ValueError unless at most `share` of the values differ, by at most `levels`.

    torchvision and DALI round after each operation, the reference once: they may be 3 levels apart anywhere.
    """
    apart = (result.int() - expected.int()).abs()
    largest, part = int(apart.max()), float((apart > 0).float().mean())
    if result.shape != expected.shape or largest > levels or part > share:
        raise ValueError(
            f"{name}: {100 * part:.4f} % of values differ from the reference, by up to {largest} levels; expected "
            f"at most {100 * share:g} % and {levels}"
        )


def build_contenders(inputs: Inputs) -> tuple[dict[str, Contender], dict[str, str]]:
    """Contenders whose results have been checked, and those that could not run, with the reason."""
    reference = inputs.finish(inputs.yuv, inputs.parameters, "reference")
    contenders: dict[str, Contender] = {
        "fused, YUV, colors": lambda: inputs.finish(inputs.yuv, inputs.parameters, "fused"),
        "fused, RGB, colors": lambda: inputs.finish(inputs.crops, inputs.parameters, "fused"),
        "fused, YUV, no colors": lambda: inputs.finish(inputs.yuv, inputs.plain_parameters, "fused"),
        "fused, YUV, colors, bfloat16": lambda: inputs.finish(
            inputs.yuv, inputs.parameters, "fused", torch.bfloat16
        ),
        "reference, YUV, colors": lambda: inputs.finish(inputs.yuv, inputs.parameters, "reference"),
    }
    check("fused, YUV", contenders["fused, YUV, colors"](), reference, 1, 1 / 5000)
    check("fused, RGB", contenders["fused, RGB, colors"](), reference, 1, 1 / 5000)
    plain = inputs.finish(inputs.yuv, inputs.plain_parameters, "reference")
    check("fused, no colors", contenders["fused, YUV, no colors"](), plain, 1, 1 / 5000)
    left_out: dict[str, str] = {}

    def add(name: str, build: Callable[[], Contender]) -> None:
        try:
            contenders[name] = build()
        except Exception as error:  # what is missing or fails is a row of the result
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    def torchvision() -> Contender:
        run = torchvision_chain(inputs)
        check("torchvision", run(), reference, 3, 1.0)
        return run

    def dali() -> Contender:
        clips = [
            replace(clip, contrast=1.0, color_order=("brightness", "saturation")) for clip in inputs.clips
        ]
        expected = inputs.finish(inputs.yuv, frame_parameters(clips), "reference")
        check("DALI", dali_chain(inputs, clips)(), expected, 3, 1.0)
        return dali_chain(inputs, inputs.clips)

    add("torchvision v2, RGB, colors", torchvision)
    add("DALI, RGB, colors", dali)
    return contenders, left_out


def time_once(run: Callable[[], object]) -> tuple[float, float]:
    """(seconds between CUDA events, seconds of the wall) of a call, two calls in all."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(BUSY_CYCLES)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000, time.perf_counter() - started


def sweep(inputs: Inputs, rounds: int) -> list[dict[str, float]]:
    """us per clip of the fused kernel for other block sizes and numbers of warps."""
    from loaders.kernels import frames_triton

    default = frames_triton.BLOCK, frames_triton.NUM_WARPS
    results = []
    for block in (256, 512, 1024, 2048):
        for num_warps in (2, 4, 8):
            frames_triton.BLOCK, frames_triton.NUM_WARPS = block, num_warps
            row: dict[str, float] = {"block": block, "num_warps": num_warps}
            for name, parameters in (("colors", inputs.parameters), ("no colors", inputs.plain_parameters)):
                times = [
                    time_once(lambda p=parameters: inputs.finish(inputs.yuv, p, "fused"))[0]
                    for _ in range(WARM_UP + rounds)
                ]
                row[name] = 1e6 * quantiles(times[WARM_UP:])["median"] / len(inputs.clips)
            results.append(row)
            print(
                f"block {block:5d}, {num_warps} warps: {row['colors']:6.2f} us, {row['no colors']:6.2f} without colors"
            )
    frames_triton.BLOCK, frames_triton.NUM_WARPS = default
    return results


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="frame_kernel benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--num-clips", type=int, default=128)
    parser.add_argument("--num-frames", type=int, default=32)
    parser.add_argument("--crop-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--sweep", action="store_true", help="also try other block sizes and numbers of warps"
    )
    parser.add_argument("--note", help="goes into the row, for example what else the machine was doing")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("frame_kernel: torch sees no CUDA device, nothing measured")
        return 1
    begin_all = time.monotonic()
    inputs = Inputs(args.num_clips, args.num_frames, args.crop_size, torch.device("cuda"))
    contenders, left_out = build_contenders(inputs)
    num_bytes = inputs.yuv.numel() + inputs.crops.numel()
    copied = torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(copied)
    runs: dict[str, Callable[[], object]] = {"ceiling: copy of the bytes": lambda: target.copy_(copied)}
    runs.update(contenders)

    gpu: dict[str, list[float]] = {name: [] for name in runs}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(WARM_UP + args.rounds):
        for name, run in runs.items():
            on_gpu, on_wall = time_once(run)
            if round_ >= WARM_UP:
                gpu[name].append(1e6 * on_gpu / args.num_clips)
                wall[name].append(1e6 * on_wall / args.num_clips)

    best = {name: quantiles(wall[name] if name.startswith("DALI") else gpu[name]) for name in runs}
    print(
        f"us per clip of {args.num_frames}x{args.crop_size}x{args.crop_size}, {args.num_clips} clips at a time, "
        f"median of {args.rounds} rounds (20th to 80th percentile)"
    )
    print(f"{'':32s}{'GPU':>10s}{'':>20s}{'wall':>10s}{'x fused':>10s}")
    ratios = {}
    for name in runs:
        fused = "fused, RGB, colors" if ", RGB" in name else "fused, YUV, colors"
        # A wall time is compared with a wall time.
        if name.startswith("DALI"):
            ratios[name] = quantiles(wall[name])["median"] / quantiles(wall[fused])["median"]
            events = f"{'-':>10s}{'':>20s}"
        else:
            ratios[name] = best[name]["median"] / best[fused]["median"]
            spread = f"({best[name]['p20']:.2f} to {best[name]['p80']:.2f})"
            events = f"{best[name]['median']:10.2f}{spread:>20s}"
        print(f"{name:32s}{events}{quantiles(wall[name])['median']:10.2f}{ratios[name]:10.2f}")
    for name, reason in left_out.items():
        print(f"{name:32s}not measured: {reason}")
    fused = best["fused, YUV, colors"]
    print(f"fused: {fused['median']:.2f} us per clip (target {TARGET_MICROSECONDS:g})")
    print(f"others against fused: target {TARGET_RATIO:g}")
    swept = sweep(inputs, args.rounds) if args.sweep else None
    row = make_row(
        "frame_kernel",
        "colors",
        {
            "num_clips": args.num_clips,
            "num_frames": args.num_frames,
            "crop_size": args.crop_size,
            "dtype": "uint8",
        },
        clips_per_second=quantiles([1e6 / value for value in gpu["fused, YUV, colors"]]),
        repeats=args.rounds,
        seconds=time.monotonic() - begin_all,
        peak_memory_bytes=peak_memory_bytes(),
        peak_gpu_memory_bytes=torch.cuda.max_memory_allocated(),
        microseconds_per_clip=best,
        microseconds_per_clip_wall={name: quantiles(values) for name, values in wall.items()},
        ratio_to_fused=ratios,
        left_out=left_out,
        sweep=swept,
        ceiling={
            "microseconds_per_clip": best["ceiling: copy of the bytes"],
            "bytes_per_clip": num_bytes // args.num_clips,
        },
        target={"microseconds_per_clip": TARGET_MICROSECONDS, "ratio": TARGET_RATIO},
        note=args.note,
    )
    print(append_row(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
