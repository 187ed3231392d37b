"""H.264 decoded on the CPU, the rest by DALI and, on a GPU, one kernel for the pixels.

DALI has no H.264 decoder for the CPU, and one for the GPU only where NVDEC is. Here the worker processes of the
portable loader decode; what is left of each clip is done in batches, in a thread beside the training step.

    CPU:  worker: read, decode, cut, flip, RGB -> DALI: log-mel, SpecAugment -> ClipBatch
    GPU:  worker: read, decode, cut (YUV)      -> page-locked copy on a stream of its own
              -> kernel: RGB, crop, flip, jitter [, normalize] ; DALI: log-mel, SpecAugment -> ClipBatch
"""

import torch
from torch import Tensor

from loaders.base import open_shard_table
from loaders.batch import ClipBatch
from loaders.config import LoaderConfig
from loaders.dali_audio import DaliAudio, check_audio_config
from loaders.device import DeviceBatch, Uploader
from loaders.kernels.frames import finish_frames
from loaders.video_ops import frame_parameters
from loaders.workers import ClipOutputs, FilledPart, FilledRequest, ShardClips, WorkerLoader, assemble_batch


class DaliCpuDecodeLoader(WorkerLoader):
    """Batches of one rank; see `loaders.Loader` for the interface."""

    def __init__(
        self,
        config: LoaderConfig,
        rank: int = 0,
        world_size: int = 1,
        *,
        device: torch.device | str = "cpu",
        frames_dtype: torch.dtype = torch.uint8,
    ) -> None:
        """Reads the manifest and checks the shards (`shard_files.open_shards`).

        Args:
            config: what to read and what to do to it.
            rank: which part of each global batch.
            world_size: number of ranks.
            device: where the batches are handed out.
            frames_dtype: uint8, or on a GPU a float type for frames that are normalized already.

        Raises:
            ValueError: as PortableLoader; or the audio front end is not `log-mel`, or float frames are asked
                for on the CPU.
        """
        check_audio_config(config.audio)
        self.device = torch.device(device)
        self._on_gpu = self.device.type == "cuda"
        if frames_dtype != torch.uint8 and not self._on_gpu:
            raise ValueError(f"frames_dtype is {frames_dtype}, expected torch.uint8 on the CPU")
        files, table = open_shard_table(config)
        outputs = ClipOutputs(
            video=config.video,
            audio=config.audio,
            pixels="yuv" if self._on_gpu else "rgb",
            sound="waveform",
        )
        super().__init__(config, rank, world_size, table, ShardClips(files, outputs, config.seed))
        self._frames_dtype = frames_dtype
        self._audio: DaliAudio | None = None
        self._uploader: Uploader | None = None
        self._stream = torch.cuda.Stream(self.device) if self._on_gpu else None

    def _finishes_ahead(self) -> bool:
        return True

    def _finish(self, filled: FilledRequest) -> ClipBatch | DeviceBatch:
        if self._stream is None:
            return self._assemble(filled, filled.memory)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            if self._uploader is None:
                self._uploader = Uploader(filled.layout.num_bytes, self.device)
            batch = self._assemble(filled, self._uploader.upload(filled.memory))
            written = torch.cuda.Event()
            written.record(self._stream)
        return DeviceBatch(batch, written)

    def _assemble(self, filled: FilledRequest, memory: Tensor) -> ClipBatch:
        arrays = []
        for index, part in enumerate(filled.parts):
            tensors = filled.layout.tensors(memory, index)
            log_mel = self._log_mel(tensors["waveform"], part)
            arrays.append((self._frames(tensors, part), log_mel))
        return assemble_batch(filled.request, filled.parts, arrays)

    def _frames(self, tensors: dict[str, Tensor], part: FilledPart) -> Tensor:
        if "frames" in tensors:
            return tensors["frames"].permute(0, 4, 1, 2, 3)  # (N, 3, T, H, W)
        video = self.config.video
        return finish_frames(
            tensors["yuv"],
            frame_parameters(part.augmentations).to(self.device, non_blocking=True),
            video.crop_size,
            mean=video.mean,
            std=video.std,
            dtype=self._frames_dtype,
        )

    def _log_mel(self, waveform: Tensor, part: FilledPart) -> Tensor:
        if self._audio is None:
            # On the CPU one thread: the worker processes need the cores.
            num_threads = self.config.dali_threads if self._on_gpu else 1
            self._audio = DaliAudio(self.config.audio, self.batch_size, self.device, num_threads)
        return self._audio(waveform, part.augmentations)

    def close(self) -> None:
        """End the worker processes, and give back DALI's memory and the page-locked memory."""
        super().close()
        self._audio, self._uploader = None, None
