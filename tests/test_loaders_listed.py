"""Clips of listed files: which, from where, and that decoding a file once for all of them changes nothing."""

import dataclasses
import math
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from loaders.augment import ClipAugmentation, crop_in_source, draw_resized_crop, scaled_size
from loaders.batch import ClipBatch
from loaders.config import AudioConfig, LoaderConfig, VideoConfig
from loaders.listed import ClipSampling, ListedLoader, listed_config
from loaders.raw_video import RawVideoReader
from shards.sources import SourceVideo, with_hashes

VIDEO = VideoConfig(short_side=36, crop_size=32)


def write_video(
    path: Path, num_frames: int, *, fps: int = 25, size: tuple[int, int] = (64, 48), **options: str
) -> None:
    """MPEG-4 in AVI without sound, one key frame, as UCF101 has them. Six bars show the frame's number in binary."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps, options={"g": "300", "qscale": "2", **options})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(num_frames):
            bits = np.array([200 if number >> bit & 1 else 50 for bit in range(6)], dtype=np.uint8)
            picture = np.ascontiguousarray(
                np.broadcast_to(bits.repeat(size[1] // 6)[:, None, None], (size[1], size[0], 3))
            )
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def write_wav(path: Path, seconds: float, rate: int = 24_000) -> np.ndarray:
    """A ramp of int16, so that a sample tells its time."""
    samples = (np.arange(round(seconds * rate)) % 30_000).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return samples


def files_of(folder: Path, *names: str) -> list[SourceVideo]:
    return with_hashes((name, str(folder / name), Path(name).stem) for name in names)


def open_loader(folder: Path, names: list[str], sampling: ClipSampling, **changes: object) -> ListedLoader:
    config = listed_config(str(folder), video=VIDEO, batch_size=4, num_workers=0)
    config = dataclasses.replace(config, **changes)
    return ListedLoader(
        config, files_of(folder, *names), sampling, folder=str(folder), cache=str(folder / "index.json")
    )


def read_all(
    loader: ListedLoader,
) -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor, ClipBatch, int]]:
    """(file, slot) -> (frames, log_mel, batch, row) of the valid clips of an epoch."""
    clips = {}
    for batch in loader:
        for row, info in enumerate(batch.clips):
            if info is not None:
                assert (info.video_id, info.slot) not in clips
                clips[info.video_id, info.slot] = batch.frames[row], batch.log_mel[row], batch, row
    loader.close()
    return clips


def source_frames(frames: torch.Tensor) -> list[int]:
    """Numbers of the frames of `write_video` that a clip shows: a bar has 6 rows, the crop starts at the third."""
    bars = frames[:, :, 1:32:6].float().mean(dim=(0, 3)) > 125  # (T, 6)
    return (bars.long() << torch.arange(6)).sum(dim=1).tolist()


def first_frame(frames: torch.Tensor) -> int:
    """The first of `source_frames`."""
    return source_frames(frames)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("listed")
    write_video(folder / "long.avi", 50)
    write_video(folder / "exact.avi", 32)
    write_video(folder / "short.avi", 31)
    (folder / "broken.avi").write_bytes(b"RIFF nothing")
    write_wav(folder / "sound.wav", 5.0)
    return folder


def test_uniform_clips_are_consecutive_frames_from_the_first_to_the_last(folder: Path) -> None:
    clips = read_all(open_loader(folder, ["long.avi"], ClipSampling(clips_per_file=4)))
    assert [first_frame(clips["long.avi", slot][0]) for slot in range(4)] == [0, 6, 12, 18]  # 18 + 32 = 50
    assert source_frames(clips["long.avi", 3][0]) == list(range(18, 50))


def decoded_from_the_start(path: Path) -> torch.Tensor:
    """uint8 (frames, 3, 32, 32): all pictures of a file in one go, as the loader scales and cuts them."""
    with av.open(str(path)) as container:
        pictures = []
        for frame in container.decode(video=0):
            width, height = scaled_size(frame.width, frame.height, VIDEO.short_side)
            pixels = frame.reformat(width, height, "rgb24", interpolation="BILINEAR").to_ndarray()
            top, left = (height - 32) // 2, (width - 32) // 2
            pictures.append(torch.from_numpy(pixels[top : top + 32, left : left + 32]))
    return torch.stack(pictures).permute(0, 3, 1, 2)


def check_uniform_clips(folder: Path, name: str) -> None:
    """The first, the middle and the last clip are 32 consecutive pictures of the file, to the last bit but one."""
    pictures = decoded_from_the_start(folder / name).float()
    clips = read_all(open_loader(folder, [name], ClipSampling(clips_per_file=3)))
    last = len(pictures) - 32
    for slot, first in enumerate((0, last / 2, last)):
        found = clips[name, slot][0].permute(1, 0, 2, 3).float()
        distance = min(
            (pictures[start : start + 32] - found).abs().mean().item()
            for start in {math.floor(first), math.ceil(first)}
        )
        assert distance < 1, (name, slot)


@pytest.mark.parametrize("options", [{"bf": "0"}, {"bf": "2"}])
def test_pictures_that_are_stored_in_another_order_are_those_of_the_file(
    tmp_path: Path, options: dict
) -> None:
    write_video(tmp_path / "a.avi", 62, g="12", **options)
    with av.open(str(tmp_path / "a.avi")) as container:
        assert container.streams.video[0].codec_context.has_b_frames == (options["bf"] != "0")
    check_uniform_clips(tmp_path, "a.avi")


@pytest.mark.parametrize("dataset", ["ucf101/UCF-101", "hmdb51/hmdb51_org"])
def test_clips_of_real_action_videos_are_the_pictures_of_the_file(
    real_data: Path, tmp_path: Path, dataset: str
) -> None:
    """HMDB51's are XviD with two pictures in a packet, and empty packets behind them that are called key frames."""
    paths = sorted((real_data / dataset).rglob("*.avi"))[:6]
    for number, path in enumerate(paths):
        (tmp_path / f"{number}.avi").symlink_to(path)
        check_uniform_clips(tmp_path, f"{number}.avi")


