"""Keys come back to their clips, whichever rank computed them, and each clip travels to one rank only."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from cmac.collectives import KeyShuffle, gather_keys, num_ranks, own_rows, this_rank


def global_batch(num_clips: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(frames, log_mel, video ids, valid) whose values tell the clip."""
    clip = torch.arange(num_clips)
    frames = (
        (torch.arange(num_clips * 72) % 251)
        .to(torch.uint8)
        .view(num_clips, 2, 3, 4, 3)
        .permute(0, 4, 1, 2, 3)
    )
    log_mel = clip.float().view(-1, 1, 1, 1) + torch.zeros(1, 1, 5, 4)
    # Ids whose halves, read as floats, are NaN, infinite, denormal and negative zero.
    ids = torch.tensor([2**62 + 5, -1, 0x7FC00001, 0x7F800000, 1, 0x80000000])[clip % 6] + 0
    return frames, log_mel, ids, clip % 4 != 1


def test_one_rank_takes_all_clips_in_another_order():
    frames, log_mel, ids, valid = global_batch(7)
    shuffle = KeyShuffle.draw(7, seed=3)
    assert sorted(shuffle.order.tolist()) == list(range(7)) != shuffle.order.tolist()
    taken = shuffle.take(frames)
    assert torch.equal(taken, frames[shuffle.order])
    assert taken.is_contiguous(memory_format=torch.channels_last_3d)
    keys = shuffle.take(log_mel).flatten(1)
    gathered = gather_keys((keys, -keys), ids, valid, shuffle)
    assert torch.equal(gathered.keys[0], log_mel.flatten(1)) and torch.equal(
        gathered.keys[1], -log_mel.flatten(1)
    )
    assert torch.equal(gathered.video_ids, ids) and torch.equal(gathered.valid, valid)


def test_order_is_drawn_from_the_seed_alone():
    assert torch.equal(KeyShuffle.draw(9, 5).order, KeyShuffle.draw(9, 5).order)
    assert not torch.equal(KeyShuffle.draw(9, 5).order, KeyShuffle.draw(9, 6).order)


def test_without_keys_ids_are_gathered_still():
    _, _, ids, valid = global_batch(5)
    gathered = gather_keys((), ids, valid, None)
    assert gathered.keys == () and torch.equal(gathered.video_ids, ids)


def _exchange(rank: int, ranks: int, port: int, per_rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    assert (num_ranks(), this_rank()) == (ranks, rank)
    frames, log_mel, ids, valid = global_batch(ranks * per_rank)
    part = slice(rank * per_rank, (rank + 1) * per_rank)
    for seed in range(4):
        shuffle = KeyShuffle.draw(per_rank, seed)
        assert sum(shuffle.num_sent) == sum(shuffle.num_received) == per_rank
        # NCCL and gloo want channels-last clips as they lie in memory; others as they are.
        for clips in (frames, frames.contiguous(), log_mel):
            taken = shuffle.take(clips[part])
            assert torch.equal(taken, clips[shuffle.order[part]])
            assert taken.stride() == clips[shuffle.order[part]].contiguous().stride() or (
                taken.is_contiguous(memory_format=torch.channels_last_3d)
            )
        keys = shuffle.take(log_mel[part]).flatten(1)
        gathered = gather_keys((keys, 2 * keys), ids[part], valid[part], shuffle)
        assert torch.equal(gathered.keys[0], log_mel.flatten(1))
        assert torch.equal(gathered.keys[1], 2 * log_mel.flatten(1))
        assert torch.equal(gathered.video_ids, ids) and torch.equal(gathered.valid, valid)
        assert torch.equal(own_rows(gathered.keys[0], per_rank), log_mel[part].flatten(1))
        plain = gather_keys((log_mel[part].flatten(1),), ids[part], valid[part], None)
        assert torch.equal(plain.keys[0], log_mel.flatten(1)) and torch.equal(plain.video_ids, ids)
    dist.destroy_process_group()


@pytest.mark.parametrize(("ranks", "per_rank"), [(2, 1), (2, 5), (3, 4)])
def test_ranks_deal_clips_and_get_the_keys_of_all(free_port, ranks, per_rank):
    torch.multiprocessing.spawn(_exchange, (ranks, free_port, per_rank), nprocs=ranks)
