"""The video encoder's convolutions: 3-D ones as torchvision has them, beside 2-D ones on views of channels-last memory.

The whole encoder first, forward and backward, in training with plain batch norm (so that only the convolutions differ):

- torchvision: conv3d on contiguous (N, C, T, H, W) memory;
- channels_last_3d: conv3d on channels-last memory;
- views: `cmac.encoders.FactoredConv3d`, what `compute.convolutions` "views" means;
- views, padded: with `compute.pad_channels`.

Then (--layers) each distinct convolution of the encoder by itself, with what share of its own ceiling it reaches: the
longer of its arithmetic at the measured matrix product and its memory traffic at the measured copy. A layer that takes
more than 3 times its ceiling is marked.

Before anything is timed, outputs and weight gradients of all are compared in float64. Needs torch alone; runs on CPU
(float32) and CUDA (bf16 autocast).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import append_row, make_row, peak_memory_bytes, quantiles
from benchmarks.timing import (
    Stage,
    check_close,
    clean_up,
    measure_ceiling,
    peak_extra_bytes,
    print_ceiling,
    ratios,
    run_stages,
    time_interleaved,
)
from cmac.compute import ComputeConfig
from cmac.encoders import FactoredConv3d, R2Plus1D, VideoEncoderConfig
from cmac.norm import build_norm_layers

LARGEST_DIFFERENCE = 1e-10
"""Of float64 outputs and gradients, relative to their largest value."""
CONTENDERS = {
    "torchvision": (ComputeConfig(convolutions="conv3d", batch_norm="reference"), torch.contiguous_format),
    "channels_last_3d": (
        ComputeConfig(convolutions="conv3d", batch_norm="reference"),
        torch.channels_last_3d,
    ),
    "views": (ComputeConfig(batch_norm="reference"), torch.channels_last_3d),
    "views, padded": (ComputeConfig(batch_norm="reference", pad_channels=True), torch.channels_last_3d),
}


def build_encoder(name: str, config: VideoEncoderConfig) -> R2Plus1D:
    """A contender's network, the same weights for all."""
    compute, memory_format = CONTENDERS[name]
    torch.manual_seed(0)
    _, norm = build_norm_layers(None, "reference")
    return R2Plus1D(config, norm=norm, compute=compute).to(memory_format=memory_format).train()


