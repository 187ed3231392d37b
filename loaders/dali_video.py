"""Encoded clips to crops and log-mels by one DALI pipeline, which one bad clip does not bring down."""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loaders.augment import ClipAugmentation
from loaders.config import LoaderConfig, VideoConfig
from loaders.dali_audio import Pipeline, audio_parameters, feed_ndarray, fn, log_mel_graph, types
from loaders.decode import uniform_frame_indices
from shards.schema import FRAMES_PER_CLIP, SHORT_SIDE

NUM_RUNNING = 2  # batches inside DALI: the next one is being decoded while one is taken out

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncodedClips:
    """What DALI is given of n clips, n >= 0."""

    videos: list[bytes]
    """Contents of key.mp4."""
    sizes: list[tuple[int, int]]
    """(width, height) that the decoded frames must have."""
    waveforms: list[np.ndarray]
    """int16 (24000,) each."""
    augmentations: list[ClipAugmentation]
    """What to do to each clip; color jitter is not done here."""

    def __len__(self) -> int:
        return len(self.videos)

    def select(self, rows: Sequence[int]) -> "EncodedClips":
        """These clips alone."""
        return EncodedClips(
            videos=[self.videos[row] for row in rows],
            sizes=[self.sizes[row] for row in rows],
            waveforms=[self.waveforms[row] for row in rows],
            augmentations=[self.augmentations[row] for row in rows],
        )


@dataclass(frozen=True, kw_only=True)
class DecodedClips:
    """What DALI made of n clips. On a GPU it is written when the stream that was current comes to it."""

    frames: Tensor
    """uint8 (n, T, H, W, 3): cropped and flipped."""
    log_mel: Tensor
    """float32 (n, 1, F, S): normalized and augmented."""
    faults: dict[int, str]
    """Row -> why the clip is bad: `decode-error`, `frame-count`, `frame-size`. Its rows above hold anything."""


def graph_parameters(augmentations: Sequence[ClipAugmentation], config: VideoConfig) -> dict[str, np.ndarray]:
    """What `frames_graph` is to do to each of N clips, by the name of the graph's input.

    Returns:
        crop_start: int32 (N, 3), (frame, row, column) where the crop starts; flip: int32 (N,). If frames are
        scaled also scaled_size: float32 (N, 2), (height, width).
    """
    parameters = {
        "crop_start": np.array([(0, a.crop_top, a.crop_left) for a in augmentations], np.int32),
        "flip": np.array([a.flip for a in augmentations], np.int32),
    }
    if is_scaled(config):
        sizes = [(a.scaled_height, a.scaled_width) for a in augmentations]
        parameters["scaled_size"] = np.array(sizes, np.float32)
    return parameters


def is_scaled(config: VideoConfig) -> bool:
    """Whether frames are scaled before the crop; else their short side must be that of shards."""
    return config.short_side != SHORT_SIDE


