"""Encoders ready for use: `load` reads every file that weights come in, with the preprocessing they were trained with.

    encoders = cmac.load("runs/demo")
    v = encoders.video_features(frames)  # uint8 (N, 3, T, H, W) -> (N, C, T', H', W')
    a = encoders.audio_features(waveform)  # (N, num_samples) -> (N, C, F', S')

`export_encoders` writes them for others: safetensors with a model card, or torchvision's state dictionary.
"""

import dataclasses
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import dacite
import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from cmac.archive import has_checksum
from cmac.checkpoint import build_as_saved, newest_checkpoint, read_state, with_run_config
from cmac.compute import ComputeConfig
from cmac.encoders import (
    AudioEncoderConfig,
    AudioResNet,
    R2Plus1D,
    VideoEncoderConfig,
    count_parameters,
)
from cmac.model import CMAC
from cmac.norm import BatchNorm2d, BatchNorm3d
from cmac.provenance import git_commit
from cmac.weight_files import (
    AudioFrontEnd,
    Layout,
    PixelStatistic,
    load_strictly,
    read_foreign,
    read_weight_file,
)
from loaders.audio_ops import log_mel_spectrogram
from loaders.config import SAMPLE_RATE, AudioConfig, VideoConfig
from loaders.video_ops import normalize_frames
from shards.manifest import write_atomically

log = logging.getLogger(__name__)

CARD = "model_card.json"
CARD_FORMAT = "cmac-encoders-1"
"""Layout of an exported folder; another number when a reader of the old one would misread the new one."""
ExportFormat = Literal["safetensors", "torchvision"]
_FILES: dict[ExportFormat, str] = {"safetensors": "encoders.safetensors", "torchvision": "r2plus1d_18.pth"}

