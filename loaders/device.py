"""Batches on their way to a GPU: page-locked staging, a copy stream, and the hand-over to the training step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from loaders.batch import ClipBatch

NUM_STAGES = 2  # one is filled while the other is on its way


@dataclass(frozen=True)
class DeviceBatch:
    """A batch whose tensors a side stream writes."""

    batch: ClipBatch
    """Tensors on the device."""
    written: torch.cuda.Event
    """Recorded after the last of them."""

    def hand_over(self) -> ClipBatch:
        """The batch, for the stream that is current: that waits for it, the host does not."""
        stream = torch.cuda.current_stream(self.batch.frames.device)
        stream.wait_event(self.written)
        for part in (self.batch, self.batch.second):
            if part is not None:
                for tensor in (part.frames, part.log_mel, part.video_ids, part.valid):
                    tensor.record_stream(stream)  # memory of the side stream, used on another one
        return self.batch


class Uploader:
    """Copies pieces of memory of one size to a GPU, through page-locked memory of its own."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """num_bytes: size of every piece."""
        self._device = device
        self._stages = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(NUM_STAGES)]
        self._copied = [torch.cuda.Event() for _ in range(NUM_STAGES)]
        self._next = 0

    def upload(self, memory: Tensor) -> Tensor:
        """uint8 (num_bytes,) on the device, written by the current stream; memory is free when this returns."""
        stage, copied = self._stages[self._next], self._copied[self._next]
        self._next = (self._next + 1) % NUM_STAGES
        copied.synchronize()  # of the copy before last; at once if there was none
        stage.copy_(memory)
        on_device = torch.empty(len(stage), dtype=torch.uint8, device=self._device)
        on_device.copy_(stage, non_blocking=True)
        copied.record()
        return on_device