def frames_graph(videos: Any, config: VideoConfig, device: str) -> tuple[Any, Any]:
    """Inside a DALI pipeline: the crops of a batch of encoded videos.

    Declares external sources with the names of `graph_parameters`, to be fed in each iteration.

    Args:
        videos: DataNode, uint8, contents of key.mp4.
        config: number of frames, size, crop.
        device: `mixed`: decoded on the GPU, and frames stay there. `cpu`: all of it on the CPU, where DALI
            decodes VP8, VP9 and MJPEG, but not H.264.

    Returns:
        DataNodes: frames, uint8 (T, crop_size, crop_size, 3) per clip, and on the CPU the shape of the decoded
        video, int64 (4,): (frames, height, width, 3). What the crop needs and the video lacks is black, so
        that one short clip does not stop its batch: check the shape.
    """
    # DALI would pin the decoder's threads to cores, those of every rank on a machine to the same ones.
    threads = {"affine": False} if device == "mixed" else {}
    decoded = fn.decoders.video(
        videos, device=device, sequence_length=FRAMES_PER_CLIP, pad_mode="none", build_index=False, **threads
    )  # (frames, height, width, 3)
    frames = decoded
    if is_scaled(config):
        size = fn.external_source(name="scaled_size", dtype=types.FLOAT, ndim=1)
        frames = fn.resize(frames, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
    frames = fn.slice(
        frames,
        start=fn.external_source(name="crop_start", dtype=types.INT32, ndim=1),
        shape=[FRAMES_PER_CLIP, config.crop_size, config.crop_size],
        axis_names="FHW",
        out_of_bounds_policy="pad",
    )  # (32, crop_size, crop_size, 3)
    if config.num_frames < FRAMES_PER_CLIP:
        frames = fn.sequence_rearrange(frames, new_order=list(uniform_frame_indices(config.num_frames)))
    frames = fn.flip(frames, horizontal=fn.external_source(name="flip", dtype=types.INT32, ndim=0))
    return frames, decoded.shape()


class DaliDecoder:
    """Batches of encoded clips in, crops and log-mels out, in order. Used by one thread.

    DALI gives up a whole batch when it cannot decode one of its clips. Then the pipeline is built anew and the
    batch is decoded in halves, and halves of those, until what is left are the clips that DALI cannot decode:
    at most 2 n - 1 runs for a batch of n, and nothing of the others is lost.
    """

    def __init__(self, config: LoaderConfig, batch_size: int, device: torch.device) -> None:
        """
        Args:
            config: frames, log-mel, and dali_threads.
            batch_size: the most clips of one batch.
            device: where clips are decoded. `cpu`: VP8, VP9 and MJPEG only.
        """
        self._config = config
        self._batch_size = batch_size
        self._device = device
        self._pipeline: Any = None
        self._num_fed = 0  # batches that the pipeline was given
        self._submitted: deque[EncodedClips] = deque()
        self._decodable: EncodedClips | None = None  # one clip that was decoded before

    @property
    def has_room(self) -> bool:
        """Whether more should be submitted before the next `take`, for DALI to have something to do."""
        return len(self._submitted) < NUM_RUNNING

    def submit(self, clips: EncodedClips) -> None:
        """Hands over a batch; DALI starts on it when it is done with those before."""
        assert len(clips) <= self._batch_size, len(clips)
        self._submitted.append(clips)
        if self._pipeline is not None:
            self._feed(clips)

    def take(self) -> DecodedClips:
        """The oldest batch submitted; waits for it.

        Raises:
            RuntimeError: DALI decodes nothing any more, or nothing of the first batch.
        """
        if self._pipeline is None and all(self._first_submitted()) and not self.has_room:
            self._pipeline, self._num_fed = self._build(NUM_RUNNING), 0
            for clips in self._submitted:
                self._feed(clips)
        clips = self._submitted.popleft()
        if not clips:
            return self._allocate(0)
        if self._pipeline is None:
            return self._decode_in_parts(clips)
        decoded = self._allocate(len(clips))
        try:
            outputs = self._pipeline.share_outputs()
        except Exception as error:  # whatever DALI makes of what its operators throw
            log.warning(
                "DALI gave up a batch of %d clips (%s); decoding it in parts", len(clips), _cause(error)
            )
            self._pipeline = None
            return self._decode_in_parts(clips)
        self._copy_out(outputs, clips, decoded)
        self._pipeline.release_outputs()
        return decoded

    def _first_submitted(self) -> list[EncodedClips]:
        return list(self._submitted)[:NUM_RUNNING]

    def _build(self, depth: int) -> Any:
        """A pipeline; depth: iterations that its first run starts."""
        device = "cpu" if self._device.type == "cpu" else "mixed"
        pipeline = Pipeline(
            batch_size=self._batch_size,
            num_threads=self._config.dali_threads,
            device_id=None if device == "cpu" else self._device.index,
            prefetch_queue_depth=depth,
        )
        with pipeline:
            videos = fn.external_source(name="videos", dtype=types.UINT8, ndim=1)
            waveforms = fn.external_source(name="waveforms", dtype=types.INT16, ndim=1)
            if device == "mixed":
                waveforms = waveforms.gpu()
            frames, shapes = frames_graph(videos, self._config.video, device)
            pipeline.set_outputs(frames, shapes, log_mel_graph(waveforms, self._config.audio))
        pipeline.build()
        return pipeline

    def _feed(self, clips: EncodedClips) -> None:
        """Gives the pipeline a batch and starts it. The first run starts NUM_RUNNING of them."""
        if not clips:
            return
        _feed_inputs(self._pipeline, self._config, clips)
        self._num_fed += 1
        if self._num_fed >= NUM_RUNNING:
            self._pipeline.schedule_run()

    def _allocate(self, num_clips: int) -> DecodedClips:
        video, audio = self._config.video, self._config.audio
        size = video.crop_size
        frames = (num_clips, video.num_frames, size, size, 3)
        log_mel = (num_clips, 1, audio.num_mel_bins, audio.num_steps())
        return DecodedClips(
            frames=torch.empty(frames, dtype=torch.uint8, device=self._device),
            log_mel=torch.empty(log_mel, dtype=torch.float32, device=self._device),
            faults={},
        )

    def _copy_out(self, outputs: Any, clips: EncodedClips, decoded: DecodedClips) -> None:
        """Outputs of a finished run into decoded, faults included."""
        frames, shapes, log_mel = outputs
        stream = None if self._device.type == "cpu" else torch.cuda.current_stream(self._device)
        feed_ndarray(frames.as_tensor(), decoded.frames, cuda_stream=stream)
        feed_ndarray(log_mel.as_tensor(), decoded.log_mel.squeeze(1), cuda_stream=stream)
        if stream is not None:
            stream.synchronize()  # from here on DALI may write to its buffers again
        for row, (shape, (width, height)) in enumerate(zip(np.array(shapes.as_tensor()), clips.sizes)):
            if shape[0] != FRAMES_PER_CLIP:
                decoded.faults[row] = "frame-count"
            elif tuple(shape[1:]) != (height, width, 3):
                decoded.faults[row] = "frame-size"
            elif self._decodable is None:
                self._decodable = clips.select([row])

    def _decode_once(self, clips: EncodedClips) -> DecodedClips:
        """clips, by a pipeline that does nothing else; raises what DALI raises."""
        decoded = self._allocate(len(clips))
        pipeline = self._build(1)
        _feed_inputs(pipeline, self._config, clips)
        self._copy_out(pipeline.run(), clips, decoded)
        return decoded

    def _decode_in_parts(self, clips: EncodedClips) -> DecodedClips:
        """clips; those that DALI cannot decode become faults."""
        decoded = self._allocate(len(clips))
        parts, num_refused = [list(range(len(clips)))], 0
        while parts:
            rows = parts.pop()
            try:
                part = self._decode_once(clips.select(rows))
            except Exception as error:  # see take
                if len(rows) > 1:
                    parts += [rows[len(rows) // 2 :], rows[: len(rows) // 2]]
                    continue
                decoded.faults[rows[0]] = "decode-error"
                num_refused += 1
                if num_refused == len(clips) and not self._still_decodes(num_refused):
                    raise RuntimeError(
                        f"DALI decodes none of {num_refused} clips ({_cause(error)}), expected a GPU whose "
                        f"hardware decoder takes them; use loader.backend dali-cpu-decode or portable"
                    ) from error
                continue
            decoded.frames[rows], decoded.log_mel[rows] = part.frames, part.log_mel
            decoded.faults.update({rows[row]: reason for row, reason in part.faults.items()})
        return decoded

    def _still_decodes(self, num_refused: int) -> bool:
        """Whether it is the clips' fault that DALI refused a whole batch of them."""
        if self._decodable is None:
            return num_refused == 1
        try:
            self._decode_once(self._decodable)
        except Exception:  # see take
            return False
        return True


def _feed_inputs(pipeline: Any, config: LoaderConfig, clips: EncodedClips) -> None:
    pipeline.feed_input("videos", [np.frombuffer(video, np.uint8) for video in clips.videos])
    pipeline.feed_input("waveforms", np.stack(clips.waveforms))
    parameters = {
        **graph_parameters(clips.augmentations, config.video),
        **audio_parameters(clips.augmentations, config.audio),
    }
    for name, values in parameters.items():
        pipeline.feed_input(name, values)


def _cause(error: Exception) -> str:
    """The line of DALI's message that says what went wrong."""
    text = str(error)
    lines = text.partition("encountered:")[2].split("\n") if "encountered:" in text else text.split("\n")
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)