UNITS = {
    "frames": "uint8 RGB (N, 3, T, H, W): short side scaled to short_side pixels, a square of crop_size pixels cut out "
    "(the center, in evaluation), num_frames frames of one second; then (pixel / 255 - pixel_mean) / pixel_std",
    "sound": "mono (N, num_samples) in [-1, 1) at sample_rate Hz; windows of window_samples every hop_samples samples, "
    "n_fft samples long; num_mel_bins mel bands from 0 Hz to half the rate; natural logarithm of their power; then "
    "(log_mel - log_mel_mean) / log_mel_std",
}
LICENCES = {
    "cmac": "Trained with this code; the licence of the training videos is for whoever trained it to state.",
    "gdt": "GDT's weights. Its LICENSE file is Apache-2.0, its README says CC-NC; do not redistribute them.",
    "xdc": "XDC's weights. Its code is under the MIT licence; do not redistribute the weights.",
    "torchvision": "torchvision's weights, trained on Kinetics-400, whose terms hold; do not redistribute them.",
}


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """f_v and f_a in evaluation mode, and what is done to frames and sound before them."""

    video: R2Plus1D | None
    """f_v: normalized (N, 3, T, H, W) -> (N, C, T', H', W'); None where the file holds none."""
    audio: AudioResNet | None
    """f_a: normalized (N, 1, F, S) -> (N, C, F', S'); None where the file holds none."""
    model: CMAC | None
    """The whole model where the file has one (`model.encode` gives filters, embeddings and maps); `video` and `audio`
    are its query encoders."""
    video_config: VideoConfig
    """Frames as they were in training; the default where `video` is None. Its mean and std are single numbers:
    `pixel_mean` and `pixel_std` are what counts."""
    audio_config: AudioConfig
    """Front end and normalization of the log-mel; the default where `audio` is None."""
    video_encoder_config: VideoEncoderConfig | None
    """Shape of `video`."""
    audio_encoder_config: AudioEncoderConfig | None
    """Shape of `audio`."""
    pixel_mean: PixelStatistic
    """Subtracted from pixels in [0, 1]."""
    pixel_std: PixelStatistic
    """Divided by."""
    source: str
    """The file that the weights are of, and whether they are fresh ones."""
    digest: str
    """16 hex digits over the weights of both encoders, see `weights_digest`."""
    file: Path | None = None
    """The file itself."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What is known of where the weights come from, for the model card: `layout` ("cmac", "gdt", "xdc",
    "torchvision"), `step` and `commit` of the training, `dropped` (everything in the file that is not used),
    `notes` (what was assumed), `random_seed`."""

    @property
    def device(self) -> torch.device:
        """Where the encoders compute."""
        return next((self.require_audio() if self.video is None else self.video).parameters()).device

    def require_video(self) -> R2Plus1D:
        """`video`.

        Raises:
            ValueError: the file holds no video encoder.
        """
        if self.video is None:
            raise ValueError(f"{self.source} holds no video encoder; load a file that has one")
        return self.video

    def require_audio(self) -> AudioResNet:
        """`audio`.

        Raises:
            ValueError: the file holds no audio encoder.
        """
        if self.audio is None:
            raise ValueError(f"{self.source} holds no audio encoder; load a file that has one")
        return self.audio

    def require_model(self) -> CMAC:
        """`model`.

        Raises:
            ValueError: the file holds the encoders alone, or another method's.
        """
        if self.model is None:
            raise ValueError(
                f"{self.source} holds no whole CMAC model (filters, embeddings, maps), only encoders; "
                "give a run folder or one of its checkpoints"
            )
        return self.model

    def normalize_frames(self, frames: Tensor) -> Tensor:
        """(frames / 255 - pixel_mean) / pixel_std: float32, channels-last, on the encoders' device.

        Args:
            frames: uint8 (N, 3, T, H, W) on any device.

        Raises:
            ValueError: other shapes or types.
        """
        if frames.dtype != torch.uint8 or frames.dim() != 5 or frames.shape[1] != 3:
            raise ValueError(
                f"frames are {frames.dtype} {tuple(frames.shape)}, expected torch.uint8 (N, 3, T, H, W)"
            )
        frames = frames.to(self.device).contiguous(memory_format=torch.channels_last_3d)
        return normalize_frames(frames, self.pixel_mean, self.pixel_std)

    def log_mel(self, waveform: Tensor, sample_rate: int = SAMPLE_RATE) -> Tensor:
        """Normalized log-mel as the audio encoder takes it, on the encoders' device.

        Args:
            waveform: floating point (N, num_samples), mono in [-1, 1), on any device.
            sample_rate: of the waveform (Hz); another than `audio_config.sample_rate` is resampled.

        Returns:
            float32 (N, 1, F, S).

        Raises:
            ValueError: other shapes or types, or fewer samples than a spectrogram needs.
        """
        if not waveform.is_floating_point() or waveform.dim() != 2:
            raise ValueError(
                f"waveform is {waveform.dtype} {tuple(waveform.shape)}, expected floating point (N, num_samples) "
                "in [-1, 1), mono"
            )
        if sample_rate < 1:
            raise ValueError(f"sample_rate is {sample_rate}, expected at least 1 Hz")
        waveform = waveform.to(self.device, torch.float32)
        if sample_rate != self.audio_config.sample_rate:
            import torchaudio.functional  # here: without it, sound of the encoders' own rate still works

            waveform = torchaudio.functional.resample(waveform, sample_rate, self.audio_config.sample_rate)
        return log_mel_spectrogram(waveform, self.audio_config)[:, None]

    @torch.no_grad()
    def video_features(self, frames: Tensor) -> Tensor:
        """v of section 3.1: uint8 (N, 3, T, H, W) -> float32 (N, C, T', H', W'); 3x32x128x128 gives 512x4x8x8.

        Raises:
            ValueError: other shapes or types, or the file holds no video encoder.
        """
        return self.require_video()(self.normalize_frames(frames))

    @torch.no_grad()
    def audio_features(self, waveform: Tensor, sample_rate: int = SAMPLE_RATE) -> Tensor:
        """a of section 3.1: floating point (N, num_samples) in [-1, 1) -> float32 (N, C, F', S').

        Args:
            waveform: mono sound; 24,000 samples give 512x9x4.
            sample_rate: of the waveform (Hz).

        Raises:
            ValueError: other shapes or types, or the file holds no audio encoder.
        """
        return self.require_audio()(self.log_mel(waveform, sample_rate))


