"""The DALI log-mel and SpecAugment against audio_ops, and both against float64."""

import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
from loaders_media import tone

from loaders.audio_ops import augment_log_mel, log_mel_spectrogram
from loaders.augment import ClipAugmentation, draw_augmentation
from loaders.config import AudioConfig, VideoConfig, gdt_audio_config

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")

from loaders.dali_audio import DaliAudio, log_mel_graph  # noqa: E402

pytestmark = pytest.mark.dali

CONFIG = AudioConfig()
NOTHING = ClipAugmentation(scaled_height=144, scaled_width=192, crop_top=0, crop_left=0, crop_size=128)
RANDOM = np.random.default_rng(0)
SILENCE = np.zeros(24_000, np.int16)


def noise(amplitude: float) -> np.ndarray:
    """int16 (24000,): white noise of this amplitude (full scale is 32768)."""
    return (RANDOM.uniform(-1, 1, 24_000) * amplitude).astype(np.int16)


def sounds(num_clips: int) -> torch.Tensor:
    """int16 (num_clips, 24000): tones in noise, loud and faint."""
    clips = []
    for clip in range(num_clips):
        loudness = 10.0 ** (-(clip % 4))
        music = tone(110 * (1 + clip)) + tone(1234 + 77 * clip, amplitude=0.1)
        clips.append((music * 20_000 * loudness).astype(np.int16) + noise(2_000 * loudness))
    return torch.from_numpy(np.stack(clips))


def draws(num_clips: int, config: AudioConfig, epoch: int = 0) -> list[ClipAugmentation]:
    video, steps = VideoConfig(), config.num_steps()
    return [
        draw_augmentation(video, config, 0, epoch, f"clip{clip:04d}", 144, 192, steps)
        for clip in range(num_clips)
    ]


def reference(
    waveforms: torch.Tensor, augmentations: list[ClipAugmentation], config: AudioConfig
) -> torch.Tensor:
    """float32 (N, 1, F, S) by audio_ops."""
    log_mels = log_mel_spectrogram(waveforms.float() / 32768, config)
    return torch.stack([augment_log_mel(*pair) for pair in zip(log_mels, augmentations)]).unsqueeze(1)


def float64_log_mel(waveforms: torch.Tensor, config: AudioConfig) -> torch.Tensor:
    """float64 (N, 1, F, S): the definition of AudioConfig's log-mel, without augmentation."""
    half, hop = config.n_fft // 2, config.hop_samples
    padded = np.pad(waveforms.numpy() / 32768.0, ((0, 0), (half, half)), mode="reflect")
    window = np.zeros(config.n_fft)
    start = half - config.window_samples // 2
    phase = np.arange(config.window_samples) / config.window_samples
    window[start : start + config.window_samples] = 0.5 - 0.5 * np.cos(2 * np.pi * phase)
    windows = [padded[:, hop * s : hop * s + config.n_fft] * window for s in range(config.num_steps())]
    power = np.abs(np.fft.rfft(np.stack(windows, axis=1))) ** 2  # (N, S, n_fft // 2 + 1)
    mels = np.linspace(0, 2595 * np.log10(1 + config.sample_rate / 1400), config.num_mel_bins + 2)
    corners = 700 * (10 ** (mels / 2595) - 1)
    hertz = np.arange(half + 1) * config.sample_rate / config.n_fft
    rising = (hertz - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - hertz) / (corners[2:] - corners[1:-1])[:, None]
    filters = np.maximum(0, np.minimum(rising, falling))
    log_mel = np.log(np.einsum("fb,nsb->nfs", filters, power) + config.log_offset)
    return torch.from_numpy((log_mel - config.log_mel_mean) / config.log_mel_std).unsqueeze(1)


@pytest.fixture(scope="module")
def audio() -> DaliAudio:
    return DaliAudio(CONFIG, batch_size=16)


def test_log_mel_is_that_of_audio_ops(audio):
    waveforms = sounds(8)
    log_mel = audio(waveforms, [NOTHING] * 8)
    assert log_mel.shape == (8, 1, 257, 101) and log_mel.dtype == torch.float32
    assert log_mel.is_contiguous()
    # float32 FFT and filters on both sides; in ln units the error is 4.5 times this.
    assert (log_mel - reference(waveforms, [NOTHING] * 8, CONFIG)).abs().max() < 1e-3