def test_clips_as_gdt_places_them_never_reach_the_end(folder: Path) -> None:
    sampling = ClipSampling(clips_per_file=3, placement="uniform-gdt")
    clips = read_all(open_loader(folder, ["long.avi"], sampling))
    assert [first_frame(clips["long.avi", slot][0]) for slot in range(3)] == [0, 6, 12]


def test_files_that_give_no_clip_are_named_with_the_reason(folder: Path, tmp_path: Path) -> None:
    names = ["exact.avi", "short.avi", "broken.avi", "gone.avi", "long.avi"]
    loader = open_loader(folder, names, ClipSampling(clips_per_file=2))
    assert dict(loader.skipped) == {
        "short.avi": "too-short",
        "broken.avi": "undecodable",
        "gone.avi": "missing",
    }
    assert [file.video_id for file in loader.files] == ["exact.avi", "long.avi"]
    clips = read_all(loader)
    assert [first_frame(clips["exact.avi", slot][0]) for slot in range(2)] == [0, 0]
    with pytest.raises(ValueError, match=r"none of the 1 videos .*too-short 1"):
        open_loader(folder, ["short.avi"], ClipSampling())
    with pytest.raises(ValueError, match="no-audio 1"):
        open_loader(folder, ["long.avi"], ClipSampling(needs="both", clip_seconds=1.0))


@pytest.mark.parametrize("num_crops", [1, 3])
def test_a_file_decoded_once_gives_what_each_clip_by_itself_does(folder: Path, num_crops: int) -> None:
    sampling = ClipSampling(clips_per_file=5, num_crops=num_crops)
    once = read_all(open_loader(folder, ["long.avi", "exact.avi"], sampling))
    each = read_all(
        open_loader(folder, ["long.avi", "exact.avi"], dataclasses.replace(sampling, decode_once=False))
    )
    assert once.keys() == each.keys() and len(once) == 10 * num_crops
    assert all(torch.equal(once[place][0], each[place][0]) for place in once)


def test_three_crops_are_the_ends_and_the_middle_of_the_longer_side(folder: Path) -> None:
    clips = read_all(open_loader(folder, ["long.avi"], ClipSampling(clips_per_file=1, num_crops=3)))
    lefts = [batch.augmentations[row].crop_left for _, _, batch, row in clips.values()]
    tops = [batch.augmentations[row].crop_top for _, _, batch, row in clips.values()]
    assert lefts == [0, 8, 16] and set(tops) == {2}  # 64 x 48 scaled to 48 x 36, crop 32


def test_random_clips_change_with_the_epoch_and_repeat_with_the_seed(folder: Path) -> None:
    sampling = ClipSampling(placement="random", clips_per_file=8)

    def starts(loader: ListedLoader) -> list[float]:
        return [batch.clips[row].start_seconds for _, _, batch, row in read_all(loader).values()]

    loader = open_loader(folder, ["long.avi"], sampling)
    first, second = starts(loader), starts(loader)
    assert first != second
    assert first == starts(open_loader(folder, ["long.avi"], sampling))
    assert all(0 <= round(start * 25) <= 18 for start in first + second)


def test_every_place_of_a_random_clip_can_be_drawn(tmp_path: Path) -> None:
    write_video(tmp_path / "a.avi", 34)
    loader = open_loader(tmp_path, ["a.avi"], ClipSampling(placement="random", clips_per_file=40))
    assert {first_frame(clip[0]) for clip in read_all(loader).values()} == {0, 1, 2}