def weights_digest(video: nn.Module | None, audio: nn.Module | None) -> str:
    """16 hex digits over names, shapes, types and bytes of the weights and running statistics of both encoders.

    Neither the order of the weights nor their memory layout counts, nor a classifier (`fc`).
    """
    total = hashlib.sha256()
    for name, value in sorted(_encoder_weights(video, audio).items()):
        if name.startswith("video.fc."):
            continue
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def _encoder_weights(video: nn.Module | None, audio: nn.Module | None) -> dict[str, Tensor]:
    """State of both encoders, names prefixed `video.` and `audio.`, contiguous, on the CPU."""
    parts = {"video": video, "audio": audio}
    return {
        f"{part}.{name}": value.detach().cpu().contiguous()
        for part, module in parts.items()
        if module is not None
        for name, value in module.state_dict().items()
    }


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    random_seed: int | None = None,
    format: Layout | Literal["auto"] = "auto",
    audio: AudioFrontEnd | AudioConfig = "auto",
    classifier: bool = False,
) -> Encoders:
    """Encoders in evaluation mode with their preprocessing.

    Nothing in a file is executed: what is no tensor, number, string or container is refused. The format is read off
    names and shapes of the weights:

    - a run folder (its newest checkpoint is taken) or a checkpoint file: the whole model;
    - a folder that `export_encoders` wrote;
    - a GDT file: both encoders. What its audio encoder was trained on is seen in the `args` that GDT's training
      saves; without them 257 mel bands are assumed. The released Kinetics-400 model was by its script trained on 40
      bands: `audio="gdt-40"`;
    - an XDC file: the video encoder, whose mid planes and batch norms are others;
    - torchvision's `r2plus1d_18`, or a bare state dictionary with its names: the video encoder.

    The last two normalize red, green and blue each with its own mean and deviation.

    Args:
        path: the folder or file.
        device: where they will compute.
        random_seed: the same network with fresh weights of this seed, the baseline of an evaluation.
        format: `gdt`, `xdc` or `torchvision`: refuse a file of another layout.
        audio: front end of GDT's audio encoder: `gdt`, `gdt-40`, or an AudioConfig.
        classifier: keep torchvision's classifier; `video.classify` then works.

    Raises:
        ValueError: there is no such file, it is none of these, or its weights do not fit.
    """
    path = Path(path)
    if random_seed is not None and random_seed < 0:
        raise ValueError(f"random_seed is {random_seed}, expected at least 0")
    if path.is_dir():
        if (path / CARD).is_file():
            return _from_export(path, device, random_seed, format)
        if not (path / "checkpoints").is_dir():
            raise ValueError(
                f"{path}: neither a run folder (with checkpoints/) nor an exported one (with {CARD}); "
                "expected one of them, or a file of weights"
            )
        path = newest_checkpoint(path)
    elif (path.parent / CARD).is_file() and path.name in _FILES.values():
        return _from_export(path.parent, device, random_seed, format)
    is_checkpoint = path.is_file() and has_checksum(path)
    content = None if is_checkpoint else read_weight_file(path)
    if isinstance(content, dict) and {"format", "step", "config", "model"} <= dict.keys(content):
        is_checkpoint = True  # of the format without a checksum
    if is_checkpoint:
        if format != "auto":
            raise ValueError(f"{path}: format is {format!r}, but this is a checkpoint of cmac; leave it out")
        state = read_state(path)
        if "classes" in state:
            raise ValueError(
                f"{path}: a checkpoint of tools.finetune, a video classifier; expected one of pretraining"
            )
        return _from_checkpoint(with_run_config(state, path), path, device, random_seed)
    layout = None if format == "auto" else format
    foreign = read_foreign(content, str(path), layout, audio, classifier)
    video, audio_encoder = _build(
        foreign.video_encoder_config, foreign.audio_encoder_config, foreign.num_classes, random_seed
    )
    if random_seed is None:
        for module, state in ((video, foreign.video), (audio_encoder, foreign.audio)):
            if module is not None:
                load_strictly(module, state, str(path))
        for name in foreign.dropped:
            log.info("%s: not used: %s", path, name)
        for note in foreign.notes:
            log.info("%s: %s", path, note)
    return _ready(
        Encoders(
            video=video,
            audio=audio_encoder,
            model=None,
            video_config=foreign.video_config,
            audio_config=foreign.audio_config,
            video_encoder_config=foreign.video_encoder_config,
            audio_encoder_config=foreign.audio_encoder_config,
            pixel_mean=foreign.pixel_mean,
            pixel_std=foreign.pixel_std,
            source=str(path),
            digest="",
            file=path,
            origin={
                "layout": foreign.layout,
                "dropped": list(foreign.dropped),
                "notes": list(foreign.notes),
            },
        ),
        device,
        random_seed,
    )