def test_silence_and_full_scale_noise_are_those_of_audio_ops(audio):
    square = (32767 * np.sign(tone(50.3))).astype(np.int16)
    waveforms = torch.from_numpy(np.stack([SILENCE, noise(32768), square, noise(1.5)]))
    log_mel = audio(waveforms, [NOTHING] * 4)
    assert (log_mel - reference(waveforms, [NOTHING] * 4, CONFIG)).abs().max() < 2e-4


def test_log_mel_of_pure_tones_is_no_farther_from_float64_than_audio_ops_is(audio):
    # Between the harmonics of a pure tone there is nothing but what float32 rounds off, on both sides: up to
    # 2.6e-3 at full scale, where the exact value is near log_offset.
    waveforms = [
        (tone(hertz, amplitude=amplitude) * 32767).astype(np.int16)
        for hertz in (50, 137.3, 1000.7, 6000.1)
        for amplitude in (0.01, 0.1, 1.0)
    ]
    waveforms = torch.from_numpy(np.stack(waveforms))
    exact = float64_log_mel(waveforms, CONFIG)
    nothing = [NOTHING] * len(waveforms)
    worst = (reference(waveforms, nothing, CONFIG) - exact).abs().amax(dim=(1, 2, 3))
    error = (audio(waveforms, nothing) - exact).abs().amax(dim=(1, 2, 3))
    assert (error <= worst + 1e-3).all(), (error, worst)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        AudioConfig(num_frequency_masks=3, num_time_masks=2),
        AudioConfig(num_frequency_masks=0, num_time_masks=4, frequency_mask_bins=1),
        AudioConfig(time_warp_steps=0, num_time_masks=0),
        AudioConfig(num_frequency_masks=0, num_time_masks=0),
        AudioConfig(time_warp_steps=0, num_frequency_masks=0, num_time_masks=0),
        AudioConfig(augment=False),
        AudioConfig(n_fft=1024, window_samples=600, hop_samples=160, num_mel_bins=80, time_warp_steps=20),
    ],
    ids=["default", "five-masks", "time-masks", "no-warp", "warp-only", "none", "off", "other-front-end"],
)
def test_augmented_log_mel_is_that_of_audio_ops(config):
    waveforms, augmentations = sounds(40), draws(40, config)
    result = DaliAudio(config, batch_size=40)(waveforms, augmentations)
    expected = reference(waveforms, augmentations, config)
    assert result.shape == expected.shape == (40, 1, config.num_mel_bins, config.num_steps())
    assert (result - expected).abs().max() < 1e-3


def test_masked_places_are_zero_and_no_others(audio):
    for epoch in range(8):
        augmentations = draws(16, CONFIG, epoch)
        result = audio(sounds(16), augmentations)
        for log_mel, augmentation in zip(result[:, 0], augmentations):
            masked = torch.zeros(257, 101, dtype=torch.bool)
            for start, width in augmentation.frequency_masks:
                masked[start : start + width] = True
            for start, width in augmentation.time_masks:
                masked[:, start : start + width] = True
            assert torch.equal(log_mel == 0, masked)


def test_time_warp_is_that_of_audio_ops_bit_by_bit(audio):
    waveforms = sounds(11)
    plain = audio(waveforms, [NOTHING] * 11)
    warps = [
        replace(NOTHING, warp_center=6 + 8 * clip, warp_shift=shift)
        for clip, shift in enumerate(range(-5, 6))
    ]
    expected = torch.stack([augment_log_mel(log_mel, warp) for log_mel, warp in zip(plain, warps)])
    assert torch.equal(audio(waveforms, warps), expected)


def test_masks_at_the_edges_and_of_no_width(audio):
    waveforms = sounds(4)
    augmentations = [
        replace(NOTHING, frequency_masks=((0, 257),)),
        replace(NOTHING, frequency_masks=((238, 19),), time_masks=((96, 5),)),
        replace(NOTHING, frequency_masks=((257, 0),), time_masks=((101, 0),)),
        replace(NOTHING, frequency_masks=((0, 1),), time_masks=((0, 1),)),
    ]
    expected = torch.stack(
        [augment_log_mel(*pair) for pair in zip(audio(waveforms, [NOTHING] * 4), augmentations)]
    )
    assert torch.equal(audio(waveforms, augmentations), expected)


