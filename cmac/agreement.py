"""What the ranks of a run tell each other on the host, beside the training: nothing here waits for a device."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cmac.collectives import num_ranks

LEAST_TIMEOUT_SECONDS = 1800.0


class RankLost(RuntimeError):
    """Another rank has ended, or does not answer. Its own message tells why."""


@dataclass(frozen=True)
class Outlook:
    """What lies before the next step, of all ranks together."""

    stop: bool
    """Some rank was asked to stop."""
    failed: bool
    """Some rank has no batch, as its loader failed."""
    num_clips: int = 0
    """Clips of the ranks' batches, summed."""
    num_bad: int = 0
    """Those of them that are bad."""


class Agreement:
    """A process group of its own on the host. All ranks must make it, and call its methods, in the same order.

    Args:
        hang_seconds: after which the watchdog ends a rank; a collective waits for longer than that. 0: for ever.

    Raises:
        ValueError: the ranks' machines cannot reach each other.
    """

    def __init__(self, hang_seconds: float) -> None:
        self._group = None
        self.num_ranks = num_ranks()
        if self.num_ranks > 1:
            seconds = max(2 * hang_seconds, LEAST_TIMEOUT_SECONDS) if hang_seconds else 10 * 365 * 86400.0
            try:
                self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
            except RuntimeError as error:
                # Where the name of a machine leads to 127.0.0.1, though NCCL finds its way.
                raise ValueError(
                    f"this rank cannot reach the others over gloo ({str(error).splitlines()[0]}); unless one of them "
                    "has ended, name the machine's network interface in the variable GLOO_SOCKET_IFNAME"
                ) from error

    def outlook(self, *, stop: bool, failed: bool, num_clips: int = 0, num_bad: int = 0) -> Outlook:
        """Whether all ranks can take the next step: one small all-reduce, which waits for the slowest rank's batch.

        Args:
            stop: this rank was asked to stop.
            failed: this rank has no batch, as its loader failed.
            num_clips: clips of this rank's batch.
            num_bad: those of them that are bad.

        Raises:
            RankLost: a rank is gone.
        """
        if self._group is None:
            return Outlook(stop, failed, num_clips, num_bad)
        sums = torch.tensor([stop, failed, num_clips, num_bad], dtype=torch.int64)
        try:
            dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=self._group)
        except RuntimeError as error:
            raise _lost(error) from error
        num_stop, num_failed, num_clips, num_bad = sums.tolist()
        return Outlook(num_stop > 0, num_failed > 0, num_clips, num_bad)

    def gather(self, value: Any) -> list[Any]:
        """value of each rank, by rank.

        Raises:
            RankLost: a rank is gone.
        """
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise _lost(error) from error
        return values


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because of another rank: torch has no class for what gloo raises."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _lost(error: RuntimeError) -> RankLost:
    return RankLost(
        f"another rank has ended or does not answer ({str(error).splitlines()[0]}); the message of the rank that "
        "failed first tells why"
    )