def test_sound_alone_gives_log_mel_of_the_clips_length_and_no_frames(folder: Path) -> None:
    sampling = ClipSampling(needs="audio", clip_seconds=2.0, clips_per_file=4)
    once = read_all(open_loader(folder, ["sound.wav"], sampling))
    each = read_all(open_loader(folder, ["sound.wav"], dataclasses.replace(sampling, decode_once=False)))
    assert [batch.clips[row].start_seconds for _, _, batch, row in once.values()] == pytest.approx(
        [0, 1, 2, 3], abs=1e-4
    )
    for place, (frames, log_mel, _, _) in once.items():
        assert frames.shape == (3, 0, 32, 32) and log_mel.shape == (1, 257, 201)
        assert torch.equal(log_mel, each[place][1])
    assert not torch.equal(once["sound.wav", 0][1], once["sound.wav", 1][1])


def test_a_file_is_decoded_once_for_many_clips_but_not_from_end_to_end_for_few(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = 0

    def read_bounds(*args: object, _read=RawVideoReader.read_bounds, **options: object) -> object:
        nonlocal reads
        reads += 1
        return _read(*args, **options)

    monkeypatch.setattr(RawVideoReader, "read_bounds", read_bounds)
    dense = ClipSampling(needs="audio", clip_seconds=1.0, clips_per_file=60)
    sparse = ClipSampling(needs="audio", clip_seconds=0.2, clips_per_file=3)
    for sampling, expected in ((dense, 1), (sparse, 3)):
        reads = 0
        once = read_all(open_loader(folder, ["sound.wav"], sampling))
        assert reads == expected
        each = read_all(open_loader(folder, ["sound.wav"], dataclasses.replace(sampling, decode_once=False)))
        assert all(torch.equal(once[place][1], each[place][1]) for place in once)


def test_a_wav_without_samples_is_skipped(real_data: Path, tmp_path: Path) -> None:
    write_wav(tmp_path / "good.wav", 2.0)
    empty = next(path for path in (real_data / "odd_audio").iterdir() if path.suffix == ".wav")
    (tmp_path / "empty.wav").symlink_to(empty)
    sampling = ClipSampling(needs="audio", clip_seconds=1.0, clips_per_file=1)
    loader = open_loader(tmp_path, ["empty.wav", "good.wav"], sampling)
    assert [name for name, _ in loader.skipped] == ["empty.wav"] and len(read_all(loader)) == 1


def test_stride_covers_a_file_to_its_end(folder: Path) -> None:
    sampling = ClipSampling(placement="stride", stride_seconds=0.4, clip_seconds=1.0)
    clips = read_all(open_loader(folder, ["long.avi"], sampling))
    starts = [batch.clips[row].start_seconds for _, _, batch, row in clips.values()]
    assert starts[:3] == pytest.approx([0, 0.4, 0.8]) and 0.98 <= starts[-1] <= 1.02
    center = read_all(open_loader(folder, ["long.avi"], dataclasses.replace(sampling, placement="center")))
    assert [batch.clips[row].start_seconds for _, _, batch, row in center.values()] == pytest.approx(
        [0.5], abs=0.02
    )


@pytest.mark.parametrize("clip_seconds", [0.25, 0.5, 1.0, 2.0])
def test_the_last_clip_of_any_length_is_whole(folder: Path, clip_seconds: float) -> None:
    clips = read_all(
        open_loader(folder, ["long.avi"], ClipSampling(clips_per_file=2, clip_seconds=clip_seconds))
    )
    assert len(clips) == 2
    assert source_frames(clips["long.avi", 1][0])[-1] >= 48


def test_damage_costs_the_clips_it_meets(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "10", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        noise = np.random.default_rng(0).integers(0, 255, (200, 48, 64, 3), dtype=np.uint8)
        for picture in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    sampling = ClipSampling(clips_per_file=4)
    whole = read_all(open_loader(tmp_path, ["a.mp4"], sampling))
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    place, size = packets[70]  # clips start at frames 0, 56, 112 and 168
    data[place + 5 : place + size] = bytes(size - 5)
    path.write_bytes(data)
    loader = open_loader(tmp_path, ["a.mp4"], sampling)
    batches = list(loader)
    assert [record.reason for batch in batches for record in batch.bad] == ["decode-error"]
    assert [batch.valid.tolist() for batch in batches] == [[True, False, True, True]]
    assert all(torch.equal(batches[0].frames[slot], whole["a.mp4", slot][0]) for slot in (0, 2, 3))
    loader.close()


def test_a_file_that_changed_since_it_was_indexed_is_not_read(tmp_path: Path) -> None:
    write_video(tmp_path / "a.avi", 40)
    loader = open_loader(tmp_path, ["a.avi"], ClipSampling(clips_per_file=4))
    (tmp_path / "a.avi").write_bytes((tmp_path / "a.avi").read_bytes()[:-1])
    assert [record.reason for batch in loader for record in batch.bad] == ["stale-index"] * 4
    loader.close()


def test_a_loader_goes_on_where_it_stopped(folder: Path) -> None:
    sampling = ClipSampling(placement="random", clips_per_file=6)
    changes = {"shuffle": True, "drop_last": True, "video": dataclasses.replace(VIDEO, augment=True)}
    whole = open_loader(folder, ["long.avi", "exact.avi"], sampling, **changes)
    batches = [(batch.keys, batch.frames.clone()) for batch in whole]
    part = open_loader(folder, ["long.avi", "exact.avi"], sampling, **changes)
    next(iter(part))
    state = part.state_dict()
    part.close()
    resumed = open_loader(folder, ["long.avi", "exact.avi"], sampling, **changes)
    resumed.load_state_dict(state)
    rest = [(batch.keys, batch.frames.clone()) for batch in resumed]
    assert [keys for keys, _ in rest] == [keys for keys, _ in batches[1:]]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(rest, batches[1:], strict=True))
    other = open_loader(folder, ["long.avi", "exact.avi"], ClipSampling(clips_per_file=6), **changes)
    with pytest.raises(ValueError, match="sampling"):
        other.load_state_dict(state)
    for loader in (whole, resumed, other):
        loader.close()


def test_workers_give_what_one_process_gives(folder: Path) -> None:
    sampling = ClipSampling(clips_per_file=3)
    alone = read_all(open_loader(folder, ["long.avi", "exact.avi"], sampling))
    shared = read_all(open_loader(folder, ["long.avi", "exact.avi"], sampling, num_workers=2))
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[place][0], shared[place][0]) for place in alone)


