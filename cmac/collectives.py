"""What ranks tell each other in a step: clips to compute keys of, and the keys."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    """Ranks of this run; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def this_rank() -> int:
    """Number of this rank."""
    return dist.get_rank() if num_ranks() > 1 else 0


@dataclass(frozen=True)
class KeyShuffle:
    """Which rank computes which clip's key (shuffle-BN of MoCo, section 3.3), drawn on the host: nothing waits for a
    device.

    The global batch is put into a random order, of which each rank computes its part.
    """

    order: Tensor
    """(global N,) int64 on the device: clip at each place of the order."""
    inverse: Tensor
    """(global N,) int64 on the device: place of each clip in the order."""
    send: Tensor
    """(N,) int64 on the device: rows of this rank, by the rank they go to."""
    receive: Tensor
    """(N,) int64 on the device: where in what comes, rank by rank, each of this rank's places is."""
    num_sent: tuple[int, ...]
    """Rows that go to each rank."""
    num_received: tuple[int, ...]
    """Rows that come from each rank."""

    @staticmethod
    def draw(num_clips: int, seed: int, device: torch.device | str = "cpu") -> "KeyShuffle":
        """The shuffle of a step. num_clips: of each rank; seed: the same on all ranks, another in each step."""
        ranks, rank = num_ranks(), this_rank()
        order = torch.randperm(num_clips * ranks, generator=torch.Generator().manual_seed(seed))
        owner = order // num_clips  # (global N,) rank that holds the clip
        places = torch.arange(len(order)) // num_clips  # (global N,) rank that computes the place
        mine = owner == rank
        coming = owner[places == rank]  # (N,)
        index = torch.stack([order, order.argsort()])
        rows = torch.stack([order[mine] % num_clips, coming.argsort(stable=True).argsort()])
        if torch.device(device).type == "cuda":
            index, rows = index.pin_memory(), rows.pin_memory()  # copied without waiting
        index, rows = index.to(device, non_blocking=True), rows.to(device, non_blocking=True)
        return KeyShuffle(
            order=index[0],
            inverse=index[1],
            send=rows[0],
            receive=rows[1],
            num_sent=tuple(torch.bincount(places[mine], minlength=ranks).tolist()),
            num_received=tuple(torch.bincount(coming, minlength=ranks).tolist()),
        )

    def take(self, rows: Tensor) -> Tensor:
        """This rank's part of the shuffled global batch, of tensors whose rows are this rank's clips. One all-to-all:
        a rank sends each clip to one other, where gathering would send it to all."""
        if num_ranks() == 1:
            return _select(rows, self.order)
        sent = _select(rows, self.send)
        dense = _memory_order(sent)
        received = torch.empty_like(dense)
        dist.all_to_all_single(received, dense, list(self.num_received), list(self.num_sent))
        return _select(_logical_order(received, sent), self.receive)


def _memory_order(tensor: Tensor) -> Tensor:
    """Clips as they lie in memory: (N, T, H, W, C) for channels-last clips (N, C, T, H, W)."""
    if tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return tensor.permute(0, 2, 3, 4, 1)
    return tensor.contiguous()


def _logical_order(dense: Tensor, like: Tensor) -> Tensor:
    """Undo `_memory_order` of a tensor like that."""
    return dense if dense.shape == like.shape else dense.permute(0, 4, 1, 2, 3)


def _select(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], in the memory order of rows."""
    dense = _memory_order(rows)
    return _logical_order(dense.index_select(0, index), rows)


class Gathered(NamedTuple):
    """The global batch's keys, in the order of its clips."""

    keys: tuple[Tensor, ...]
    """(global N, D) float32 each."""
    video_ids: Tensor
    """(global N,) int64."""
    valid: Tensor
    """(global N,) bool."""


def gather_keys(
    keys: tuple[Tensor, ...], video_ids: Tensor, valid: Tensor, shuffle: KeyShuffle | None
) -> Gathered:
    """All ranks' keys with their clips' ids, by one collective.

    Args:
        keys: (N, D) float32 each; with `shuffle`, of the clips that `shuffle.take` gave.
        video_ids: (N,) int64 of this rank's own clips.
        valid: (N,) bool likewise.
        shuffle: how keys were dealt out; None if each rank computed its own clips'.
    """
    if num_ranks() > 1:
        ids = video_ids.contiguous().view(torch.float32).view(-1, 2)  # the same bits
        packed = torch.cat([*keys, ids, valid.float()[:, None]], dim=1)  # (N, sum of D + 3)
        gathered = packed.new_empty(num_ranks() * len(packed), packed.shape[1])
        dist.all_gather_into_tensor(gathered, packed)
        *parts, ids, flags = gathered.split([*(key.shape[1] for key in keys), 2, 1], dim=1)
        keys, valid = tuple(parts), flags[:, 0] > 0
        video_ids = ids.contiguous().view(torch.int64).view(-1)
    if shuffle is not None:
        keys = tuple(part.index_select(0, shuffle.inverse) for part in keys)
    return Gathered(keys, video_ids, valid)


def own_rows(gathered: Tensor, num_clips: int) -> Tensor:
    """This rank's rows of a gathered tensor: (global N, ...) -> (N, ...)."""
    return gathered[this_rank() * num_clips : (this_rank() + 1) * num_clips]
