"""Weight files of other code bases: read without executing anything in them, and mapped to this one's encoders.

GDT, XDC and torchvision call the layers by torchvision's names, as `cmac.encoders` does, so that what is left is to
strip prefixes, to drop heads, and to say which preprocessing the weights were trained with.
"""

import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cmac.archive import find_hazard
from cmac.encoders import AudioEncoderConfig, VideoEncoderConfig
from loaders.config import FRAMES_PER_CLIP, AudioConfig, VideoConfig, gdt_audio_config

PixelStatistic = float | tuple[float, float, float]
"""Of pixels in [0, 1]: one number, or one per channel (red, green, blue)."""
Layout = Literal["gdt", "xdc", "torchvision"]
"""Whose names and shapes a file has."""
AudioFrontEnd = Literal["auto", "gdt", "gdt-40"]
"""Front end of GDT's audio encoder, see `read_foreign`."""

KINETICS_MEAN, KINETICS_STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)
"""What torchvision's video networks, and XDC's, normalize red, green and blue with."""
GDT_HEADS = ("mlp_v", "mlp_a", "mlp_t", "video_pooling.", "text_network.", "audio_network.base.fc.")
"""Parts of a GDT model that are no encoder of sight or sound (`video_pooling` is StiCa's)."""


@dataclass(frozen=True, kw_only=True)
class ForeignWeights:
    """The encoders of another code base's file."""

    layout: Layout
    """Whose file it is."""
    video: dict[str, Tensor] | None
    """State of the video encoder, under the names of `R2Plus1D`."""
    audio: dict[str, Tensor] | None
    """State of the audio encoder, under the names of `AudioResNet`."""
    video_encoder_config: VideoEncoderConfig | None
    """Shape of the video encoder, read off its weights."""
    audio_encoder_config: AudioEncoderConfig | None
    """Shape of the audio encoder, likewise."""
    num_classes: int | None
    """Outputs of the classifier in `video`; None where there is none or it was dropped."""
    video_config: VideoConfig
    """Frames as its authors trained it; mean and std are averages over the channels."""
    audio_config: AudioConfig
    """Its front end."""
    pixel_mean: PixelStatistic
    """Of pixels in [0, 1]."""
    pixel_std: PixelStatistic
    """Of pixels in [0, 1]."""
    dropped: tuple[str, ...]
    """Everything in the file that is not used, by name."""
    notes: tuple[str, ...]
    """What was assumed, for the reader of the model card."""


class _Arguments:
    """Stands for an `argparse.Namespace` in a file: holds plain values under their names and can do nothing."""

    __slots__ = ("values",)

    def __new__(cls) -> "_Arguments":
        arguments = super().__new__(cls)
        arguments.values = {}
        return arguments

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            plain = (bool, int, float, str, type(None))
            self.values = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, plain)}


class _Ignored:
    """Stands for an object that training left in a file and nobody needs; forgets all it is given."""

    __slots__ = ()

    def __new__(cls, *_: object) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _plain_dict(*_: object) -> dict:
    """Stands for a `collections.defaultdict`."""
    return {}


STAND_INS = {
    "argparse.Namespace": _Arguments,
    # The learning-rate scheduler that GDT's training saves with the weights holds another one and its optimizer.
    "torch.optim.lr_scheduler.MultiStepLR": _Ignored,
    "torch.optim.lr_scheduler.CosineAnnealingLR": _Ignored,
    "torch.optim.sgd.SGD": _Ignored,
    "collections.defaultdict": _plain_dict,
    "builtins.dict": _Ignored,  # the default of a defaultdict
}
"""What a file may name beside tensors and containers -> what is put in its place; the real ones are never called."""


