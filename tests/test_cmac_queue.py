"""The key queue keeps the newest keys, wraps around, and hides what must not be a negative."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmac.queue import EMPTY, KeyQueue


def batch(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(first, first + count)
    return ids[:, None].float().expand(count, 3).clone(), ids


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 23), sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_queue_holds_the_newest_keys_whatever_the_batch_sizes(length, sizes):
    queue, total = KeyQueue(length, 3), 0
    for size in sizes:
        queue.enqueue(*batch(total, size))
        total += size
    held = sorted(id for id in queue.video_ids.tolist() if id != EMPTY)
    assert held == list(range(max(0, total - length), total))
    filled = queue.video_ids != EMPTY
    assert torch.equal(queue.keys[filled][:, 0].long(), queue.video_ids[filled])


def test_queue_of_15000_takes_batches_of_128_that_do_not_divide_it():
    queue = KeyQueue(15_000, 2)
    for start in range(0, 128 * 130, 128):
        queue.enqueue(torch.ones(128, 2), torch.arange(start, start + 128))
    assert sorted(queue.video_ids.tolist()) == list(range(128 * 130 - 15_000, 128 * 130))


def test_empty_slots_own_videos_and_invalid_clips_are_excluded():
    queue = KeyQueue(5, 3)
    queue.enqueue(torch.ones(3, 3), torch.tensor([7, 8, 9]), torch.tensor([True, False, True]))
    excluded = queue.excluded(torch.tensor([7, 1]))
    assert excluded.tolist() == [[True, True, False, True, True], [False, True, False, True, True]]


def test_keys_that_are_not_finite_stay_out_of_loss_and_gradient():
    queue = KeyQueue(3, 2)
    queue.enqueue(
        torch.tensor([[1.0, 0.0], [float("nan"), 0.0], [float("inf"), 0.0]]), torch.tensor([1, 2, 3])
    )
    assert queue.video_ids.tolist() == [1, EMPTY, EMPTY] and torch.isfinite(queue.keys).all()


def test_queue_is_in_the_state_dict():
    queue, other = KeyQueue(4, 3), KeyQueue(4, 3)
    queue.enqueue(*batch(10, 3))
    other.load_state_dict(queue.state_dict())
    for one in (queue, other):
        one.enqueue(*batch(20, 2))
    assert torch.equal(queue.keys, other.keys) and torch.equal(queue.video_ids, other.video_ids)


def test_queue_without_slots_is_refused():
    with pytest.raises(ValueError, match="queue_length is 0"):
        KeyQueue(0, 3)
