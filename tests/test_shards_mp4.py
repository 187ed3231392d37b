"""The sample table of an mp4 file, read without libav."""

import io
import struct
from fractions import Fraction

import av
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders_media import SIZES, encode_video, picture, remuxed
from mutations import crafted_videos

from shards.mp4 import decode, open_decoder, read_video_track


def demuxed(video: bytes) -> tuple[bytes, list[bytes]]:
    """(extradata, coded frames) as libav's demuxer has them."""
    with av.open(io.BytesIO(video), format="mp4") as container:
        stream = container.streams.video[0]
        packets = [bytes(packet) for packet in container.demux(stream) if packet.size]
        return bytes(stream.codec_context.extradata), packets


def encoded(codec: str, options: dict[str, str], size: int = 144, num_frames: int = 32) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=32, options=options)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for step in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(size, size, step), format="rgb24")
            frame.pts, frame.time_base = step, Fraction(1, 32)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{}, {"movflags": "+faststart"}])
def test_samples_are_the_packets_of_libav(size, options):
    video = remuxed(encode_video(*size), options)
    extradata, packets = demuxed(video)
    track = read_video_track(video)
    assert track.extradata == extradata
    assert [video[start:end] for start, end in track.samples] == packets and len(packets) == 32


def test_other_forms_are_left_to_libav():
    plain = encode_video(144, 144)
    with pytest.raises(ValueError, match="fragments"):
        read_video_track(remuxed(plain, {"movflags": "+frag_keyframe+empty_moov"}))
    with pytest.raises(ValueError, match="reordered"):
        read_video_track(encoded("libx264", {"bf": "2", "b-adapt": "0"}))
    with pytest.raises(ValueError, match="avc1"):
        read_video_track(encoded("mpeg4", {}))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_cut_files_are_an_error(share):
    video = encode_video(144, 144)
    for whole in (video, remuxed(video, {"movflags": "+faststart"})):
        with pytest.raises(ValueError):
            read_video_track(whole[: int(share * len(whole))])


def test_a_table_longer_than_its_box_is_an_error_and_costs_no_memory():
    video = bytearray(encode_video(144, 144))
    table = video.index(b"stsz")
    struct.pack_into(">I", video, table + 12, 0x7FFFFFFF)
    with pytest.raises(ValueError, match="longer than its box"):
        read_video_track(bytes(video))


def test_samples_outside_the_file_are_an_error():
    video = bytearray(encode_video(144, 144))
    table = video.index(b"stco")
    struct.pack_into(">I", video, table + 12, len(video) - 10)
    with pytest.raises(ValueError, match="of a file of"):
        read_video_track(bytes(video))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_bytes_give_a_track_inside_the_file_or_an_error(data):
    video = bytearray(encode_video(144, 144))
    start = video.index(b"moov")
    for _ in range(data.draw(st.integers(1, 4))):
        video[data.draw(st.integers(start, len(video) - 1))] = data.draw(st.integers(0, 255))
    try:
        track = read_video_track(bytes(video))
    except ValueError:
        return
    assert all(0 <= start < end <= len(video) for start, end in track.samples)


def test_parameter_sets_belong_into_the_header_and_every_sample_is_a_picture():
    # In a sample they would stay in a decoder that is kept, and spoil the clips that come after.
    video = bytearray(encode_video(144, 144))
    samples = read_video_track(bytes(video)).samples
    for number, kind in ((12, 8), (12, 7), (0, 1), (3, 6)):
        changed = bytearray(video)
        position = samples[number][0]
        while number == 0 and changed[position + 4] & 31 != 5:  # after what the encoder says of itself
            position += 4 + int.from_bytes(changed[position : position + 4], "big")
        changed[position + 4] = changed[position + 4] & 0xE0 | kind
        with pytest.raises(ValueError, match=f"sample {number} has NAL units of types"):
            read_video_track(bytes(changed))


def test_many_samples_cost_no_memory():
    video = encode_video(144, 144)
    table = video.index(b"stsz")
    changed = bytearray(video) + bytes(2_000_000)
    struct.pack_into(">II", changed, table + 8, 1, 2_000_000)  # constant size 1
    struct.pack_into(">I4s", changed, len(video), 2_000_000, b"free")
    assert len(read_video_track(bytes(changed)).samples) == 1000


def test_boxes_in_boxes_of_a_sample_description_are_not_followed():
    # 60,000 deep: more than the interpreter's stack holds.
    video = encode_video(144, 144)
    crafted = crafted_videos(video)["60000 b'moov' boxes in avc1"]
    assert read_video_track(crafted).extradata == read_video_track(video).extradata


@pytest.mark.timeout(30)
def test_samples_of_many_units_in_one_place_take_no_time():
    # Half a megabyte that took 153 s.
    with pytest.raises(ValueError, match="more than 256 NAL units"):
        read_video_track(crafted_videos(encode_video(144, 144))["1000 samples of one place, of small units"])


@pytest.mark.parametrize("name", ["a million empty boxes", "avcC of a megabyte"])
def test_more_of_something_than_any_clip_has_is_an_error(name):
    with pytest.raises(ValueError, match="expected at most|more than"):
        read_video_track(crafted_videos(encode_video(144, 144))[name])


def test_frames_larger_than_any_clip_are_not_decoded():
    video = encoded("libx264", {"bf": "0"}, size=1040, num_frames=1)
    track = read_video_track(video)
    with pytest.raises(av.error.FFmpegError):
        list(decode(open_decoder(track), video, track))