def read_weight_file(path: Path) -> Any:
    """Content of a .safetensors file or of what `torch.save` wrote. Nothing in it is executed.

    torch's restricted unpickler makes tensors, numbers, strings and containers, and the harmless `STAND_INS`; what asks
    for anything else is refused. Tensors of torch's newer format are mapped from the file and read when used.

    Raises:
        ValueError: there is no such file, it cannot be read, or it asks for something that would be executed.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a run folder, a checkpoint or a file of weights")
    if path.suffix != ".safetensors":
        hazard = find_hazard(path)
        if hazard is not None:
            raise ValueError(f"{path}: not a readable file of weights: {hazard}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with (
            torch.serialization.safe_globals([(made, name) for name, made in STAND_INS.items()]),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what it cannot read it refuses
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch.load raises whatever the broken byte provokes
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise ValueError(
                f"{path}: asks for {asked[1]}, which could execute code, and was refused; expected tensors, numbers, "
                "strings and containers. Where you trust the file, save its state_dict alone with torch.save"
            ) from error
        raise ValueError(
            f"{path}: not a readable file of weights ({type(error).__name__}: {str(error).splitlines()[0][:200]}); "
            "expected a .safetensors file or one that torch.save wrote"
        ) from error


def read_foreign(
    content: Any,
    name: str,
    layout: Layout | None = None,
    audio: AudioFrontEnd | AudioConfig = "auto",
    classifier: bool = False,
) -> ForeignWeights:
    """Encoders of a GDT, XDC or torchvision file; `cmac.load` makes networks of them.

    - GDT: a dictionary with `model` or `state_dict`: `video_network.base.*`, `audio_network.base.*`, heads dropped.
    - torchvision: the state of `r2plus1d_18` (or another R(2+1)D of its basic blocks), with or without `fc`.
    - XDC: torchvision's names; the first block of stages 2 to 4 has other mid widths, batch norms have eps 1e-3.

    Args:
        content: what `read_weight_file` gave.
        name: of the file, for messages.
        layout: whose it is; None: read off names and shapes.
        audio: what GDT's audio encoder was trained on. `gdt`: 257 mel bands; `gdt-40`: 40, what the released
            Kinetics-400 model was trained on according to its script; both normalized by mean 1.93 and deviation
            17.89. `auto`: what the file's own `args` say, 257 bands where it has none. An AudioConfig: that.
        classifier: keep torchvision's `fc`.

    Raises:
        ValueError: the file has another layout, keys too many or too few, or other values than are possible.
    """
    if layout is not None and layout not in get_args(Layout):
        raise ValueError(f"format is {layout!r}, expected auto or {' or '.join(get_args(Layout))}")
    state, outside, arguments = _unwrap(content, name)
    found = _detect(state, outside, name)
    if layout is not None and (layout == "gdt") != (found == "gdt"):
        raise ValueError(f"{name}: format is {layout!r}, but names and shapes of its weights are {found}'s")
    if found == "gdt":
        if classifier:
            raise ValueError(f"{name}: a GDT file has no classifier; leave classifier out")
        return _read_gdt(state, outside, arguments, audio, name)
    return _read_bare(state, outside, layout, found, classifier, name)


def _unwrap(content: Any, name: str) -> tuple[dict[str, Tensor], list[str], dict[str, Any]]:
    """(weights without `module.` prefixes, names of what lies beside them, arguments of the training)."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{name}: holds a {type(content).__name__}, expected a dictionary of weights")
    outside: list[str] = []
    arguments = content.get("args")
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            outside = [str(other) for other in content if other != key]
            content = content[key]
            break
    strange = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if strange or not content:
        what = f"{strange[0]!r} is no tensor" if strange else "it is empty"
        raise ValueError(
            f"{name}: expected a dictionary of tensors, or one under 'model' or 'state_dict', but {what}"
        )
    state = {str(key).removeprefix("module."): value for key, value in content.items()}
    return state, outside, arguments.values if isinstance(arguments, _Arguments) else {}


def _detect(state: Mapping[str, Tensor], outside: Iterable[str], name: str) -> Layout:
    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in state)

    if has("video_model.") or has("audio_model.") or "train_criterion" in outside:
        raise ValueError(
            f"{name}: weights of AVID-CMA. Its networks are others (a full 3x7x7 stem with max-pooling and no mid "
            "planes; an audio network without residuals), so its weights fit neither R(2+1)D-18 nor ResNet-9; "
            "expected weights of GDT, XDC or torchvision"
        )
    if has("video_network.base.") or has("audio_network.base."):
        return "gdt"
    if has("layer1.0.conv1.0.0.") and "stem.0.weight" in state:
        return "xdc" if read_video_shape(state, name).midplanes == "per-conv" else "torchvision"
    raise ValueError(
        f"{name}: weights of no known layout (its first names: {', '.join(list(state)[:3])}); expected those of GDT "
        "(video_network.base.*, audio_network.base.*) or R(2+1)D weights of XDC or torchvision (stem.*, layer1.*)"
    )


