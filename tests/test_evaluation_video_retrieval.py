"""Retrieval of a class and across modalities: recall, chance and intervals against hand and independent computations,
features and embeddings against the networks themselves."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cmac
from cmac.checkpoint import build_model, save_checkpoint
from cmac.config import demo
from cmac.evaluation import retrieval
from cmac.evaluation.retrieval import (
    class_ranks,
    class_recall,
    class_recall_chance,
    class_recall_metrics,
    cross_modal_embeddings,
    cross_modal_metrics,
    pooled_video_features,
    retrieval_ranks,
    unit_rows,
)
from loaders.video_ops import normalize_frames


def generated(num_query: int, num_gallery: int, num_classes: int, seed: int = 0):
    """Features around their class's center, with labels; some classes are rarer than others."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, num_classes + 1) / np.arange(1, num_classes + 1).sum()
    centers = rng.normal(size=(num_classes, 8))
    labels = [rng.choice(num_classes, size, p=weights) for size in (num_query, num_gallery)]
    rows = [torch.from_numpy(centers[part] + 1.2 * rng.normal(size=(len(part), 8))) for part in labels]
    return rows[0], labels[0].tolist(), rows[1], labels[1].tolist()


def test_class_recall_of_a_case_worked_by_hand() -> None:
    # Directions by angle in degrees; gallery: a at 0, b at 20, b at 40, a at 90, c at 180 (and three times as long).
    def at(*angles: float) -> torch.Tensor:
        angles = torch.tensor(angles, dtype=torch.float64) * torch.pi / 180
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    gallery, labels = at(0, 20, 40, 90, 180), ["a", "b", "b", "a", "c"]
    gallery[4] *= 3
    query = at(25, 60, 15, 100)
    # 25: b (5 away), b (15), a (25): the first b is nearest, the first a third. 60: b (20), a (30), b (40).
    # 15: b (5), a (15), b (25). 100: a (10), b (60), b (80), c (80).
    assert class_ranks(query, ["b", "a", "a", "c"], gallery, labels).tolist() == [1, 2, 2, 4]
    metrics = class_recall_metrics(query, [0, 1, 2, 3], ["b", "a", "a", "c"], gallery, labels, (1, 2, 4))
    assert [metrics[f"R@{k}"].value for k in (1, 2, 4)] == [0.25, 0.75, 1.0]
    # Chance at 2 of 5: a and b have 2 entries: 1 - C(3, 2) / C(5, 2) = 0.7; c has 1: 1 - C(4, 2) / C(5, 2) = 0.4.
    assert metrics["R@2"].chance == pytest.approx((3 * 0.7 + 0.4) / 4)


def test_class_recall_equals_scikit_learns_nearest_neighbors() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    query, query_labels, gallery, gallery_labels = generated(60, 150, 9)
    index = neighbors.NearestNeighbors(metric="cosine", algorithm="brute").fit(gallery.numpy())
    near = index.kneighbors(query.numpy(), 50, return_distance=False)
    found = np.array(gallery_labels)[near] == np.array(query_labels)[:, None]  # (60, 50)
    metrics = class_recall_metrics(query, range(60), query_labels, gallery, gallery_labels)
    plain = class_recall(query, query_labels, gallery, gallery_labels, (1, 5, 10, 20, 50))
    for k in (1, 5, 10, 20, 50):
        assert metrics[f"R@{k}"].value == pytest.approx(found[:, :k].any(axis=1).mean()) == plain[k]
    assert metrics["R@1"].chance + 0.1 < metrics["R@1"].value < 0.9, "the case tells ranks apart"


def test_chance_is_what_a_shuffled_gallery_gives() -> None:
    rng = np.random.default_rng(1)
    gallery_labels = [0] * 2 + [1] * 5 + [2] * 13
    query_labels = [0, 0, 1, 2, 3]  # class 3 has no gallery entry
    shuffled = np.array([rng.permutation(gallery_labels) for _ in range(20_000)])
    for k, chance in class_recall_chance(query_labels, gallery_labels, (1, 5, 10)).items():
        hits = [(shuffled[:, :k] == label).any(axis=1).mean() for label in query_labels]
        assert chance == pytest.approx(np.mean(hits), abs=0.01)


def test_query_without_a_gallery_video_of_its_class_is_found_at_no_k() -> None:
    gallery = torch.eye(3)
    assert class_ranks(gallery[:1], ["z"], gallery, ["a", "b", "c"]).tolist() == [4]
    metrics = class_recall_metrics(gallery[:1], [0], ["z"], gallery, ["a", "b", "c"], (1, 50))
    assert [(metric.value, metric.chance) for metric in metrics.values()] == [(0, 0), (0, 0)]
    assert class_recall(gallery[:1], ["z"], gallery, ["a", "b", "c"], (1, 4, 50)) == {1: 0, 4: 0, 50: 0}


def test_k_above_the_gallery_finds_all_there_is_and_so_does_chance() -> None:
    query, query_labels, gallery, gallery_labels = generated(20, 12, 3)
    metric = class_recall_metrics(query, range(20), query_labels, gallery, gallery_labels, (50,))["R@50"]
    present = np.mean([label in gallery_labels for label in query_labels])
    assert metric.value == metric.chance == present == 1
    assert cross_modal_metrics(gallery, gallery, range(12), (50,))["R@50 v2a"].chance == 1


def test_one_feature_for_all_videos_retrieves_nothing() -> None:
    query, query_labels, gallery, gallery_labels = generated(20, 30, 5)
    same = torch.ones(50, 8)
    ranks = class_ranks(same[:20], query_labels, same[:30], gallery_labels)
    others = [sum(other != label for other in gallery_labels) for label in query_labels]
    assert ranks.tolist() == [count + 1 for count in others]


