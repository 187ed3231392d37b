"""Encoders ready for use: `load` reads every file that weights come in, with the preprocessing they were trained with.

encoders = cmac.load("runs/demo")
v = encoders.video_features(frames)  # uint8 (N, 3, T, H, W) -> (N, C, T', H', W')
a = encoders.audio_features(waveform)  # (N, num_samples) -> (N, C, F', S')
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cmac.checkpoint import build_model, newest_checkpoint, read_checkpoint
from cmac.compute import ComputeConfig
from cmac.encoders import AudioEncoderConfig, AudioResNet, R2Plus1D, VideoEncoderConfig
from cmac.model import CMAC
from cmac.norm import BatchNorm2d, BatchNorm3d
from loaders.audio_ops import log_mel_spectrogram
from loaders.config import SAMPLE_RATE, AudioConfig, VideoConfig
from loaders.video_ops import normalize_frames

PixelStatistic = float | tuple[float, float, float]
"""Of pixels in [0, 1]: one number, or one per channel (red, green, blue)."""


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

    @property
    def device(self) -> torch.device:
        """Where the encoders compute."""
        return next((self.video if self.video is not None else self.require_audio()).parameters()).device

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
        """(frames / 255 - pixel_mean) / pixel_std, float32, on the encoders' device.

        Args:
            frames: uint8 (N, 3, T, H, W) on any device.

        Raises:
            ValueError: other shapes or types.
        """
        if frames.dtype != torch.uint8 or frames.dim() != 5 or frames.shape[1] != 3:
            raise ValueError(
                f"frames are {frames.dtype} {tuple(frames.shape)}, expected torch.uint8 (N, 3, T, H, W)"
            )
        return normalize_frames(frames.to(self.device), self.pixel_mean, self.pixel_std)

    def log_mel(self, waveform: Tensor, sample_rate: int = SAMPLE_RATE) -> Tensor:
        """Normalized log-mel as the audio encoder takes it, on the encoders' device.

        Args:
            waveform: float32 (N, num_samples), mono in [-1, 1), on any device.
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
    for name, value in sorted(encoder_weights(video, audio).items()):
        if name.startswith("video.fc."):
            continue
        value = value.detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def encoder_weights(video: nn.Module | None, audio: nn.Module | None) -> dict[str, Tensor]:
    """State of both encoders, names prefixed `video.` and `audio.`."""
    parts = {"video": video, "audio": audio}
    return {
        f"{part}.{name}": value
        for part, module in parts.items()
        if module is not None
        for name, value in module.state_dict().items()
    }


def load(path: str | Path, device: torch.device | str = "cpu", *, random_seed: int | None = None) -> Encoders:
    """Encoders in evaluation mode with their preprocessing.

    Nothing in a file is executed: what is no tensor, number, string, list or dictionary is refused.

    Args:
        path: a run folder (its newest checkpoint is taken) or a checkpoint file.
        device: where they will compute.
        random_seed: the same network with fresh weights of this seed, the baseline of an evaluation.

    Raises:
        ValueError: there is no such file, or it is none of these.
    """
    path = Path(path)
    if path.is_dir():
        path = newest_checkpoint(path)
    return _from_checkpoint(path, torch.device(device), random_seed)


def _from_checkpoint(path: Path, device: torch.device, random_seed: int | None) -> Encoders:
    state = read_checkpoint(path)
    # Neither the machine that trained it nor the grouping of its batch statistics is of concern from here on.
    config = dataclasses.replace(state["config"], compute=ComputeConfig())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0 if random_seed is None else random_seed)
        model = build_model(config)
    if random_seed is None:
        model.load_state_dict(state["model"])
    for module in model.modules():
        if isinstance(module, (BatchNorm2d, BatchNorm3d)):
            module.group_size = None
    model = model.to(device).eval()
    video, audio = model.video.encoder, model.audio.encoder
    return Encoders(
        video=video,
        audio=audio,
        model=model,
        video_config=config.loader.video,
        audio_config=config.loader.audio,
        video_encoder_config=config.model.video,
        audio_encoder_config=config.model.audio,
        pixel_mean=config.loader.video.mean,
        pixel_std=config.loader.video.std,
        source=_source(path, random_seed),
        digest=weights_digest(video, audio),
    )


def _source(path: Path, random_seed: int | None) -> str:
    return str(path) if random_seed is None else f"{path} with random weights of seed {random_seed}"
