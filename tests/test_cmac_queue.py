"""The key queue keeps the newest keys, wraps around, and hides what must not be a negative."""

import math
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cmac.queue import EMPTY, UNKNOWN, KeyQueue


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


def test_slots_of_invalid_clips_are_marked_empty():
    queue = KeyQueue(5, 3)
    queue.enqueue(torch.ones(3, 3), torch.tensor([7, 8, 9]), torch.tensor([True, False, True]))
    assert queue.video_ids.tolist() == [7, EMPTY, 9, EMPTY, EMPTY]


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
    for name, value in queue.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert queue.staleness() == other.staleness() == (2.0, 1.5, 1.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.bfloat16, 2**-8)])
def test_keys_are_stored_in_the_dtype_asked_for(dtype, tolerance):
    queue = KeyQueue(7, 16, dtype)
    keys = F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    queue.enqueue(keys, torch.arange(5))
    assert queue.keys.dtype == dtype
    torch.testing.assert_close(queue.keys[:5].float(), keys, rtol=tolerance, atol=0)


def test_a_queue_takes_the_keys_of_a_checkpoint_of_another_dtype():
    full, half = KeyQueue(4, 3), KeyQueue(4, 3, torch.bfloat16)
    full.enqueue(*batch(10, 3))
    half.load_state_dict(full.state_dict())
    assert half.keys.dtype == torch.bfloat16 and torch.equal(half.keys.float(), full.keys)
    assert torch.equal(half.video_ids, full.video_ids)


def test_queue_without_slots_or_of_another_dtype_is_refused():
    with pytest.raises(ValueError, match="queue_length is 0"):
        KeyQueue(0, 3)
    with pytest.raises(ValueError, match="queue_dtype is torch.float16, expected float32 or bfloat16"):
        KeyQueue(4, 3, torch.float16)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 23),
    steps=st.lists(st.lists(st.booleans(), min_size=1, max_size=30), min_size=1, max_size=12),
)
def test_ages_are_those_of_a_list_of_the_steps_that_keys_are_of(length, steps):
    queue, expected = KeyQueue(length, 3), deque(maxlen=length)
    for number, valid in enumerate(steps):
        queue.enqueue(*batch(100 * number, len(valid)), torch.tensor(valid))
        expected += [number if usable else None for usable in valid]
    ages = [len(steps) - number for number in expected if number is not None]
    oldest, mean, filled = (figure.item() for figure in queue.staleness())
    assert filled == pytest.approx(len(ages) / length)
    if ages:
        assert (oldest, mean) == (max(ages), pytest.approx(sum(ages) / len(ages)))
    else:
        assert math.isnan(oldest) and math.isnan(mean)


def test_keys_of_a_checkpoint_without_stamps_are_of_unknown_age_until_the_queue_has_turned_over():
    old, queue = KeyQueue(4, 3), KeyQueue(4, 3)
    old.enqueue(*batch(10, 3))
    saved = {name: value for name, value in old.state_dict().items() if name not in ("enqueued_at", "clock")}
    queue.enqueue(*batch(50, 4))
    queue.load_state_dict(saved)
    assert torch.equal(queue.video_ids, old.video_ids) and set(queue.enqueued_at.tolist()) == {UNKNOWN}
    for first in (20, 30):
        oldest, mean, _ = queue.staleness()
        assert oldest.isnan() and mean.isnan()
        queue.enqueue(*batch(first, 2))
    assert queue.staleness() == (2.0, 1.5, 1.0)


@pytest.mark.parametrize("missing", ["keys", "video_ids", "position", "enqueued_at", "clock"])
def test_a_queue_of_which_a_part_is_missing_is_refused(missing):
    saved = KeyQueue(4, 3).state_dict()
    del saved[missing]
    with pytest.raises(RuntimeError, match=missing):
        KeyQueue(4, 3).load_state_dict(saved)