def _read_gdt(
    state: dict[str, Tensor],
    outside: list[str],
    arguments: dict[str, Any],
    audio: AudioFrontEnd | AudioConfig,
    name: str,
) -> ForeignWeights:
    parts: dict[str, dict[str, Tensor]] = {"video_network.base.": {}, "audio_network.base.": {}}
    dropped, unexpected = [], []
    for key, value in state.items():
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), None)
        if key.startswith(GDT_HEADS):
            dropped.append(key)
        elif prefix is not None:
            parts[prefix][key.removeprefix(prefix)] = value
        else:
            unexpected.append(key)
    if unexpected:
        raise ValueError(f"{name}: unexpected keys in a GDT file: {_listed(unexpected)}")
    video, audio_state = parts.values()
    video_config, notes = _gdt_video_config(arguments)
    audio_config, audio_note = _gdt_audio(audio, arguments)
    return ForeignWeights(
        layout="gdt",
        video=video or None,
        audio=audio_state or None,
        video_encoder_config=read_video_shape(video, name) if video else None,
        audio_encoder_config=read_audio_shape(audio_state, name) if audio_state else None,
        num_classes=None,
        video_config=video_config,
        audio_config=audio_config,
        pixel_mean=video_config.mean,
        pixel_std=video_config.std,
        dropped=(*outside, *dropped),
        notes=(notes, audio_note) if audio_state else (notes,),
    )


def _gdt_video_config(arguments: Mapping[str, Any]) -> tuple[VideoConfig, str]:
    frames = _count(arguments, ("clip_len", "num_frames"), 30)
    crop = _count(arguments, ("train_crop_size",), 112)
    config = VideoConfig(
        num_frames=min(frames, FRAMES_PER_CLIP),
        short_side=max(crop, 128 if crop <= 128 else 256),
        crop_size=crop,
        color_jitter=True,
    )
    said = (
        "as its args say"
        if {"clip_len", "num_frames"} & arguments.keys()
        else "as GDT's Kinetics-400 script has it"
    )
    return config, f"frames: trained on {frames} frames of {crop} pixels, {said}"


def _gdt_audio(audio: AudioFrontEnd | AudioConfig, arguments: Mapping[str, Any]) -> tuple[AudioConfig, str]:
    if isinstance(audio, AudioConfig):
        return audio, "sound: front end as given when the file was read"
    if audio not in get_args(AudioFrontEnd):
        raise ValueError(
            f"audio is {audio!r}, expected {' or '.join(get_args(AudioFrontEnd))} or an AudioConfig"
        )
    if audio == "auto" and "aud_spec_type" in arguments:
        rate = _count(arguments, ("aud_sample_rate",), 24_000)
        changes: dict[str, object] = {
            "num_mel_bins": 40 if arguments["aud_spec_type"] == 1 else 257,
            "sample_rate": rate,
            "window_samples": rate // 50,
            "hop_samples": rate // 100,
        }
        if arguments.get("z_normalize") is False:
            changes |= {"log_mel_mean": 0.0, "log_mel_std": 1.0}
        config = gdt_audio_config(**changes)
        normalized = "" if config.log_mel_std == 1.0 else ", normalized"
        return config, f"sound: {config.num_mel_bins} mel bands at {rate} Hz{normalized}, as its args say"
    if audio == "gdt-40":
        return gdt_audio_config(num_mel_bins=40), "sound: 40 mel bands, as asked for when the file was read"
    if audio == "gdt":
        return gdt_audio_config(), "sound: 257 mel bands, as asked for when the file was read"
    return gdt_audio_config(), (
        "sound: 257 mel bands assumed, as the file does not say; by its script the released Kinetics-400 model was "
        "trained on 40: read it with audio 'gdt-40'"
    )


def _count(arguments: Mapping[str, Any], names: tuple[str, ...], default: int) -> int:
    value = next((arguments[name] for name in names if name in arguments), default)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"the file's args.{names[0]} is {value!r}, expected a whole number of at least 1")
    return value


