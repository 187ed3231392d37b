"""Which parts of a damaged file do not decode. ffmpeg hides them: it repeats frames, guesses blocks, fills in
silence."""

from collections.abc import Iterator

import av

from shards.media import SourceLimits, Unusable, open_media

AUDIO_GAP_SECONDS = 0.05
"""A hole in the sound of a damaged file is damage from this length on."""
VIDEO_GAP_SECONDS = 0.5
"""The same for the picture, where frames may be far apart by intention."""

Span = tuple[float, float]


def find_damage(
    path: str,
    video_stream: int,
    audio_stream: int,
    read_seconds: float,
    limits: SourceLimits,
    *,
    seek_seconds: float | None = None,
) -> list[Span]:
    """(start, end) in seconds after the start of the container, not sorted, may overlap. Only for files in
    which ffmpeg reported errors: the file is decoded once more, strictly.

    Args:
        read_seconds: decoding ends there.
        seek_seconds: only what is told of parts after this counts, and decoding begins not long before. For files
            in which one can jump there exactly. None: it begins at the start of the file.

    A part is damaged where a packet of either stream does not decode without error, where packets are
    missing, and in the picture from there to the next key frame. Raises nothing for what is in the file.
    """
    spans: list[Span] = []
    try:
        with open_media(path, limits) as container:
            origin = (container.start_time or 0) / av.time_base
            streams = {index: container.streams[index] for index in (video_stream, audio_stream)}
            for stream in streams.values():
                stream.codec_context.thread_type = "NONE"
                stream.codec_context.options |= {"err_detect": "explode"}
            if seek_seconds is not None:
                _jump(container, streams[video_stream], seek_seconds + origin)
            last_end: dict[int, float] = {}
            bad_picture: Span | None = None
            for packet in _packets(container, list(streams.values())):
                if packet.pts is None or packet.time_base is None:
                    continue
                start = float(packet.pts * packet.time_base) - origin
                end = start + float((packet.duration or 0) * packet.time_base)
                if start > read_seconds:
                    break
                is_video = packet.stream.index == video_stream
                gap = VIDEO_GAP_SECONDS if is_video else AUDIO_GAP_SECONDS
                if start > last_end.get(packet.stream.index, start) + gap:
                    spans.append((last_end[packet.stream.index], start))
                last_end[packet.stream.index] = max(end, last_end.get(packet.stream.index, end))
                good = _decodes(packet)
                if not is_video:
                    if not good:
                        spans.append((start, end))
                    continue
                if good and packet.is_keyframe and bad_picture is not None:
                    spans.append((bad_picture[0], max(bad_picture[1], start)))
                    bad_picture = None
                elif not good or bad_picture is not None:
                    first, last = bad_picture or (start, end)
                    bad_picture = (min(first, start), max(last, end))
            if bad_picture is not None:
                spans.append((bad_picture[0], float("inf")))
    except (av.error.FFmpegError, OSError, ValueError, IndexError, ArithmeticError, Unusable):
        spans.append((0.0, float("inf")))
    return spans


def _packets(container: av.container.InputContainer, streams: list[av.stream.Stream]) -> Iterator[av.Packet]:
    """Packets up to the end or to where the container cannot be read any more."""
    packets = container.demux(*streams)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.error.FFmpegError):
            return
        yield packet


def _jump(container: av.container.InputContainer, video: av.stream.Stream, seconds: float) -> None:
    """To the key frame before the last one that is not after `seconds`: what follows the one that is jumped to may
    refer to what is before it, which here is no damage."""
    container.seek(round(seconds * av.time_base))
    for packet in container.demux(video):
        if packet.is_keyframe and packet.pts is not None:
            times = [time for time in (packet.pts, packet.dts) if time is not None]
            container.seek(min(times) - 1, stream=video)
            return


def _decodes(packet: av.Packet) -> bool:
    try:
        return not any(frame.is_corrupt for frame in packet.decode())
    except av.error.FFmpegError:
        return False
