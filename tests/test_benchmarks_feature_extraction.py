"""The benchmark of feature extraction: a small run gives a row, and lost clips are no result."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import feature_extraction
from benchmarks.timing import WrongResult
from tools.make_synthetic_videos import make_flash_beep_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(2):
        make_flash_beep_video(folder / f"{number}.mp4", seconds=2.5, size=(96, 72))
    return folder


@pytest.mark.parametrize(("sampling", "workers"), [("video 3 crops", 1), ("both", 0), ("audio", 0)])
def test_extraction_is_timed_beside_the_loader_and_the_encoder(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sampling: str, workers: int
) -> None:
    options = ["--tiny", "--device", "cpu", "--clips", "2", "--rounds", "2", "--batch-size", "3"]
    options += ["--workers", str(workers), "--sampling", sampling, "--note", "a test"]
    assert feature_extraction.main([*options, "--videos", str(videos), "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("ceiling: ")
    (line,) = (tmp_path / "feature_extraction.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row == json.loads(printed.splitlines()[-1])
    num_clips = 2 * 2 * (3 if sampling == "video 3 crops" else 1)
    assert row["contenders"].keys() == {"loader", "encoder", "extraction"}
    for name, result in row["contenders"].items():
        assert (result["num_clips"], result["num_bad"], result["repeats"]) == (num_clips, 0, 2)
        assert result["clips_per_second"]["median"] > 0 and result["cpu_seconds_per_clip"] >= 0
        assert (result["first_batch_seconds"] is None) == (name == "encoder")
    assert (
        row["contenders"]["loader"]["encode_share"] == 0 < row["contenders"]["extraction"]["encode_share"] < 1
    )
    assert row["ceiling"]["by"] in ("loader", "encoder", "cores")
    assert row["ratio_to_loader"]["median"] > 0 and row["note"] == "a test" and row["commit"]


def test_lost_clips_are_no_result(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract = feature_extraction.extract_features

    def lose(*arguments: object) -> object:
        features = extract(*arguments)
        return dataclasses.replace(features, video_ids=features.video_ids[1:])

    monkeypatch.setattr(feature_extraction, "extract_features", lose)
    options = ["--tiny", "--device", "cpu", "--clips", "1", "--rounds", "1", "--workers", "0"]
    with pytest.raises(WrongResult, match="1 rows of features of 2 clips"):
        feature_extraction.main([*options, "--videos", str(videos), "--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())