def _read_bare(
    state: dict[str, Tensor],
    outside: list[str],
    layout: Layout | None,
    found: Layout,
    classifier: bool,
    name: str,
) -> ForeignWeights:
    if layout is not None and layout != found:
        raise ValueError(
            f"{name}: format is {layout!r}, but the mid widths of stages 2 to 4 are {found}'s; leave the format out"
        )
    fc = {key: value for key, value in state.items() if key.startswith("fc.")}
    if classifier and "fc.weight" not in fc:
        raise ValueError(f"{name}: classifier asked for, but the file has no fc.weight")
    kept = {key: value for key, value in state.items() if classifier or key not in fc}
    frames, short_side, crop = (32, 256, 224) if found == "xdc" else (16, 128, 112)
    return ForeignWeights(
        layout=found,
        video=kept,
        audio=None,
        video_encoder_config=read_video_shape(state, name),
        audio_encoder_config=None,
        num_classes=len(fc["fc.weight"]) if classifier else None,
        video_config=VideoConfig(
            num_frames=frames,
            short_side=short_side,
            crop_size=crop,
            mean=sum(KINETICS_MEAN) / 3,
            std=sum(KINETICS_STD) / 3,
        ),
        audio_config=AudioConfig(),
        pixel_mean=KINETICS_MEAN,
        pixel_std=KINETICS_STD,
        dropped=(*outside, *(() if classifier else fc)),
        notes=(
            f"frames: {frames} of {crop} pixels, normalized as {'XDC' if found == 'xdc' else 'torchvision'}'s "
            "Kinetics weights want it; the file does not say",
        ),
    )


def read_video_shape(state: Mapping[str, Tensor], name: str) -> VideoEncoderConfig:
    """Shape of an R(2+1)D network of basic blocks, read off its weights.

    Raises:
        ValueError: weights are missing.
    """

    def channels(key: str) -> int:
        if key not in state or state[key].dim() != 5:
            raise ValueError(
                f"{name}: {key} is missing or no 3-D convolution, expected R(2+1)D of basic blocks"
            )
        return state[key].shape[0]

    stages = _stages(state, name)
    firsts = [
        tuple(channels(f"layer{stage}.0.conv{conv}.0.0.weight") for conv in (1, 2))
        for stage in range(1, len(stages) + 1)
    ]
    per_conv = any(first != second for first, second in firsts)
    norms = {"midplanes": "per-conv", "norm_eps": 1e-3, "norm_momentum": 0.9} if per_conv else {}
    return VideoEncoderConfig(
        widths=tuple(channels(f"layer{stage}.0.conv1.0.3.weight") for stage in range(1, len(stages) + 1)),
        blocks=stages,
        stem_width=channels("stem.0.weight"),
        **norms,
    )


def read_audio_shape(state: Mapping[str, Tensor], name: str) -> AudioEncoderConfig:
    """Shape of a spectrogram ResNet of basic blocks, read off its weights.

    Raises:
        ValueError: weights are missing.
    """
    stages = _stages(state, name)
    keys = [f"layer{stage}.0.conv1.weight" for stage in range(1, len(stages) + 1)]
    missing = [key for key in ("conv1.weight", *keys) if key not in state or state[key].dim() != 4]
    if missing or not stages:
        raise ValueError(
            f"{name}: {(missing or ['layer1'])[0]} is missing, expected a ResNet of basic blocks"
        )
    return AudioEncoderConfig(widths=tuple(state[key].shape[0] for key in keys), blocks=stages)


def _stages(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Blocks of each stage."""
    blocks: dict[int, set[str]] = {}
    for key in state:
        match = re.match(r"layer(\d+)\.(\d+)\.", key)
        if match:
            blocks.setdefault(int(match[1]), set()).add(match[2])
    if not blocks or sorted(blocks) != list(range(1, len(blocks) + 1)):
        raise ValueError(f"{name}: has stages {sorted(blocks)}, expected layer1, layer2 and so on")
    return tuple(len(blocks[stage]) for stage in sorted(blocks))


def load_strictly(module: torch.nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Fill module with state.

    Raises:
        ValueError: weights are missing, too many, or of other shapes; the message names them.
    """
    try:
        result = module.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:  # of shapes
        raise ValueError(f"{name}: {' '.join(str(error).split())[:500]}") from error
    problems = [
        f"{what} keys: {_listed(keys)}"
        for what, keys in (("missing", result.missing_keys), ("unexpected", result.unexpected_keys))
        if keys
    ]
    if problems:
        raise ValueError(f"{name}: weights do not fit {type(module).__name__}; {'; '.join(problems)}")


def _listed(names: Iterable[str], limit: int = 10) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