def _build(
    video: VideoEncoderConfig | None,
    audio: AudioEncoderConfig | None,
    num_classes: int | None,
    random_seed: int | None,
) -> tuple[R2Plus1D | None, AudioResNet | None]:
    """Both encoders with fresh weights, in the order in which CMAC builds them: a seed gives both the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed or 0)
        return (
            None if video is None else R2Plus1D(video, num_classes),
            None if audio is None else AudioResNet(audio),
        )


def _ready(encoders: Encoders, device: torch.device | str, random_seed: int | None) -> Encoders:
    """On the device, in evaluation mode and channels-last memory, with digest and what became of a random seed."""
    for module in (encoders.model, encoders.video, encoders.audio):
        if module is not None:
            module.to(device).eval()
    if encoders.video is not None:
        encoders.video.to(memory_format=torch.channels_last_3d)
    source, origin = encoders.source, encoders.origin
    if random_seed is not None:
        source = f"{source} with random weights of seed {random_seed}"
        origin = {**origin, "random_seed": random_seed}
    digest = weights_digest(encoders.video, encoders.audio)
    return dataclasses.replace(encoders, source=source, origin=origin, digest=digest)


def _from_checkpoint(
    state: dict, path: Path, device: torch.device | str, random_seed: int | None
) -> Encoders:
    # Neither the machine that trained it nor the grouping of its batch statistics is of concern from here on.
    config = dataclasses.replace(state["config"], compute=ComputeConfig())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed or 0)
        model = build_as_saved(state, path, config)
    if random_seed is None:
        model.load_state_dict(state["model"])
    for module in model.modules():
        if isinstance(module, (BatchNorm2d, BatchNorm3d)):
            module.group_size = None
    encoders = Encoders(
        video=model.video.encoder,
        audio=model.audio.encoder,
        model=model,
        video_config=config.loader.video,
        audio_config=config.loader.audio,
        video_encoder_config=config.model.video,
        audio_encoder_config=config.model.audio,
        pixel_mean=config.loader.video.mean,
        pixel_std=config.loader.video.std,
        source=str(path),
        digest="",
        file=path,
        origin={"layout": "cmac", "step": state["step"], "commit": state.get("commit")},
    )
    return _ready(encoders, device, random_seed)


def _from_export(folder: Path, device: torch.device | str, random_seed: int | None, format: str) -> Encoders:
    card = read_card(folder)
    try:
        weights, video, audio = card["weights"], card["video"], card["audio"]
        frames, sound = card["preprocessing"]["frames"], card["preprocessing"]["sound"]
        if format not in ("auto", card["source"]["layout"]):
            raise ValueError(
                f"{folder}: format is {format!r}, but these are weights of {card['source']['layout']}"
            )
        encoders = Encoders(
            video=None,
            audio=None,
            model=None,
            video_config=_config(VideoConfig, frames["config"]),
            audio_config=_config(AudioConfig, sound["config"]),
            video_encoder_config=video and _config(VideoEncoderConfig, video["config"]),
            audio_encoder_config=audio and _config(AudioEncoderConfig, audio["config"]),
            pixel_mean=_statistic(frames["pixel_mean"]),
            pixel_std=_statistic(frames["pixel_std"]),
            source=str(folder),
            digest="",
            file=folder / weights["file"],
            origin=card["source"],
        )
        num_classes, layout, digest = video and video["num_classes"], weights["format"], card["digest"]
        if Path(weights["file"]).name != weights["file"] or layout not in get_args(ExportFormat):
            raise ValueError(f"{folder / CARD}: weights are {weights}, expected a file of the folder")
    except (KeyError, TypeError, dacite.DaciteError) as error:
        raise ValueError(
            f"{folder / CARD}: not a model card of this version of cmac ({type(error).__name__}: {error}); "
            "export the encoders again"
        ) from error
    built = _build(encoders.video_encoder_config, encoders.audio_encoder_config, num_classes, random_seed)
    if random_seed is None:
        content = read_weight_file(encoders.file)
        for part, module in zip(("video", "audio"), built, strict=True):
            prefix = f"{part}." if layout == "safetensors" else ""
            if module is not None:
                state = {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)}
                load_strictly(module, state, str(encoders.file))
    encoders = dataclasses.replace(encoders, video=built[0], audio=built[1])
    encoders = _ready(encoders, device, random_seed)
    if random_seed is None and encoders.digest != digest:
        raise ValueError(
            f"{encoders.file}: weights have digest {encoders.digest}, but {CARD} says {digest}: one of them was "
            "changed since the export; export the encoders again"
        )
    return encoders


def read_card(folder: Path) -> dict[str, Any]:
    """The model card of an exported folder.

    Raises:
        ValueError: there is none, or it is of another layout.
    """
    try:
        card = json.loads((folder / CARD).read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: has no {CARD}; expected a folder that an export wrote") from error
    except ValueError as error:
        raise ValueError(
            f"{folder / CARD}: not readable as JSON ({error}); export the encoders again"
        ) from error
    found = card.get("format") if isinstance(card, dict) else type(card).__name__
    if found != CARD_FORMAT:
        raise ValueError(
            f"{folder / CARD}: format {found}, expected {CARD_FORMAT}; export the encoders again"
        )
    return card


def _config(kind: type, data: Mapping[str, Any]) -> Any:
    return dacite.from_dict(kind, dict(data), dacite.Config(cast=[tuple, float], strict=True))


def _statistic(value: float | list[float]) -> PixelStatistic:
    return tuple(float(part) for part in value) if isinstance(value, list) else float(value)


def export_encoders(encoders: Encoders, folder: str | Path, format: ExportFormat = "safetensors") -> Path:
    """Write encoders and their model card into a new folder, all or nothing; `load` reads it back. Returns the folder.

    Args:
        encoders: what `load` gave.
        folder: does not exist, or is empty.
        format: `safetensors`: both encoders. `torchvision`: the video encoder alone, as the state of
            `torchvision.models.video.r2plus1d_18` without `fc` (unless the encoder has one).

    Raises:
        ValueError: the folder holds something, or the encoder is not torchvision's network.
    """
    folder = Path(folder)
    if format not in get_args(ExportFormat):
        raise ValueError(f"format is {format!r}, expected {' or '.join(get_args(ExportFormat))}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not empty; give a new folder")
    if format == "torchvision":
        _check_is_torchvisions(encoders)
        encoders = dataclasses.replace(
            encoders,
            audio=None,
            audio_encoder_config=None,
            audio_config=AudioConfig(),
            digest=weights_digest(encoders.video, None),
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.parent.glob(
        f".{folder.name}.*.tmp"
    ):  # of a process that was killed while it wrote
        shutil.rmtree(abandoned)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        write_atomically(temporary / _FILES[format], _weights_bytes(encoders, format))
        card = json.dumps(model_card(encoders, format), indent=2) + "\n"
        write_atomically(temporary / CARD, card.encode())
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _check_is_torchvisions(encoders: Encoders) -> None:
    encoders.require_video()
    config, plain = encoders.video_encoder_config, VideoEncoderConfig()
    differences = [
        f"{item.name} {getattr(config, item.name)} (expected {getattr(plain, item.name)})"
        for item in dataclasses.fields(plain)
        if getattr(config, item.name) != getattr(plain, item.name)
    ]
    if differences:
        raise ValueError(
            f"{encoders.source}: the video encoder is not torchvision's r2plus1d_18: {', '.join(differences)}; "
            "export it as safetensors"
        )


def _weights_bytes(encoders: Encoders, format: ExportFormat) -> bytes:
    weights = _encoder_weights(encoders.video, encoders.audio)
    if format == "safetensors":
        return safetensors.torch.save(weights, {"format": "pt"})
    file = io.BytesIO()
    torch.save({name.removeprefix("video."): value for name, value in weights.items()}, file)
    return file.getvalue()


def model_card(encoders: Encoders, format: ExportFormat = "safetensors") -> dict[str, Any]:
    """What an exported folder says of its weights: plain values that JSON takes."""
    layout = encoders.origin.get("layout", "cmac")
    source = dict(encoders.origin)
    if encoders.file is not None and "file" not in source:
        source |= {"file": encoders.file.name, "file_sha256": _file_digest(encoders.file)}
    return {
        "format": CARD_FORMAT,
        "description": _description(encoders),
        "digest": encoders.digest,
        "weights": {"file": _FILES[format], "format": format},
        "source": source,
        "video": _part(encoders.video, encoders.video_encoder_config, "R(2+1)D", "(N, 3, T, H, W)"),
        "audio": _part(encoders.audio, encoders.audio_encoder_config, "spectrogram ResNet", "(N, 1, F, S)"),
        "preprocessing": {
            "frames": {
                "what": UNITS["frames"],
                "pixel_mean": encoders.pixel_mean,
                "pixel_std": encoders.pixel_std,
                "config": dataclasses.asdict(encoders.video_config),
            },
            "sound": {"what": UNITS["sound"], "config": dataclasses.asdict(encoders.audio_config)},
        },
        "licence": LICENCES[layout],
        "exported_by_commit": git_commit(),
    }


def _description(encoders: Encoders) -> str:
    parts = [name for name in ("video", "audio") if getattr(encoders, name) is not None]
    origin = encoders.origin
    what = f"{' and '.join(parts).capitalize()} encoder{'s' if len(parts) > 1 else ''}"
    if "random_seed" in origin:
        return f"{what} with untrained, random weights of seed {origin['random_seed']}"
    if origin.get("layout", "cmac") != "cmac":
        return f"{what} of {origin['layout']}, in this project's layout"
    step = f" at step {origin['step']:,}" if origin.get("step") is not None else ""
    return f"{what} of Cross-Modal Attention Consistency pretraining{step}"


def _part(module: nn.Module | None, config: Any, network: str, inputs: str) -> dict[str, Any] | None:
    if module is None:
        return None
    fc = getattr(module, "fc", None)
    return {
        "network": network,
        "input": inputs,
        "channels": module.out_channels,
        "num_parameters": count_parameters(module),
        "num_classes": None if fc is None else fc.out_features,
        "config": dataclasses.asdict(config),
    }


def _file_digest(path: Path) -> str:
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()
