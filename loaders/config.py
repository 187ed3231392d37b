"""Configuration of the loaders: what is read, how many clips at a time, and what is done to each."""

from dataclasses import dataclass, field
from typing import Literal, get_args

Backend = Literal["auto", "portable", "dali-cpu-decode", "dali-gpu", "raw"]

SAMPLE_RATE = 24_000  # the rate of the shards' sound (shards.schema.SAMPLE_RATE)
FRAMES_PER_CLIP = 32  # the frames of a shard's clip (shards.schema.FRAMES_PER_CLIP)


def _check(name: str, value: object, ok: bool, expected: str) -> None:
    """Raises ValueError `NAME is VALUE, expected EXPECTED` unless ok."""
    if not ok:
        raise ValueError(f"{name} is {value!r}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """What is done to the frames of a clip (paper section 4.1: random crop 128, flip, color jitter)."""

    num_frames: int = 32
    """Frames per clip, taken uniformly from the 32 that a shard holds (1 to 32)."""
    short_side: int = 144
    """Frames are scaled to this short side (pixels) at decode, aspect kept. 144, as stored: no scaling."""
    crop_size: int = 128
    """Side of the square crop in scaled pixels: random when augment is on, else the center."""
    augment: bool = True
    """Random crop, flip and color jitter. Off: center crop, nothing else."""
    flip_probability: float = 0.5
    """Chance that a clip is mirrored left to right."""
    color_jitter: bool = False
    """Brightness, contrast and saturation jitter, alike in all frames of a clip (paper: final runs only)."""
    brightness: float = 0.4
    """Brightness factor is uniform in [1 - brightness, 1 + brightness]."""
    contrast: float = 0.4
    """Contrast factor is uniform in [1 - contrast, 1 + contrast]."""
    saturation: float = 0.4
    """Saturation factor is uniform in [1 - saturation, 1 + saturation]."""
    mean: float = 0.45
    """Mean of pixels in [0, 1]: frames are normalized on the device as (pixel / 255 - mean) / std."""
    std: float = 0.225
    """Standard deviation of pixels in [0, 1]."""

    def __post_init__(self) -> None:
        name = "loader.video"
        _check(
            f"{name}.num_frames",
            self.num_frames,
            1 <= self.num_frames <= FRAMES_PER_CLIP,
            f"1 to {FRAMES_PER_CLIP}",
        )
        _check(f"{name}.short_side", self.short_side, self.short_side >= 1, "at least 1 pixel")
        _check(
            f"{name}.crop_size",
            self.crop_size,
            1 <= self.crop_size <= self.short_side,
            f"1 to loader.video.short_side ({self.short_side})",
        )
        _check(f"{name}.flip_probability", self.flip_probability, 0 <= self.flip_probability <= 1, "0 to 1")
        for factor in ("brightness", "contrast", "saturation"):
            _check(f"{name}.{factor}", getattr(self, factor), 0 <= getattr(self, factor) <= 1, "0 to 1")
        _check(f"{name}.mean", self.mean, 0 <= self.mean <= 1, "0 to 1")
        _check(f"{name}.std", self.std, self.std > 0, "more than 0")


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """How a waveform becomes the log-mel of the audio encoder (paper section 4.1: 257 bands, SpecAugment)."""

    front_end: Literal["log-mel", "gdt"] = "log-mel"
    """`log-mel`: continuous HTK mel filters over a Hann window. `gdt`: the front end of the GDT code base
    (pre-emphasis, rectangular window, filters with rounded corners of which some are empty); see
    `gdt_audio_config`."""
    sample_rate: int = SAMPLE_RATE
    """Samples per second of the waveform (Hz)."""
    n_fft: int = 2048
    """FFT length in samples; the window is zero-padded to it. 1024 would leave 7 of 257 mel filters empty."""
    window_samples: int = 480
    """Window length in samples (480 at 24 kHz: 20 ms)."""
    hop_samples: int = 240
    """Samples from one spectrogram step to the next (240 at 24 kHz: 10 ms)."""
    num_mel_bins: int = 257
    """Mel bands from 0 Hz to half the sample rate."""
    log_offset: float = 1e-6
    """Added to the mel power before the logarithm: digital silence is ln(1e-6), not minus infinity."""
    log_mel_mean: float = -3.2
    """Mean of the log-mel over the data; the model sees (log_mel - log_mel_mean) / log_mel_std. The default
    was measured on 375 seconds of 45 web videos (speech, music, animals, sports): -3.16 and 4.52;
    `audio_ops.log_mel_statistics` measures other data."""
    log_mel_std: float = 4.5
    """Standard deviation of the log-mel over the data."""
    augment: bool = True
    """Time warp, frequency masks and time masks (SpecAugment). Off: none of them."""
    time_warp_steps: int = 5
    """W: a random step moves by up to this many steps, what is on either side is stretched. 0: off."""
    num_frequency_masks: int = 1
    """Bands of neighboring mel bins set to the mean."""
    frequency_mask_bins: int = 20
    """F: width of a frequency mask is uniform in 0 .. F-1 bins."""
    num_time_masks: int = 1
    """Runs of neighboring steps set to the mean."""
    time_mask_steps: int = 6
    """T: width of a time mask is uniform in 0 .. T-1 steps."""

    def __post_init__(self) -> None:
        name = "loader.audio"
        _check(f"{name}.front_end", self.front_end, self.front_end in ("log-mel", "gdt"), "log-mel or gdt")
        for count in ("sample_rate", "n_fft", "window_samples", "hop_samples", "num_mel_bins"):
            _check(f"{name}.{count}", getattr(self, count), getattr(self, count) >= 1, "at least 1")
        _check(
            f"{name}.window_samples",
            self.window_samples,
            self.window_samples <= self.n_fft,
            f"at most loader.audio.n_fft ({self.n_fft})",
        )
        if self.front_end == "gdt":
            _check(
                f"{name}.n_fft",
                self.n_fft,
                self.n_fft == 1024,
                "1024 with front_end gdt (whose log_mel_mean is 1.93 and log_mel_std 17.89)",
            )
        _check(f"{name}.log_offset", self.log_offset, self.log_offset > 0, "more than 0")
        _check(f"{name}.log_mel_std", self.log_mel_std, self.log_mel_std > 0, "more than 0")
        for count in ("time_warp_steps", "num_frequency_masks", "num_time_masks"):
            _check(f"{name}.{count}", getattr(self, count), getattr(self, count) >= 0, "at least 0")
        _check(
            f"{name}.frequency_mask_bins",
            self.frequency_mask_bins,
            1 <= self.frequency_mask_bins <= self.num_mel_bins,
            f"1 to loader.audio.num_mel_bins ({self.num_mel_bins})",
        )
        steps = self.num_steps()
        _check(
            f"{name}.time_mask_steps",
            self.time_mask_steps,
            1 <= self.time_mask_steps <= steps,
            f"1 to {steps} steps",
        )
        _check(
            f"{name}.time_warp_steps",
            self.time_warp_steps,
            steps >= 2 * self.time_warp_steps + 3 or self.time_warp_steps == 0,
            f"at most {max((steps - 3) // 2, 0)} with {steps} steps in a clip",
        )

    def num_steps(self, num_samples: int | None = None) -> int:
        """S: spectrogram steps of a waveform of num_samples (default: one second, a clip).

        `log-mel` centers its windows with reflected edges: 1 + num_samples // hop (101 for a clip).
        `gdt` starts the first window at sample 0 and pads the last with zeros:
        1 + ceil((num_samples - window) / hop) (99 for a clip).
        """
        num_samples = self.sample_rate if num_samples is None else num_samples
        if self.front_end == "log-mel":
            return 1 + num_samples // self.hop_samples
        return 1 + max(0, -(-(num_samples - self.window_samples) // self.hop_samples))


def gdt_audio_config(**changes: object) -> AudioConfig:
    """AudioConfig of the GDT code base's 257-band front end; `changes` override single fields.

    24 kHz, pre-emphasis 0.97, 20 ms rectangular windows every 10 ms, n_fft 1024, natural logarithm,
    normalized with mean 1.93 and standard deviation 17.89: a clip is 257 x 99. 38 of its 257 filters are
    empty (see `audio_ops.gdt_mel_filters`), which is why it is not the default. For weights that were trained
    with it.
    """
    fields: dict[str, object] = {
        "front_end": "gdt",
        "n_fft": 1024,
        "window_samples": 480,
        "hop_samples": 240,
        "log_mel_mean": 1.93,
        "log_mel_std": 17.89,
    }
    return AudioConfig(**{**fields, **changes})


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Where the clips come from and how they are handed out."""

    shards: str
    """Folder written by tools/make_shards.py (holds manifest.json, the tars and their indexes): a path, or a URL
    (s3://, gs://, https://, ...), of which shards are brought to cache_dir as they are needed. With backend `raw`:
    folder of original videos."""
    video_list: str = ""
    """With backend `raw`: file with one path per line, relative to the folder; empty: all videos in it."""
    video_csv: str = ""
    """With backend `raw`: Kinetics csv, whose rows of the split `train` are read; empty: all videos."""
    global_batch_size: int = 128
    """Clips per step over all ranks; each rank gets its equal part."""
    num_workers: int = 4
    """Worker processes per rank that decode clips; with `dali-gpu` threads that read them. 0: decode in the
    training process, for debugging."""
    prefetch_batches: int = 8
    """Batches per rank made ready ahead of the consumer, rounded up to a multiple of num_workers."""
    seed: int = 0
    """With the epoch, fixes the order of clips; with the epoch and a clip's key, what is done to the clip."""
    drop_last: bool = True
    """Leave out the last, incomplete global batch of an epoch. Off: pad it with rows marked not valid."""
    shuffle: bool = True
    """A new order each epoch. Off: the order of the shards."""
    shuffle_window: int = 4096
    """After the shards were permuted, clips are shuffled within windows of this many. 0: they are not."""
    clips_per_video: int = 1
    """2: each batch has a second clip of the same videos as batch.second (Table 3, positives)."""
    max_bad_fraction: float = 0.01
    """A run stops when more than this share of the clips of all ranks, from its start to the end of the epoch, cannot
    be used: as soon as that is certain, or at once if half of those seen are bad. 0: at the first; 1: never."""
    max_bad_shard_fraction: float = 0.1
    """The loader does not start when more than this share of the shards is missing or damaged."""
    verify_shards: Literal["size", "sha256"] = "size"
    """What is checked before the first batch: each tar's size and index, or also its checksum (reads it all). Of a
    URL the sizes alone, by its listing; each shard's checksum when it has been downloaded. Members are checked by
    their own checksums whenever they are read."""
    cache_dir: str = ""
    """Folder on this machine for shards from a URL, shared by all ranks and runs on it. Empty:
    `$XDG_CACHE_HOME/cmac/shards`, or `~/.cache/cmac/shards`. It stays after the run."""
    cache_gb: float = 50.0
    """Most that cache_dir may hold, in GB (1e9 bytes): the shards opened least recently make way. Those that workers
    still have open take disk space until they are done with them."""
    cache_ahead: int = 4
    """Shards from a URL brought before they are needed, beyond those that the next batch may need. 0: none."""
    source_retry_seconds: float = 300.0
    """How long a URL that fails is tried again without any progress before the run stops. Less than the time after
    which other ranks give up waiting in a collective (NCCL: 600 s)."""
    source_stall_seconds: float = 60.0
    """A download that brings no bytes for so long is begun again where it stopped."""
    backend: Backend = "auto"
    """`portable`: PyAV and torch in worker processes. `dali-cpu-decode`: the same decoding, DALI for the sound
    and on a GPU one kernel for the pixels. `dali-gpu`: DALI decodes on the GPU. `raw`: no shards, clips are cut
    from the original videos as they are read. `auto`: the fastest of those installed, found by a short trial on
    these shards."""
    dali_threads: int = 16
    """DALI's CPU threads per rank (with `dali-cpu-decode` on a CPU it has one: the workers need the cores); with
    `dali-gpu` also the number of hardware decoding sessions."""
    probe_seconds: float = 3.0
    """With backend `auto`: seconds that each candidate is timed for."""
    video: VideoConfig = field(default_factory=VideoConfig)
    """Frames: number, size, crop, augmentation."""
    audio: AudioConfig = field(default_factory=AudioConfig)
    """Log-mel: front end, normalization, augmentation."""

    def __post_init__(self) -> None:
        _check("loader.shards", self.shards, bool(self.shards), "the folder that make_shards wrote")
        for name in ("video_list", "video_csv"):
            value = getattr(self, name)
            _check(f"loader.{name}", value, not value or self.backend == "raw", "empty but for backend raw")
        _check("loader.global_batch_size", self.global_batch_size, self.global_batch_size >= 1, "at least 1")
        _check("loader.num_workers", self.num_workers, self.num_workers >= 0, "at least 0")
        _check("loader.prefetch_batches", self.prefetch_batches, self.prefetch_batches >= 1, "at least 1")
        _check("loader.seed", self.seed, self.seed >= 0, "at least 0")
        _check("loader.shuffle_window", self.shuffle_window, self.shuffle_window >= 0, "at least 0")
        _check("loader.clips_per_video", self.clips_per_video, self.clips_per_video in (1, 2), "1 or 2")
        _check("loader.max_bad_fraction", self.max_bad_fraction, 0 <= self.max_bad_fraction <= 1, "0 to 1")
        _check(
            "loader.max_bad_shard_fraction",
            self.max_bad_shard_fraction,
            0 <= self.max_bad_shard_fraction <= 1,
            "0 to 1",
        )
        _check(
            "loader.verify_shards",
            self.verify_shards,
            self.verify_shards in ("size", "sha256"),
            "size or sha256",
        )
        _check("loader.cache_gb", self.cache_gb, self.cache_gb > 0, "more than 0")
        _check("loader.cache_ahead", self.cache_ahead, self.cache_ahead >= 0, "at least 0")
        for name in ("source_retry_seconds", "source_stall_seconds"):
            _check(f"loader.{name}", getattr(self, name), getattr(self, name) > 0, "more than 0")
        _check(
            "loader.backend", self.backend, self.backend in get_args(Backend), " or ".join(get_args(Backend))
        )
        _check("loader.dali_threads", self.dali_threads, self.dali_threads >= 1, "at least 1")
        _check("loader.probe_seconds", self.probe_seconds, self.probe_seconds > 0, "more than 0")
