"""Export encoders, import those of GDT, XDC and torchvision, and say what is in a file of weights.

    python -m tools.weights export CHECKPOINT OUT [--format safetensors|torchvision]
    python -m tools.weights import FILE OUT [--format gdt|xdc|torchvision] [--audio gdt|gdt-40] [--classifier]
    python -m tools.weights show FILE

OUT is a new folder with the weights and a model card; `cmac.load(OUT)` gives the encoders with their preprocessing.
A CHECKPOINT is a run folder or one of its checkpoints. No file of weights can execute anything. Exit status: 0, or 1
with a message when something does not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from cmac.weight_files import AudioFrontEnd, Layout
from cmac.weights import Encoders, ExportFormat, export_encoders, load, model_card, weights_digest


def describe(encoders: Encoders) -> list[str]:
    """Lines for a person: what it is, shapes, digests, preprocessing, what is not used."""
    card = model_card(encoders)
    lines = [card["description"], f"source: {encoders.source}", f"digest: {encoders.digest}"]
    parts = {"video": (encoders.video, None), "audio": (None, encoders.audio)}
    for name, modules in parts.items():
        part = card[name]
        if part is None:
            lines.append(f"{name} encoder: none")
            continue
        classes = f", classifier of {part['num_classes']} classes" if part["num_classes"] else ""
        lines.append(
            f"{name} encoder: {part['network']}, {part['num_parameters']:,} parameters, {part['input']} -> "
            f"{part['channels']} channels{classes}, digest {weights_digest(*modules)}"
        )
        lines.append(f"  shape: {_fields(part['config'])}")
    if encoders.model is not None:
        counts = encoders.model.parameter_counts()
        lines.append(f"whole model: {', '.join(f'{name} {count:,}' for name, count in counts.items())}")
    frames, sound = encoders.video_config, encoders.audio_config
    if encoders.video is not None:
        lines.append(
            f"frames: {frames.num_frames} of {frames.crop_size}x{frames.crop_size} pixels (short side "
            f"{frames.short_side}), mean {encoders.pixel_mean}, deviation {encoders.pixel_std} of pixels in [0, 1]"
        )
    if encoders.audio is not None:
        lines.append(
            f"sound: {sound.sample_rate} Hz, front end {sound.front_end}, {sound.num_mel_bins} mel bands, window "
            f"{sound.window_samples}, hop {sound.hop_samples}, n_fft {sound.n_fft} samples, mean {sound.log_mel_mean}, "
            f"deviation {sound.log_mel_std} of the log-mel"
        )
    lines += [f"note: {note}" for note in encoders.origin.get("notes", ())]
    lines += [f"not used: {name}" for name in encoders.origin.get("dropped", ())]
    lines.append(f"licence: {card['licence']}")
    return lines


def _fields(config: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.items())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="export|import|show")
    export = commands.add_parser("export", help="encoders of a run, for others", allow_abbrev=False)
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="run folder or checkpoint file")
    export.add_argument("out", type=Path, metavar="OUT", help="new folder")
    export.add_argument(
        "--format",
        choices=get_args(ExportFormat),
        default="safetensors",
        help="safetensors: both encoders; torchvision: the video encoder as r2plus1d_18's state (default: safetensors)",
    )
    add = commands.add_parser("import", help="encoders of another code base's file", allow_abbrev=False)
    add.add_argument("file", type=Path, metavar="FILE", help="what its authors saved")
    add.add_argument("out", type=Path, metavar="OUT", help="new folder")
    show = commands.add_parser("show", help="what is in a file", allow_abbrev=False)
    show.add_argument(
        "file", type=Path, metavar="FILE", help="run folder, checkpoint, exported folder or any file"
    )
    show.add_argument("--json", action="store_true", help="the model card that an export would write")
    for command in (add, show):
        command.add_argument(
            "--format",
            choices=("auto", *get_args(Layout)),
            default="auto",
            help="refuse a file of another layout (default: auto, read off names and shapes)",
        )
        command.add_argument(
            "--audio",
            choices=get_args(AudioFrontEnd),
            default="auto",
            help="what GDT's audio encoder was trained on: gdt: 257 mel bands; gdt-40: 40, as the released "
            "Kinetics-400 model by its script; auto: what the file says, else 257 (default)",
        )
        command.add_argument("--classifier", action="store_true", help="keep torchvision's classifier")
    return parser


def run(args: argparse.Namespace) -> None:
    """Do what was asked for and print it."""
    if args.command == "export":
        encoders = load(args.checkpoint)
        layout = args.format
    else:
        encoders = load(args.file, format=args.format, audio=args.audio, classifier=args.classifier)
        layout = "safetensors"
    if args.command == "show":
        if args.json:
            print(json.dumps(model_card(encoders), indent=2))
        else:
            print("\n".join(describe(encoders)))
        return
    folder = export_encoders(encoders, args.out, layout)
    written = load(folder)  # compares the digest with the card's
    print("\n".join(describe(written)))
    if written.audio is None and encoders.audio is not None:
        print("the audio encoder is not part of torchvision's format; --format safetensors has both")
    print(f"written and read back: {folder}")


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 when all went well."""
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"weights: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
