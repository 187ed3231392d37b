"""The order of an epoch: each clip once, the same batches for any number of ranks."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.base import ClipTable, PositionedLoader
from loaders.config import LoaderConfig
from loaders.plan import PADDING, EpochPlan, slots_of_epoch

sizes = st.fixed_dictionaries(
    {
        "clips_per_shard": st.lists(st.integers(1, 40), min_size=1, max_size=12),
        "seed": st.integers(0, 5),
        "epoch": st.integers(0, 50),
        "shuffle": st.booleans(),
        "shuffle_window": st.sampled_from([0, 1, 7, 64, 4096]),
        "drop_last": st.booleans(),
    }
)


@settings(max_examples=300, deadline=None)
@given(fields=sizes, world_size=st.integers(1, 9), per_rank=st.integers(1, 9))
def test_each_clip_once_over_ranks_in_equal_batches(fields, world_size, per_rank):
    size = world_size * per_rank
    plan = EpochPlan(**fields, global_batch_size=size)
    every_clip = {(s, p) for s, count in enumerate(fields["clips_per_shard"]) for p in range(count)}
    # Each rank builds its own plan, as in a run.
    ranks = [EpochPlan(**fields, global_batch_size=size) for _ in range(world_size)]
    assert len({rank.num_batches for rank in ranks}) == 1
    seen, padding = [], 0
    for index in range(plan.num_batches):
        parts = [ranks[rank].batch(index, rank, world_size) for rank in range(world_size)]
        assert all(part.shape == (per_rank, 2) for part in parts)
        joined = np.concatenate(parts)
        assert np.array_equal(joined, plan.batch(index))  # the global batch does not depend on the ranks
        seen += [tuple(row) for row in joined.tolist() if row[0] != PADDING]
        padding += int((joined[:, 0] == PADDING).sum())
    assert len(seen) == len(set(seen)) and set(seen) <= every_clip
    missed = len(every_clip) - len(seen)
    if fields["drop_last"]:
        assert padding == 0 and missed < size
    else:
        assert missed == 0 and padding < size


@settings(max_examples=100, deadline=None)
@given(fields=sizes, world_sizes=st.permutations([1, 2, 3, 4, 6, 12]), stop=st.integers(0, 20))
def test_another_number_of_ranks_may_go_on_at_any_batch(fields, world_sizes, stop):
    plan = EpochPlan(**fields, global_batch_size=12)
    before, after = world_sizes[:2]
    batches = [
        np.concatenate([plan.batch(k, r, world) for r in range(world)])
        for k in range(plan.num_batches)
        for world in [before if k < stop else after]
    ]
    assert all(np.array_equal(batch, plan.batch(k)) for k, batch in enumerate(batches))


class Positions(PositionedLoader):
    """A loader of nothing but names: (shard, position) and slot."""

    def _take(self) -> SimpleNamespace:
        if self._requests is None:
            self._requests = self.requests()
        request = next(self._requests)
        parts = [
            SimpleNamespace(
                keys=["" if row[0] == PADDING else (*row, slot) for row in request.rows.tolist()], bad=()
            )
            for slot in request.slots
        ]
        second = parts[1] if len(parts) > 1 else None
        return SimpleNamespace(epoch=request.epoch, step=request.step, second=second, **vars(parts[0]))

    _requests = None

    def close(self) -> None:
        self._requests = None


def positions(config: LoaderConfig, clips_per_shard: list[int], rank: int, world_size: int) -> Positions:
    table = ClipTable(folder="none", num_slots=3, clips_per_shard=clips_per_shard, identity={"manifest": "x"})
    return Positions(config, rank, world_size, table)


def run(loaders: list[Positions], num_batches: int) -> list[tuple]:
    """(epoch, step, clips, second clips) of so many global batches, which all ranks take together."""
    endless = [itertools.chain.from_iterable(itertools.repeat(loader)) for loader in loaders]
    found = []
    for _ in range(num_batches):
        parts = [next(batches) for batches in endless]
        assert len({(part.epoch, part.step) for part in parts}) == 1
        second = [key for part in parts if part.second for key in part.second.keys]
        found.append((parts[0].epoch, parts[0].step, [key for part in parts for key in part.keys], second))
    return found


@settings(max_examples=150, deadline=None)
@given(
    clips_per_shard=st.lists(st.integers(1, 15), min_size=1, max_size=5).filter(
        lambda counts: sum(counts) >= 12
    ),
    lives=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 9), st.integers(0, 3)),
        min_size=1,
        max_size=6,
    ),
    drop_last=st.booleans(),
    clips_per_video=st.sampled_from([1, 2]),
    window=st.sampled_from([0, 5, 4096]),
    seed=st.integers(0, 3),
)
def test_a_run_that_is_stopped_and_goes_on_with_other_ranks_sees_what_one_that_never_stops_sees(
    clips_per_shard, lives, drop_last, clips_per_video, window, seed
):
    """lives: (ranks, batches taken after the last checkpoint or the start that are kept, batches taken after that and
    lost with the process). Over epochs, states going through JSON as in a checkpoint."""
    config = LoaderConfig(
        shards="none", global_batch_size=12, shuffle_window=window, seed=seed, drop_last=drop_last,
        clips_per_video=clips_per_video,
    )  # fmt: skip
    state, found = None, []
    for world_size, num_kept, num_lost in lives:
        loaders = [positions(config, clips_per_shard, rank, world_size) for rank in range(world_size)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(state))
        found += run(loaders, num_kept)
        (state,) = {
            json.dumps(loader.state_dict(), sort_keys=True) for loader in loaders
        }  # alike on all ranks
        run(loaders, num_lost)
    one = positions(config, clips_per_shard, 0, 1)
    assert found == run([one], len(found))
    per_epoch = len(one)
    for start in range(0, len(found) - per_epoch + 1, per_epoch):  # whole epochs: none repeated, none lost
        for part in (2, 3)[:clips_per_video]:
            keys = [key for batch in found[start : start + per_epoch] for key in batch[part] if key]
            assert len(set(keys)) == len(keys)
            left_out = sum(clips_per_shard) - len(keys)
            assert 0 <= left_out < 12 if drop_last else left_out == 0


def test_order_is_new_each_epoch_and_each_seed():
    def order(**changes):
        fields = {"clips_per_shard": [30, 30], "seed": 0, "epoch": 0, "global_batch_size": 4, **changes}
        return EpochPlan(**fields).order.tolist()

    assert order() == order()
    assert order() != order(epoch=1) and order() != order(seed=1)
    assert sorted(order()) == sorted(order(epoch=1))


def test_without_shuffling_clips_come_in_sequence():
    plan = EpochPlan(clips_per_shard=[2, 3], seed=0, epoch=4, global_batch_size=5, shuffle=False)
    assert plan.order.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]]


def test_window_0_reads_shards_in_sequence_in_a_random_order():
    plan = EpochPlan(clips_per_shard=[5] * 20, seed=0, epoch=0, global_batch_size=5, shuffle_window=0)
    shards = plan.order[::5, 0].tolist()
    assert sorted(shards) == list(range(20)) and shards != list(range(20))
    assert plan.order.tolist() == [[shard, position] for shard in shards for position in range(5)]


def test_clips_stay_within_their_window():
    fields = {"clips_per_shard": [10] * 10, "seed": 3, "epoch": 0, "global_batch_size": 10}
    sequence = EpochPlan(**fields, shuffle_window=0).order.tolist()
    shuffled = EpochPlan(**fields, shuffle_window=25).order.tolist()
    for start in range(0, 100, 25):
        window, before = shuffled[start : start + 25], sequence[start : start + 25]
        assert sorted(window) == sorted(before) and window != before


def test_padding_fills_the_last_batch():
    plan = EpochPlan(clips_per_shard=[5], seed=0, epoch=0, global_batch_size=4, drop_last=False)
    assert plan.num_batches == 2
    assert plan.batch(1, 0, 2)[:, 0].tolist() == [0, PADDING]
    assert plan.batch(1, 1, 2)[:, 0].tolist() == [PADDING] * 2


def test_epoch_reads_slot_epoch_mod_slots():
    assert [slots_of_epoch(epoch, 3) for epoch in range(5)] == [(0,), (1,), (2,), (0,), (1,)]


def test_second_clips_come_from_every_other_slot_in_turn():
    pairs = [slots_of_epoch(epoch, 4, 2) for epoch in range(12)]
    assert len(set(pairs)) == 12
    assert all(first == epoch % 4 != second for epoch, (first, second) in enumerate(pairs))
    with pytest.raises(ValueError, match="loader.clips_per_video is 2, but the shards have 1 slot"):
        slots_of_epoch(0, 1, 2)


def test_uneven_ranks_are_refused():
    plan = EpochPlan(clips_per_shard=[50], seed=0, epoch=0, global_batch_size=10)
    with pytest.raises(ValueError, match=r"global_batch_size is 10, expected a multiple of .* ranks \(4\)"):
        plan.batch(0, 0, 4)
    with pytest.raises(ValueError, match="rank 2 of world_size 2"):
        plan.batch(0, 2, 2)
    with pytest.raises(IndexError):
        plan.batch(5)