def test_a_resized_crop_shows_a_window_of_its_area_and_aspect() -> None:
    base = ClipAugmentation(scaled_height=144, scaled_width=192, crop_top=8, crop_left=32, crop_size=128)
    info = type("Info", (), {"source_crop": (0.0, 0.0, 320.0, 240.0)})
    shares = []
    for number in range(2000):
        crop = draw_resized_crop(base, (0.14, 1.0), 0, 0, f"clip{number}", 240, 320)
        x, y, width, height = crop_in_source(info, crop)
        assert -0.01 <= x and x + width <= 320.01 and -0.01 <= y and y + height <= 240.01
        assert 0.70 < width / height < 1.40  # 3/4 to 4/3, but for rounding to pixels
        shares.append(width * height / (320 * 240))
    assert 0.13 < min(shares) < 0.2 and 0.8 < max(shares) <= 1.0
    torch.manual_seed(0)
    picture = torch.empty(3, 240, 320)
    drawn = [RandomResizedCrop.get_params(picture, (0.14, 1.0), (3 / 4, 4 / 3)) for _ in range(2000)]
    expected = np.mean([height * width for _, _, height, width in drawn]) / (320 * 240)
    assert np.mean(shares) == pytest.approx(expected, abs=0.03)


def test_resized_crops_reach_the_frames(folder: Path) -> None:
    sampling = ClipSampling(placement="random", clips_per_file=4, resized_crop_area=(0.2, 0.4))
    loader = open_loader(folder, ["long.avi"], sampling, video=dataclasses.replace(VIDEO, augment=True))
    for _, _, batch, row in read_all(loader).values():
        done = batch.augmentations[row]
        assert done.crop_left + 32 <= done.scaled_width and done.crop_top + 32 <= done.scaled_height
        assert done.scaled_width > 64  # a fifth to two fifths of the frame fill the square


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"clips_per_file": 0}, "sampling.clips_per_file is 0"),
        ({"needs": "audio"}, "sampling.clip_seconds is None"),
        ({"clip_seconds": -1.0}, "sampling.clip_seconds is -1.0"),
        ({"num_crops": 2}, "sampling.num_crops is 2"),
        ({"resized_crop_area": (0.5, 0.1)}, "sampling.resized_crop_area"),
        ({"placement": "middle"}, "sampling.placement is 'middle'"),
    ],
)
def test_a_wrong_sampling_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipSampling(**changes)


def test_a_file_listed_twice_is_refused(folder: Path) -> None:
    file = files_of(folder, "long.avi")[0]
    config = LoaderConfig(shards=str(folder), backend="raw", video=VIDEO, audio=AudioConfig())
    with pytest.raises(ValueError, match="'long.avi' is twice"):
        ListedLoader(config, [file, file], ClipSampling(), folder=str(folder))
