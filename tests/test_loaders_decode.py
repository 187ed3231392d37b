"""Decoding gives exactly the frames and samples of a clip, or raises BadClip."""

import io
import struct
import wave

import av
import numpy as np
import pytest
from loaders_media import SIZES, encode_audio, encode_video, picture, remuxed, tone

from loaders.augment import yuv_window_size
from loaders.decode import (
    _decode_track,
    decode_frames,
    decode_waveform,
    decode_yuv_windows,
    uniform_frame_indices,
)
from shards.mp4 import read_video_track
from shards.schema import BadClip

ALL = range(32)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.square(a.astype(float) - b.astype(float)).mean())


@pytest.mark.parametrize("size", SIZES)
def test_frames_show_what_was_encoded_in_order(size):
    frames = decode_frames(encode_video(*size), ALL, 144)
    assert frames.shape == (32, size[1], size[0], 3) and frames.dtype == np.uint8
    for step in ALL:
        # The next frame differs by 8 levels of blue: 34 dB.
        assert psnr(frames[step], picture(*size, step)) > 36
    blue = frames[..., 2].mean(axis=(1, 2))
    assert np.abs(blue - 8.0 * np.arange(32)).max() < 3


def test_subset_of_frames_equals_those_of_all():
    video = encode_video(192, 144)
    assert np.array_equal(decode_frames(video, [2, 6, 31], 144), decode_frames(video, ALL, 144)[[2, 6, 31]])


def test_window_equals_the_cut_of_whole_frames_and_goes_to_out():
    video = encode_video(192, 144)
    out = np.zeros((4, 128, 100, 3), np.uint8)
    result = decode_frames(video, [0, 9, 10, 31], 144, window=(5, 40, 128, 100), out=out)
    assert result is out
    assert np.array_equal(out, decode_frames(video, [0, 9, 10, 31], 144)[:, 5:133, 40:140])


@pytest.mark.parametrize("window", [(0, 0, 144, 192), (5, 40, 128, 128), (8, 33, 101, 77), (3, 0, 64, 191)])
def test_flipped_frames_are_the_mirror_image_to_the_bit(window):
    video = encode_video(192, 144)
    plain = decode_frames(video, [0, 31], 144, window=window)
    assert np.array_equal(decode_frames(video, [0, 31], 144, window=window, flip=True), plain[:, :, ::-1])


@pytest.mark.parametrize(
    ("size", "scaled"), [((192, 144), (85, 64)), ((144, 192), (64, 85)), ((144, 144), (64, 64))]
)
def test_frames_are_scaled_to_the_short_side(size, scaled):
    frames = decode_frames(encode_video(*size), [0, 31], 64)
    assert frames.shape == (2, scaled[1], scaled[0], 3)
    assert psnr(frames[1], picture(*scaled, 31)) > 32


def test_decoding_twice_gives_the_same_bits():
    video = encode_video(144, 144)
    first = decode_frames(video, ALL, 72)
    decode_frames(encode_video(192, 144), ALL, 100)  # the scaler that is kept between clips saw another size
    assert np.array_equal(decode_frames(video, ALL, 72), first)


def test_uniform_frames_are_the_middles_of_equal_parts():
    assert uniform_frame_indices(32) == tuple(ALL)
    assert uniform_frame_indices(8) == (2, 6, 10, 14, 18, 22, 26, 30)
    assert uniform_frame_indices(1) == (16,)
    for num_frames in range(1, 33):
        indices = uniform_frame_indices(num_frames)
        assert len(set(indices)) == num_frames and indices == tuple(sorted(indices)) and indices[-1] < 32


@pytest.mark.parametrize("num_frames", [1, 31, 33, 64])
def test_another_number_of_frames_is_a_bad_clip(num_frames):
    with pytest.raises(BadClip) as caught:
        decode_frames(encode_video(144, 144, num_frames), [0], 144, key="k", shard="s.tar")
    assert (caught.value.key, caught.value.shard, caught.value.reason) == ("k", "s.tar", "frame-count")


def test_another_size_than_stated_is_a_bad_clip():
    with pytest.raises(BadClip, match="frame-size"):
        decode_frames(encode_video(144, 144), ALL, 144, stored_size=(192, 144))


VIDEO = encode_video(192, 144)