def test_many_queries_are_ranked_as_single_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    query, query_labels, gallery, gallery_labels = generated(25, 25, 5)
    whole = class_ranks(query, query_labels, gallery, gallery_labels), retrieval_ranks(query, gallery)
    monkeypatch.setattr(retrieval, "QUERIES_AT_ONCE", 7)
    parts = class_ranks(query, query_labels, gallery, gallery_labels), retrieval_ranks(query, gallery)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
    assert len(whole[1].unique()) > 5


def test_interval_resamples_query_videos() -> None:
    gallery = torch.eye(2)
    query = gallery[[0] * 6 + [1] * 4]
    metric = class_recall_metrics(query, range(10), ["a"] * 10, gallery, ["a", "b"], (1,))["R@1"]
    assert metric.value == 0.6
    # Normal approximation: 0.6 +- 1.96 * sqrt(0.6 * 0.4 / 10) = 0.30 .. 0.90
    assert metric.interval == pytest.approx((0.30, 0.90), abs=0.06)
    # Two clips of each of 10 videos in cross-modal retrieval are 10 observations, not 20.
    sounds = torch.eye(20)
    sounds[::4] = sounds[1::4]
    by_video = cross_modal_metrics(torch.eye(20), sounds, [n // 2 for n in range(20)], (1,))["R@1 v2a"]
    by_clip = cross_modal_metrics(torch.eye(20), sounds, range(20), (1,))["R@1 v2a"]
    assert by_video.value == by_clip.value and by_video.interval != by_clip.interval


def test_cross_modal_recall_goes_both_ways() -> None:
    pictures = torch.eye(3)
    sounds = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.8, 0.0, 0.2]])
    # Sounds of picture 0: products 1, .9, .8: first. Picture 1: 0, .1, 0: first. Picture 2: 0, 0, .2: first.
    # Pictures of sound 0: first. Of sounds 1 and 2: picture 0 is nearer, and the third one ties with nothing.
    metrics = cross_modal_metrics(pictures, sounds, range(3), (1, 2))
    assert metrics["R@1 v2a"].value == 1 and metrics["R@1 a2v"].value == pytest.approx(1 / 3)
    assert metrics["R@2 a2v"].value == 1
    assert metrics["R@1 v2a"].chance == pytest.approx(1 / 3)


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match="k is 0"):
        class_recall_metrics(torch.eye(2), range(2), [0, 1], torch.eye(2), [0, 1], (0,))
    with pytest.raises(ValueError, match="k is 0"):
        cross_modal_metrics(torch.eye(2), torch.eye(2), range(2), (0,))
    with pytest.raises(ValueError, match="no clips"):
        cross_modal_metrics(torch.zeros(0, 2), torch.zeros(0, 2), [])
    with pytest.raises(ValueError, match="row 1 of embedding is all zeros"):
        unit_rows(torch.tensor([[1.0, 0], [0, 0]]), "embedding")
    with pytest.raises(ValueError, match="gallery is empty"):
        class_recall_metrics(torch.eye(2), range(2), [0, 1], torch.zeros(0, 2), [], (1,))


# --- features ---


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = demo()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, queue_length=8))
    torch.manual_seed(0)
    state = {"model": build_model(config).state_dict(), "commit": "abc1234567"}
    save_checkpoint(folder / "checkpoints", 1, config, state, keep=1)
    return folder


@pytest.fixture
def batch() -> SimpleNamespace:
    """What the encoders take of a batch."""
    generator = torch.Generator().manual_seed(2)
    frames = torch.randint(0, 256, (3, 3, 8, 48, 48), dtype=torch.uint8, generator=generator)
    return SimpleNamespace(frames=frames, log_mel=torch.randn(3, 1, 40, 101, generator=generator))


def test_features_are_the_last_blocks_mean_for_each_network(run_folder: Path, batch: SimpleNamespace) -> None:
    networks = {"trained": cmac.load(run_folder), "random": cmac.load(run_folder, random_seed=1)}
    features = pooled_video_features(networks, "cpu")(batch)
    assert features.keys() == networks.keys()
    for name, encoders in networks.items():
        config = encoders.video_config
        with torch.no_grad():
            maps = encoders.video(normalize_frames(batch.frames, config.mean, config.std))  # (3, C, T, H, W)
        expected = maps.flatten(2).mean(dim=2)
        torch.testing.assert_close(features[name], expected)
        assert not features[name].requires_grad
    assert not torch.allclose(features["trained"], features["random"])


def test_embeddings_are_those_of_the_models_heads(run_folder: Path, batch: SimpleNamespace) -> None:
    encoders = cmac.load(run_folder)
    found = cross_modal_embeddings({"trained": encoders}, "cpu")(batch)
    model, _ = cmac.load_checkpoint(run_folder)
    expected = model.encode(batch.frames, batch.log_mel)
    torch.testing.assert_close(found["trained_v"], expected.embedding_v)
    torch.testing.assert_close(found["trained_a"], expected.embedding_a)


def test_encoders_alone_have_no_embeddings_and_sound_alone_no_picture(run_folder: Path) -> None:
    encoders = cmac.load(run_folder)
    with pytest.raises(ValueError, match="no whole CMAC model"):
        cross_modal_embeddings({"trained": dataclasses.replace(encoders, model=None)}, "cpu")
    with pytest.raises(ValueError, match="no video encoder"):
        pooled_video_features({"trained": dataclasses.replace(encoders, video=None)}, "cpu")
