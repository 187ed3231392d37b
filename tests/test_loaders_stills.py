"""Pairs of a still image and a sound: what a batch holds of them, and what becomes of those that are not whole."""

import wave
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from loaders_media import encode_audio, tone
from PIL import Image

from loaders.audio_ops import log_mel_spectrogram
from loaders.config import AudioConfig, VideoConfig
from loaders.listed import listed_config
from loaders.localisation_sets import PairFiles, PairNames, find_pairs, find_videos
from loaders.stills import StillsLoader
from shards.schema import SAMPLE_RATE

VIDEO = VideoConfig(num_frames=4, short_side=36, crop_size=32, augment=False)
AUDIO = AudioConfig(augment=False)
WIDTH, HEIGHT = 96, 64


def gradient(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    red, green = 255 * (x + 0.5) / width, 255 * (y + 0.5) / height
    return np.stack([red, green, np.full_like(red, 128)], axis=-1).round().astype(np.uint8)


def chirp(seconds: float) -> np.ndarray:
    """A tone of another frequency in each second: 400 Hz in the first, 800 Hz in the second, ..."""
    parts = [tone(400 * (second + 1)) for second in range(int(np.ceil(seconds)))]
    return np.concatenate(parts)[: round(seconds * SAMPLE_RATE)]


def write_pair(folder: Path, sample_id: str, seconds: float = 3.0, suffix: str = ".png") -> None:
    for part in ("frames", "audio"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(gradient()).save(folder / "frames" / f"{sample_id}{suffix}")
    (folder / "audio" / f"{sample_id}.wav").write_bytes(encode_audio(chirp(seconds)))


def named(*ids: str) -> list[PairNames]:
    return [PairNames(image_id=name, audio_id=name) for name in ids]


def build(folder: Path, pairs: list[PairFiles], *, workers: int = 0, batch_size: int = 2, **options):
    config = listed_config(str(folder), video=VIDEO, audio=AUDIO, batch_size=batch_size, num_workers=workers)
    return StillsLoader(config, pairs, folder=str(folder), cache=str(folder / "index.json"), **options)


def test_a_clip_is_the_whole_image_repeated_and_the_middle_second(tmp_path):
    write_pair(tmp_path, "a")
    pairs, missing = find_pairs(tmp_path, named("a"))
    loader = build(tmp_path, pairs, batch_size=1)
    (batch,) = loader
    assert missing == [] and batch.valid.tolist() == [True] and batch.keys[0].endswith("_00")
    frames = batch.frames[0].permute(1, 2, 3, 0)  # (T, S, S, 3)
    assert frames.shape == (4, 32, 32, 3) and frames.dtype == torch.uint8
    assert torch.equal(frames, frames[:1].expand_as(frames))
    # Squashed: both gradients go from edge to edge of the square.
    ramp = torch.from_numpy(gradient(32, 32)).float()
    assert (frames[0].float() - ramp).abs().max() <= 2
    # 800 Hz sounds in the second second of three.
    expected = log_mel_spectrogram(torch.from_numpy(tone(800)), AUDIO)
    assert batch.log_mel.shape == (1, 1, 257, 101)
    inner = slice(8, -8)  # the resampler and the edges of other seconds
    loudest = batch.log_mel[0, 0, :, inner].mean(dim=1).argmax()
    assert loudest == expected[:, inner].mean(dim=1).argmax()
    info, done = batch.clips[0], batch.augmentations[0]
    assert info.video_id == "a"
    assert (info.start_seconds, info.end_seconds) == pytest.approx((1.0, 2.0), abs=1e-3)
    assert (info.source_width, info.source_height, info.source_crop) == (96, 64, (0.0, 0.0, 96.0, 64.0))
    assert (done.scaled_width, done.scaled_height, done.crop_left, done.crop_top) == (32, 32, 0, 0)


def test_crop_keeps_the_aspect_and_cuts_the_center(tmp_path):
    write_pair(tmp_path, "a")
    loader = build(tmp_path, find_pairs(tmp_path, named("a"))[0], batch_size=1, fit="crop")
    (batch,) = loader
    done = batch.augmentations[0]
    assert (done.scaled_width, done.scaled_height) == (54, 36)
    assert (done.crop_left, done.crop_top, done.crop_size) == (11, 2, 32)
    expected = torch.from_numpy(gradient(54, 36)[2:34, 11:43]).float()
    assert (batch.frames[0, :, 0].permute(1, 2, 0).float() - expected).abs().max() <= 3


def test_clip_seconds_is_how_much_of_the_middle_is_heard(tmp_path):
    write_pair(tmp_path, "a", seconds=5.0)
    loader = build(tmp_path, find_pairs(tmp_path, named("a"))[0], batch_size=1, clip_seconds=2.0)
    (batch,) = loader
    assert batch.log_mel.shape == (1, 1, 257, 201)
    assert (batch.clips[0].start_seconds, batch.clips[0].end_seconds) == pytest.approx((1.5, 3.5), abs=1e-3)


def test_pairs_that_are_not_whole_are_counted_by_reason(tmp_path):
    for name in ("good", "torn", "text", "short", "mute", "empty", "no-image", "no-sound"):
        write_pair(tmp_path, name, suffix=".jpg")
    frames, audio = tmp_path / "frames", tmp_path / "audio"
    (frames / "torn.jpg").write_bytes((frames / "torn.jpg").read_bytes()[:600])
    (frames / "text.jpg").write_text("<html>404</html>")
    (frames / "no-image.jpg").unlink()
    (audio / "no-sound.wav").unlink()
    (audio / "short.wav").write_bytes(encode_audio(tone(400, 12_000)))
    (audio / "mute.wav").write_bytes(encode_audio(np.zeros(2 * SAMPLE_RATE, dtype=np.float32)))
    (audio / "empty.wav").write_bytes(b"")
    names = named("good", "torn", "text", "short", "mute", "empty", "no-image", "no-sound", "absent")
    pairs, missing = find_pairs(tmp_path, names)
    assert dict(missing) == {
        "no-image": "missing-image",
        "no-sound": "missing-audio",
        "absent": "missing-image",
    }
    loader = build(tmp_path, pairs)
    assert dict(loader.skipped) == {"short": "too-short", "empty": "undecodable"}
    batches = list(loader)
    assert len(batches) == len(loader) == 2
    seen = [info.video_id for batch in batches for info in batch.clips if info is not None]
    assert seen == ["good", "mute"]  # silence is sound
    bad = [(record.shard, record.reason) for batch in batches for record in batch.bad]
    assert bad == [("torn", "bad-image"), ("text", "bad-image")]
    assert loader.bad_clips == Counter({"bad-image": 2})


def test_a_file_that_vanishes_while_reading_is_a_bad_clip(tmp_path):
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b")
    loader = build(tmp_path, find_pairs(tmp_path, named("a", "b"))[0])
    (tmp_path / "frames" / "a.png").unlink()
    (tmp_path / "audio" / "b.wav").unlink()
    (batch,) = loader
    assert batch.valid.tolist() == [False, False]
    assert [(record.shard, record.reason) for record in batch.bad] == [
        ("a", "missing-image"),
        ("b", "missing"),
    ]


def test_image_formats_and_modes_become_rgb(tmp_path):
    write_pair(tmp_path, "color")
    image = Image.open(tmp_path / "frames" / "color.png")
    for mode in ("L", "P", "RGBA", "CMYK"):
        write_pair(tmp_path, mode)
        (tmp_path / "frames" / f"{mode}.png").unlink()
        suffix = ".jpeg" if mode == "CMYK" else ".png"
        image.convert(mode).save(tmp_path / "frames" / f"{mode}{suffix}", format=None)
    pairs, missing = find_pairs(tmp_path, named("L", "P", "RGBA", "CMYK"))
    (batch,) = build(tmp_path, pairs, batch_size=4)
    assert missing == [] and batch.valid.all()
    grey = batch.frames[0]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])
    assert (batch.frames[2, 0, 0, 16].float().diff() >= 0).all()