@pytest.mark.parametrize(
    "video",
    [
        b"",
        b"not a video" * 100,
        VIDEO[:100],
        VIDEO[: len(VIDEO) // 2],
        VIDEO[:1000] + bytes(len(VIDEO) - 1000),
        encode_audio(tone(440)),
    ],
    ids=["empty", "garbage", "head-only", "half", "zeros", "audio"],
)
def test_undecodable_video_is_a_bad_clip(video):
    with pytest.raises(BadClip) as caught:
        decode_frames(video, ALL, 144)
    assert caught.value.reason in ("decode-error", "frame-count")


@pytest.mark.parametrize("seed", range(20))
def test_damaged_video_gives_32_frames_or_a_bad_clip(seed):
    generator = np.random.default_rng(seed)
    data = bytearray(VIDEO)
    for position in generator.integers(0, len(data), 10):
        data[position] ^= 1 << int(generator.integers(8))
    try:
        assert decode_frames(bytes(data), ALL, 144, stored_size=(192, 144)).shape == (32, 144, 192, 3)
    except BadClip as error:
        assert error.reason in ("decode-error", "frame-count", "frame-size")


def test_libav_is_silent(capfd):
    with pytest.raises(BadClip):
        decode_frames(VIDEO[: len(VIDEO) // 2], ALL, 144)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_waveform_is_the_samples_over_32768():
    samples = np.array([-32768, -1, 0, 1, 32767] + [7] * 23_995, dtype="<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 24_000, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    waveform = decode_waveform(buffer.getvalue())
    assert waveform.dtype == np.float32 and waveform.shape == (24_000,)
    assert np.array_equal(waveform, samples / 32768)


@pytest.mark.parametrize(
    ("audio", "reason"),
    [
        (encode_audio(tone(440, 23_999)), "sample-count"),
        (encode_audio(tone(440, 24_001)), "sample-count"),
        (encode_audio(tone(440))[:20_000], "sample-count"),
        (b"", "decode-error"),
        (b"RIFF" + bytes(100), "decode-error"),
        (VIDEO, "decode-error"),
    ],
    ids=["short", "long", "cut", "empty", "garbage", "video"],
)
def test_another_waveform_is_a_bad_clip(audio, reason):
    with pytest.raises(BadClip) as caught:
        decode_waveform(audio)
    assert caught.value.reason == reason


def test_kept_decoders_give_the_same_bits_in_any_order_and_after_damage():
    damaged = bytearray(encode_video(192, 144))
    start, end = read_video_track(bytes(damaged)).samples[12]
    damaged[start + 8 : end] = bytes(reversed(damaged[start + 8 : end]))
    short = encode_video(192, 144, 31)
    videos = {size: encode_video(*size, crf=crf) for size, crf in zip(SIZES, (12, 20, 28))}
    expected = {size: by_container(video) for size, video in videos.items()}
    order = np.random.default_rng(0).permutation([*SIZES] * 6)
    for number, size in enumerate(map(tuple, order.tolist())):
        assert np.array_equal(decode_frames(videos[size], ALL, 144), expected[size])
        if number % 3 == 0:
            with pytest.raises(BadClip):
                decode_frames(bytes(damaged), ALL, 144)
        if number % 5 == 0:
            with pytest.raises(BadClip, match="frame-count"):
                decode_frames(short, ALL, 144)
        if number % 4 == 0:  # a clip that is left after its first frame
            with pytest.raises(BadClip, match="frame-size"):
                decode_frames(videos[size], ALL, 144, stored_size=(96, 96))


def by_container(video: bytes) -> np.ndarray:
    """RGB of every frame by libav alone: a demuxer, a decoder and a converter of its own for each clip."""
    with av.open(io.BytesIO(video)) as container:
        frames = [
            frame.to_ndarray(
                format="rgb24", src_colorspace="ITU601", src_color_range="MPEG", dst_color_range="JPEG",
                interpolation="BILINEAR",
            )
            for frame in container.decode(video=0)
        ]  # fmt: skip
    return np.stack(frames)


@pytest.mark.parametrize(("top", "left", "crop"), [(0, 0, 144), (7, 12, 128), (8, 33, 101), (16, 64, 128)])
def test_yuv_windows_hold_what_the_crop_needs(top, left, crop):
    video, window = encode_video(192, 144), yuv_window_size(crop)
    out = np.full((3, window * window * 3 // 2), 77, np.uint8)
    decode_yuv_windows(video, [0, 5, 31], 144, top=top, left=left, crop_size=crop, out=out)
    with av.open(io.BytesIO(video)) as container:
        frames = [frame.to_ndarray() for frame in container.decode(video=0)]  # (216, 192): Y, U, V
    for row, index in enumerate((0, 5, 31)):
        y, chroma = frames[index][:144], frames[index][144:].reshape(2, 72, 96)
        luma = out[row, : window * window].reshape(window, window)
        dy, dx = top % 2, left % 2
        expected = y[top : top + crop, left : left + crop]
        assert np.array_equal(luma[dy : dy + crop, dx : dx + crop], expected)
        half = out[row, window * window :].reshape(2, window // 2, window // 2)
        rows, columns = (dy + crop + 1) // 2, (dx + crop + 1) // 2
        expected = chroma[:, top // 2 : top // 2 + rows, left // 2 : left // 2 + columns]
        assert np.array_equal(half[:, :rows, :columns], expected)


def test_yuv_windows_of_scaled_and_damaged_clips():
    out = np.zeros((2, 66 * 66 * 3 // 2), np.uint8)
    decode_yuv_windows(encode_video(192, 144), [0, 31], 72, top=3, left=9, crop_size=64, out=out)
    assert out[:, : 66 * 66].std() > 10
    with pytest.raises(BadClip, match="frame-count"):
        decode_yuv_windows(encode_video(192, 144, 31), [0, 31], 72, top=3, left=9, crop_size=64, out=out)


def test_what_lies_behind_a_coded_frame_does_not_matter():
    video = remuxed(encode_video(192, 144), {"movflags": "+faststart"})
    expected = by_container(video)
    for seed in range(40):  # libav reads up to 64 bytes past the end of what it is given
        garbage = np.random.default_rng(seed).integers(0, 256, 4096, np.uint8).tobytes()
        box = struct.pack(">I4s", 8 + len(garbage), b"free")
        assert np.array_equal(decode_frames(video + box + garbage, ALL, 144), expected)


def test_packets_own_their_memory(monkeypatch):
    packets, make = [], av.Packet

    def recorded(*arguments) -> av.Packet:
        packets.append(make(*arguments))
        return packets[-1]

    monkeypatch.setattr("loaders.decode.av.Packet", recorded)
    video = bytearray(encode_video(144, 144))  # can change, as bytes cannot
    track = read_video_track(bytes(video))
    assert len(list(_decode_track(video, track))) == 32
    coded = [bytes(video[start:end]) for start, end in track.samples]
    video[:] = bytes(len(video))
    assert [bytes(packet) for packet in packets if packet.size] == coded
