"""The model's training forward: what is trained, momentum copies, queues, and several ranks against one."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cmac.attention import AttentionConfig
from cmac.collectives import KeyShuffle
from cmac.config import pretrain_k400
from cmac.encoders import AudioEncoderConfig, VideoEncoderConfig
from cmac.losses import LossConfig
from cmac.model import CMAC, ModelConfig, StepOutput
from cmac.optim import build_momentum_update
from cmac.queue import EMPTY

TINY = ModelConfig(
    video=VideoEncoderConfig(widths=(4, 8), blocks=(1, 1), stem_width=4),
    audio=AudioEncoderConfig(widths=(4, 8), blocks=(1, 1)),
    filter_channels=8,
    embedding_dim=6,
    queue_length=20,
    momentum=0.9,
    batch_norm="local",
)


def clips(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (count, 3, 4, 16, 16), dtype=torch.uint8, generator=generator)
    log_mel = torch.randn(count, 1, 33, 21, generator=generator)
    return frames, log_mel, torch.arange(count) + 100 * seed, torch.ones(count, dtype=torch.bool)


def build(loss: LossConfig | None = None, **changes: object) -> CMAC:
    torch.manual_seed(0)
    return CMAC(dataclasses.replace(TINY, **changes), loss)


def forward(
    model: nn.Module, batch: tuple, seed: int, second: tuple | None = None, module: CMAC | None = None
) -> StepOutput:
    """One forward with the shuffles that the model wants."""
    count = (module or model).num_shuffles()
    shuffles = tuple(KeyShuffle.draw(len(batch[0]), seed + index) for index in range(count))
    return model(*batch, shuffles, second)


def test_full_size_model_has_the_papers_parameter_counts():
    with torch.device("meta"):
        counts = CMAC(pretrain_k400().model).parameter_counts()
    assert counts["video encoder"] == 31_300_125
    assert counts["audio encoder"] == 4_899_520
    assert counts["g_v"] == counts["g_a"] == 512 * 512 + 2 * 512
    assert counts["heads"] == 512 * 256 + 256


@pytest.mark.parametrize(
    ("head", "num_layers"), [("shared", 1), ("separate", 2), ("shared-mlp", 2), ("separate-mlp", 4)]
)
def test_heads_are_shared_or_not_as_configured(head, num_layers):
    model = build(head=head)
    assert sum(isinstance(module, nn.Linear) for module in model.heads.modules()) == num_layers
    filters = torch.randn(3, 8)
    same = torch.equal(model.project(filters, "v"), model.project(filters, "a"))
    assert same == head.startswith("shared")


def test_every_trained_parameter_gets_a_gradient_and_keys_get_none():
    for loss in (
        LossConfig(),
        LossConfig(consistency_weight=0.0),
        LossConfig(contrastive=False),
        LossConfig(within_negatives=False),
        LossConfig(negatives="batch"),
        LossConfig(positives="both"),
        LossConfig(positives="within", consistency_weight=0.0),
    ):
        model = build(loss)
        model.enqueue(forward(model, clips(4), 0, clips(4, 5)[:2]))
        output = forward(model, clips(4, 1), 1, clips(4, 6)[:2])
        output.loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, (loss, name)
            assert not (name.startswith("key_") and parameter.requires_grad)


def test_first_step_with_empty_queues_has_no_contrastive_loss_and_later_ones_do():
    model = build()
    first = forward(model, clips(4), 0)
    assert first.contrastive.item() == 0
    model.enqueue(first)
    second = forward(model, clips(4, 1), 1)
    assert second.contrastive.item() > 0
    model.enqueue(second)
    assert (model.queue_v.video_ids != EMPTY).sum() == 8
    assert torch.equal(model.queue_v.keys[4:8], second.keys_v)
    torch.testing.assert_close(second.keys_v.norm(dim=1), torch.ones(4))


def test_clips_of_the_same_video_are_no_negatives():
    model = build()
    model.enqueue(forward(model, clips(4), 0))
    again = forward(
        model, clips(4), 1
    )  # the same four videos: each query has three negatives per modality left
    frames, log_mel, ids, valid = clips(4)
    other = build()
    other.load_state_dict(model.state_dict())
    strangers = forward(other, (frames, log_mel, ids + 1000, valid), 1)
    assert strangers.contrastive > again.contrastive


def test_key_encoders_follow_the_query_encoders_by_the_momentum():
    model = build()
    with torch.no_grad():
        for parameter in model.video.parameters():
            parameter.add_(1.0)
    before = [parameter.clone() for parameter in model.key_video.parameters()]
    build_momentum_update(*model.momentum_pairs(), 0.9, "torch").step()
    pairs = zip(before, model.key_video.parameters(), model.video.parameters(), strict=True)
    for old, new, query in pairs:
        torch.testing.assert_close(new, 0.9 * old + 0.1 * query)


def test_targets_are_held_fixed_only_on_request():
    held = build(LossConfig(contrastive=False))
    assert not any(parameter.requires_grad for parameter in held.video.transform.parameters())
    free = build(LossConfig(contrastive=False), attention=AttentionConfig(detach_target=False))
    forward(free, clips(4), 0).loss.backward()
    assert all(parameter.grad is not None for parameter in free.video.transform.parameters())


def test_invalid_clips_change_neither_losses_nor_queues():
    frames, log_mel, ids, valid = clips(6)
    model = build().eval()  # batch norm by running statistics: rows do not see each other
    model.enqueue(forward(model, clips(6, 3), 0))
    whole = forward(model, (frames[:4], log_mel[:4], ids[:4], valid[:4]), 1)
    valid[4:] = False
    frames[4:], log_mel[4:] = 0, 1e6
    padded = forward(model, (frames, log_mel, ids, valid), 1)
    torch.testing.assert_close(padded.loss, whole.loss)
    torch.testing.assert_close(padded.accuracy_v2a, whole.accuracy_v2a)
    model.enqueue(padded)
    assert not set(ids[4:].tolist()) & set(model.queue_a.video_ids.tolist())


def test_shuffles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="0 shuffles were given, expected 1 for model.batch_norm 'shuffle'"):
        build(batch_norm="shuffle")(*clips(2))


def test_without_the_contrastive_loss_no_keys_are_computed():
    model = build(LossConfig(contrastive=False), batch_norm="shuffle")
    before = {name: value.clone() for name, value in model.key_video.state_dict().items()}
    output = forward(model, clips(4), 0)
    assert output.keys_v is None and output.keys_a is None and output.contrastive == 0
    model.enqueue(output)
    assert (model.queue_v.video_ids == EMPTY).all()
    for name, value in model.key_video.state_dict().items():
        assert torch.equal(value, before[name])


def test_within_positives_without_second_clips_say_what_to_set():
    with pytest.raises(ValueError, match="loader.clips_per_video to 2"):
        forward(build(LossConfig(positives="both")), clips(2), 0)


def test_encode_gives_unit_embeddings_and_maps_in_range():
    encoded = build().eval().encode(*clips(3)[:2])
    assert encoded.guided_v.shape == encoded.predicted_v.shape == (3, *encoded.feature_v.shape[2:])
    assert encoded.guided_a.shape == encoded.predicted_a.shape == (3, *encoded.feature_a.shape[2:])
    torch.testing.assert_close(encoded.embedding_v.norm(dim=1), torch.ones(3))
    for attention in (encoded.guided_v, encoded.predicted_v, encoded.guided_a, encoded.predicted_a):
        assert 0 <= attention.min() and attention.max() <= 1


def test_keys_and_losses_are_float32_under_half_precision_autocast():
    model = build()
    model.enqueue(forward(model, clips(4), 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = forward(model, clips(4, 1), 1)
        filters = model.audio(clips(4)[1])[2]
        assert model.audio.encoder(clips(4)[1]).dtype == torch.bfloat16
        assert torch.equal(model.project(filters, "a"), model.project(filters.float(), "a"))
    assert output.loss.dtype == output.keys_v.dtype == filters.dtype == torch.float32
    torch.testing.assert_close(output.keys_v.norm(dim=1), torch.ones(4), atol=1e-6, rtol=0)


def test_uint8_frames_are_normalized_by_mean_and_deviation():
    model = build()
    frames = torch.full((1, 3, 1, 1, 1), 255, dtype=torch.uint8)
    torch.testing.assert_close(
        model.normalize_frames(frames), torch.full((1, 3, 1, 1, 1), (1 - 0.45) / 0.225)
    )
    already = torch.randn(1, 3, 1, 1, 1)
    assert model.normalize_frames(already) is already


def test_shuffled_groups_on_one_process_keep_keys_in_their_rows():
    """With running statistics shuffling must not change a key, whatever the permutation."""
    shuffled, local = build(batch_norm="shuffle", batch_norm_group=2).eval(), build().eval()
    local.load_state_dict(shuffled.state_dict())
    one, two = forward(shuffled, clips(6), 11), forward(local, clips(6), 12)
    torch.testing.assert_close(one.keys_v, two.keys_v)
    torch.testing.assert_close(one.keys_a, two.keys_a)


def test_shuffled_groups_give_keys_other_batch_statistics_than_queries():
    torch.manual_seed(0)
    model = build(batch_norm="shuffle", batch_norm_group=2, momentum=1.0)
    query = model.project(model.video(model.normalize_frames(clips(6)[0]))[2], "v")
    keys = [forward(model, clips(6), seed).keys_v for seed in (0, 1)]
    assert not torch.allclose(keys[0], query) and not torch.allclose(keys[0], keys[1])


def _steps(model: nn.Module, module: CMAC, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Three steps of SGD on this rank's part of batches of eight; one clip of the second batch is bad."""
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm3d)):
            layer.eval()  # frozen statistics: what a clip gives does not depend on its batch
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)
    momentum_update = build_momentum_update(*module.momentum_pairs(), module.config.momentum, "torch")
    share = 8 // world_size
    part = slice(rank * share, (rank + 1) * share)
    for step in range(3):
        frames, log_mel, ids, valid = clips(8, step)
        valid[5] = step != 1
        batch = frames[part], log_mel[part], ids[part], valid[part]
        momentum_update.step()
        output = forward(model, batch, step, module=module)
        optimizer.zero_grad()
        output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}
        optimizer.step()
        module.enqueue(output)
    loss = output.loss.detach().clone()
    if world_size > 1:
        dist.all_reduce(loss)
        loss /= world_size
    return {
        "loss": loss,
        **gradients,
        **{f"after.{name}": value for name, value in module.state_dict().items()},
    }


def _rank(rank: int, world_size: int, port: int, batch_norm: str, negatives: str, path: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    torch.manual_seed(0)
    module = CMAC(
        dataclasses.replace(TINY, batch_norm=batch_norm),
        LossConfig(negatives=negatives),
        world_size=world_size,
    )
    ddp = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
    torch.save(_steps(ddp, module, rank, world_size), f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("batch_norm", "negatives"), [("local", "queue"), ("shuffle", "batch")])
def test_two_ranks_with_half_the_batch_equal_one_with_the_whole(tmp_path, free_port, batch_norm, negatives):
    torch.manual_seed(0)
    module = CMAC(dataclasses.replace(TINY, batch_norm=batch_norm), LossConfig(negatives=negatives))
    expected = _steps(module, module, 0, 1)
    torch.multiprocessing.spawn(_rank, (2, free_port, batch_norm, negatives, str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                got[name], value, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
            )