def check_equal(config: VideoEncoderConfig) -> float:
    """Largest relative difference of float64 outputs and gradients from torchvision's way. Raises WrongResult."""
    frames = torch.randn(2, 3, 8, 48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected: dict[str, Tensor] = {}
    largest = 0.0
    for name in CONTENDERS:
        encoder = build_encoder(name, config).double()
        output = encoder(frames.to(memory_format=CONTENDERS[name][1]))
        output.square().mean().backward()
        found = {"output": output.detach(), **{n: p.grad for n, p in encoder.named_parameters()}}
        expected = expected or found
        for part, value in found.items():
            largest = max(largest, check_close(f"{name}: {part}", value, expected[part], LARGEST_DIFFERENCE))
    return largest


def encoder_stages(name: str, args: argparse.Namespace, device: torch.device) -> list[Stage]:
    """Forward and backward of a contender on synthetic frames."""
    encoder = build_encoder(name, args.config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    shape = (args.num_clips, 3, args.num_frames, args.crop_size, args.crop_size)
    frames = torch.randn(shape, generator=generator, device=device)
    frames = frames.to(memory_format=CONTENDERS[name][1])
    gradient: list[Tensor] = []

    def forward(_: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            return encoder(frames)

    def backward(output: Tensor) -> None:
        if not gradient:
            gradient.append(torch.randn_like(output))
        output.backward(gradient[0])
        encoder.zero_grad(set_to_none=True)

    return [forward, backward]


def layer_shapes(config: VideoEncoderConfig, args: argparse.Namespace) -> dict[str, tuple[nn.Conv3d, Tensor]]:
    """Name -> (convolution, its input without memory) of each distinct convolution; names say how many there are."""
    with torch.device("meta"):
        encoder = R2Plus1D(config, compute=ComputeConfig(convolutions="conv3d", batch_norm="reference"))
        frames = torch.empty(args.num_clips, 3, args.num_frames, args.crop_size, args.crop_size)
    found: dict[tuple, list[tuple[nn.Conv3d, Tensor]]] = {}

    def record(layer: nn.Conv3d, inputs: tuple[Tensor]) -> None:
        key = (tuple(inputs[0].shape), layer.out_channels, layer.kernel_size, layer.stride)
        found.setdefault(key, []).append((layer, inputs[0]))

    for module in encoder.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_pre_hook(record)
    encoder(frames)
    names = {}
    for (shape, width, kernel, stride), same in found.items():
        kernel_text, size = "x".join(map(str, kernel)), "x".join(map(str, shape[2:]))
        names[f"{len(same)} x {shape[1]}>{width} {kernel_text}/{max(stride)} of {size}"] = same[0]
    return names


def layer_stages(
    layer: nn.Conv3d, example: Tensor, device: torch.device, dtype: torch.dtype
) -> dict[str, list[Stage]]:
    """Forward and backward of one convolution, by each contender."""
    # Frames are not padded, and neither are the widths between blocks: multiples of 8 as they are.
    padding_in = -example.shape[1] % 8 if example.shape[1] > 3 else 0
    padding_out = -layer.out_channels % 8
    stages = {}
    for name, (compute, memory_format) in CONTENDERS.items():
        padded = compute.pad_channels
        if padded and padding_in + padding_out == 0:
            continue
        kind = FactoredConv3d if compute.convolutions == "views" else nn.Conv3d
        conv = kind(
            example.shape[1] + padding_in * padded,
            layer.out_channels + padding_out * padded,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            bias=False,
            device=device,
            dtype=dtype,
        ).to(memory_format=memory_format)
        shape = (example.shape[0], conv.in_channels, *example.shape[2:])
        x = torch.randn(shape, device=device, dtype=dtype).to(memory_format=memory_format)
        x.requires_grad_(example.shape[1] > 3)  # frames need no gradient
        with torch.no_grad():
            gradient = torch.randn_like(conv(x))

        def forward(_: Any, conv: nn.Conv3d = conv, x: Tensor = x) -> Tensor:
            return conv(x)

        def backward(
            output: Tensor, conv: nn.Conv3d = conv, x: Tensor = x, gradient: Tensor = gradient
        ) -> None:
            output.backward(gradient)
            conv.weight.grad = x.grad = None

        stages[name] = [forward, backward]
    return stages


def layer_ceiling(
    layer: nn.Conv3d, example: Tensor, ceiling: dict[str, Any], element_bytes: int
) -> tuple[float, float]:
    """Seconds that forward and backward of a convolution take at least."""
    with torch.device("meta"):
        out = F.conv3d(example, layer.weight, None, layer.stride, layer.padding)
    flops = 2 * out.numel() * layer.weight[0].numel()
    moved = (example.numel() + out.numel()) * element_bytes
    once = max(flops / ceiling["matmul_flops"], moved / ceiling["copy_bytes_per_second"])
    return once, once * (2 if example.shape[1] > 3 else 1)


def measure_layers(
    args: argparse.Namespace, device: torch.device, ceiling: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Times each layer and prints a line for it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"\nms forward / backward (share of the layer's ceiling), batches of {args.num_clips}, {dtype}:")
    print(f"{'layer':44s}" + "".join(f"{name:>28s}" for name in CONTENDERS))
    found: dict[str, dict[str, Any]] = {}
    for layer_name, (layer, example) in layer_shapes(args.config, args).items():
        least = layer_ceiling(layer, example, ceiling, dtype.itemsize)
        stages = layer_stages(layer, example, device, dtype)
        times, failed = time_interleaved(
            stages, device, rounds=args.rounds, warm_up=2, max_seconds=args.layer_seconds
        )
        row: dict[str, Any] = {}
        for name in CONTENDERS:
            if times.get(name):
                parts = [quantiles([each["stages"][i] for each in times[name]])["median"] for i in (0, 1)]
                shares = [low / part for low, part in zip(least, parts)]
                row[name] = {
                    "forward_ms": 1000 * parts[0],
                    "backward_ms": 1000 * parts[1],
                    "ceiling_share": shares,
                    "slow": sum(parts) > 3 * sum(least),
                }
            elif name in failed:
                row[name] = {"failed": failed[name]}
        found[layer_name] = row
        print(
            f"{layer_name:44s}" + "".join(f"{_cell(row.get(name)):>28s}" for name in CONTENDERS), flush=True
        )
        clean_up(device)
    return found


def _cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "-"
    if "failed" in result:
        return result["failed"][:26]
    mark = "!" if result["slow"] else " "
    shares = "/".join(f"{share:.2f}" for share in result["ceiling_share"])
    return f"{result['forward_ms']:.2f}/{result['backward_ms']:.2f} ({shares}){mark}"


def measure_encoder(args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, Any]]:
    """Times the whole encoder, prints a line for each contender."""
    stages: dict[str, Sequence[Stage]] = {
        name: encoder_stages(name, args, device) for name in CONTENDERS if name in args.contenders
    }
    peaks = {name: peak_extra_bytes(_runner(both), device) for name, both in stages.items()}
    times, failed = time_interleaved(stages, device, rounds=args.rounds, warm_up=1, max_seconds=args.seconds)
    base = [each["device"] for each in times["torchvision"]]
    columns = (
        f"{'ms forward':>12s}{'ms backward':>13s}{'clips/s (20-80 %)':>26s}{'x torchvision (20-80 %)':>28s}"
    )
    print(f"\n{'encoder':20s}{columns}")
    found: dict[str, dict[str, Any]] = {}
    for name in stages:
        if name in failed:
            found[name] = {"failed": failed[name]}
            print(f"{name:20s}not measured: {failed[name]}")
            continue
        whole = [each["device"] for each in times[name]]
        forward, backward = (quantiles([1000 * e["stages"][i] for e in times[name]]) for i in (0, 1))
        rate = quantiles([args.num_clips / seconds for seconds in whole])
        ratio = ratios(whole, base)
        found[name] = {
            "forward_ms": forward,
            "backward_ms": backward,
            "clips_per_second": rate,
            "ratio_to_torchvision": ratio,
            "peak_gpu_memory_bytes": peaks[name],
            "repeats": len(whole),
        }
        print(
            f"{name:20s}{forward['median']:12.1f}{backward['median']:13.1f}"
            f"{rate['median']:12.2f} ({rate['p20']:.2f}-{rate['p80']:.2f})"
            + (f"{ratio['median']:14.3f} ({ratio['p20']:.3f}-{ratio['p80']:.3f})" if ratio else "")
        )
    return found


def _runner(stages: Sequence[Stage]) -> Callable[[], Any]:
    return lambda: run_stages(stages)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--num-clips", type=int, default=64 if cuda else 2)
    parser.add_argument("--num-frames", type=int, default=32 if cuda else 16)
    parser.add_argument("--crop-size", type=int, default=128 if cuda else 64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing the encoder, about")
    parser.add_argument(
        "--layers", action=argparse.BooleanOptionalAction, default=True, help="each layer, too"
    )
    parser.add_argument("--layer-seconds", type=float, default=2.0, help="of timing a layer, about")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), default=tuple(CONTENDERS))
    parser.add_argument("--tiny", action="store_true", help="a narrow network, to try the script")
    parser.add_argument("--append", action=argparse.BooleanOptionalAction, default=True, help="append a row")
    parser.add_argument("--results", type=Path, help="folder of the row")
    parser.add_argument("--note", help="goes into the row, for example what else the machine was doing")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.num_clips < 1:
        parser.error("--rounds and --num-clips must be at least 1")
    if "torchvision" not in args.contenders:
        parser.error("--contenders must name torchvision, which the others are compared with")
    args.config = (
        VideoEncoderConfig(widths=(8, 16), blocks=(1, 1), stem_width=5) if args.tiny else VideoEncoderConfig()
    )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    args = parse(argv)
    began = time.monotonic()
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    difference = check_equal(args.config)
    print(
        f"float64 outputs and gradients of all: at most {difference:.1e} apart (allowed {LARGEST_DIFFERENCE:g})"
    )
    ceiling = measure_ceiling(device, quick=args.tiny)
    print_ceiling(ceiling)
    encoder = measure_encoder(args, device)
    clean_up(device)
    layers = measure_layers(args, device, ceiling) if args.layers else None
    row = make_row(
        "convolutions",
        "encoder and layers" if args.layers else "encoder",
        {
            "device": str(device),
            "num_clips": args.num_clips,
            "num_frames": args.num_frames,
            "crop_size": args.crop_size,
            "threads": torch.get_num_threads(),
            "widths": args.config.widths,
            "autocast": "bf16" if device.type == "cuda" else None,
        },
        clips_per_second=encoder.get("views", {}).get("clips_per_second"),
        repeats=encoder.get("views", {}).get("repeats"),
        seconds=time.monotonic() - began,
        peak_memory_bytes=peak_memory_bytes(),
        ceiling=ceiling,
        float64_difference=difference,
        encoder=encoder,
        layers=layers,
        note=args.note,
    )
    print()
    if args.append:
        append_row(row, *([args.results] if args.results else []))
    print(json.dumps(row, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