def test_workers_give_the_batches_of_one_process_and_resume(tmp_path):
    for number in range(5):
        write_pair(tmp_path, f"p{number}", seconds=2.0 + number / 2)
    pairs, _ = find_pairs(tmp_path, named(*[f"p{number}" for number in range(5)]))
    alone = list(build(tmp_path, pairs))
    loader = build(tmp_path, pairs, workers=1)
    try:
        first = next(iter(loader))
        state = loader.state_dict()
    finally:
        loader.close()
    assert torch.equal(first.frames, alone[0].frames) and torch.equal(first.log_mel, alone[0].log_mel)
    resumed = build(tmp_path, pairs)
    resumed.load_state_dict(state)
    rest = list(resumed)
    assert [batch.keys for batch in rest] == [batch.keys for batch in alone[1:]]
    assert rest[-1].valid.tolist() == [True, False]  # five pairs in batches of two
    with pytest.raises(ValueError, match="loader state was saved with pairs"):
        build(tmp_path, pairs, fit="crop").load_state_dict(state)


def test_one_sound_can_belong_to_two_images(tmp_path):
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b")
    names = [*named("a"), PairNames(image_id="b", audio_id="a", sounding=False)]
    pairs, missing = find_pairs(tmp_path, names)
    (batch,) = build(tmp_path, pairs)
    assert missing == [] and [info.video_id for info in batch.clips] == ["a", "b+a"]
    assert torch.equal(batch.log_mel[0], batch.log_mel[1])
    assert len(set(batch.keys)) == 2