@pytest.mark.parametrize("config", [CONFIG, AudioConfig(augment=False)])
def test_clip_without_augmentation_is_zero(config):
    waveforms, augmentations = sounds(4), draws(4, config)
    result = DaliAudio(config, batch_size=4)(waveforms, [None, augmentations[1], None, augmentations[3]])
    assert not result[0].any() and not result[2].any()
    assert (result[1::2] - reference(waveforms, augmentations, config)[1::2]).abs().max() < 1e-3


def test_clip_does_not_depend_on_its_neighbors(audio):
    waveforms, augmentations = sounds(16), draws(16, CONFIG)
    together = audio(waveforms, augmentations)
    order = list(RANDOM.permutation(16))
    shuffled = audio(waveforms[order], [augmentations[clip] for clip in order])
    assert torch.equal(shuffled, together[order])
    alone = DaliAudio(CONFIG, batch_size=1)
    for clip in (0, 7, 15):
        assert torch.equal(alone(waveforms[clip : clip + 1], [augmentations[clip]])[0], together[clip])
    assert torch.equal(audio(waveforms[3:8], augmentations[3:8]), together[3:8])  # fewer than batch_size


def test_number_of_threads_changes_nothing(audio):
    waveforms, augmentations = sounds(16), draws(16, CONFIG)
    threads = DaliAudio(CONFIG, batch_size=16, num_threads=4)
    assert torch.equal(threads(waveforms, augmentations), audio(waveforms, augmentations))


def test_result_is_not_overwritten_by_the_next_call(audio):
    first = audio(sounds(16), draws(16, CONFIG))
    kept = first.clone()
    for epoch in range(1, 4):
        audio(torch.from_numpy(np.stack([noise(9_000)] * 16)), draws(16, CONFIG, epoch))
    assert torch.equal(first, kept)


def test_memory_does_not_grow(audio):
    waveforms = sounds(16)

    def run(num_calls: int) -> int:
        for epoch in range(num_calls):
            audio(waveforms, draws(16, CONFIG, epoch))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = run(10)
    assert run(60) - before < 20_000  # KiB; 60 results that stayed would be 100 MB


def test_graph_takes_float_waveforms_inside_another_pipeline():
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    config = AudioConfig(time_warp_steps=0, num_frequency_masks=0, num_time_masks=0)
    pipeline = Pipeline(batch_size=2, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        waveform = fn.external_source(name="sound", dtype=types.FLOAT, ndim=1)
        pipeline.set_outputs(waveform, log_mel_graph(waveform, config, full_scale=1.0))
    waveforms = sounds(2)
    regions = np.zeros((2, 2), np.float32)
    _, log_mel = pipeline.run(
        sound=waveforms.float().numpy() / 32768, mask_anchors=regions, mask_shapes=regions
    )
    log_mel = torch.from_numpy(np.array(log_mel.as_tensor())).unsqueeze(1)
    assert (log_mel - reference(waveforms, [NOTHING] * 2, config)).abs().max() < 1e-3


def test_gdt_front_end_is_refused():
    with pytest.raises(ValueError, match="front_end is 'gdt', expected 'log-mel' with DALI; use .*portable"):
        DaliAudio(gdt_audio_config(), batch_size=2)


def test_too_long_fft_is_refused():
    with pytest.raises(ValueError, match="waveform has 1000 samples, expected more than 1024"):
        DaliAudio(
            AudioConfig(sample_rate=1000, hop_samples=10, window_samples=20, num_mel_bins=40), batch_size=2
        )


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_gpu_gives_what_the_cpu_gives(audio, pinned):
    on_gpu = DaliAudio(CONFIG, batch_size=16, device="cuda")
    results, expected = [], []
    for epoch in range(4):
        waveforms, augmentations = sounds(16), draws(16, CONFIG, epoch)
        augmentations[epoch] = None
        expected.append(audio(waveforms, augmentations))
        results.append(on_gpu(waveforms.pin_memory() if pinned else waveforms.cuda(), augmentations))
    for result, other in zip(results, expected):
        assert result.is_cuda and (result.cpu() - other).abs().max() < 1e-3
        assert torch.equal(result.cpu() == 0, other == 0)