def test_stereo_sound_of_another_rate_is_read(tmp_path):
    write_pair(tmp_path, "a")
    samples = np.stack([tone(500, 2 * SAMPLE_RATE)] * 2, axis=1)
    with wave.open(str(tmp_path / "audio" / "a.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(48_000)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    (batch,) = build(tmp_path, find_pairs(tmp_path, named("a"))[0], batch_size=1)
    # Written for 24 kHz and played twice as fast: 1 kHz, of which one second is left.
    expected = log_mel_spectrogram(torch.from_numpy(tone(1000)), AUDIO)
    assert batch.log_mel[0, 0].mean(dim=1).argmax() == expected.mean(dim=1).argmax()


def test_names_of_other_copies_of_vggsound_are_found(tmp_path):
    sample_id = "zpWuikVorYg_000032"
    write_pair(tmp_path, "zpWuikVorYg_32000_42000")
    pairs, missing = find_pairs(tmp_path, named(sample_id))
    assert missing == [] and pairs[0].image == "frames/zpWuikVorYg_32000_42000.png"
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / f"{sample_id}.mp4").write_bytes(b"")
    (tmp_path / "other.mp4").write_bytes(b"")
    found = find_videos(tmp_path, [sample_id, "other", "absent"])
    assert [(name, video.video_id, video.path is not None) for name, video in found] == [
        (sample_id, f"videos/{sample_id}.mp4", True),
        ("other", "other.mp4", True),
        ("absent", "absent.mp4", False),
    ]
    with pytest.raises(ValueError, match="has no folder `frames`"):
        find_pairs(tmp_path / "videos", named("a"))
    with pytest.raises(ValueError, match="is not a folder"):
        find_videos(tmp_path / "nowhere", ["a"])


def test_what_stills_cannot_do_is_refused(tmp_path):
    write_pair(tmp_path, "a")
    pairs, _ = find_pairs(tmp_path, named("a"))
    with pytest.raises(ValueError, match="expected squash or crop"):
        build(tmp_path, pairs, fit="pad")
    with pytest.raises(ValueError, match="twice in the list of pairs"):
        build(tmp_path, pairs * 2)
    with pytest.raises(ValueError, match="expected both off"):
        config = listed_config(str(tmp_path), batch_size=1, num_workers=0)
        object.__setattr__(config, "video", VideoConfig())
        StillsLoader(config, pairs, folder=str(tmp_path))
