"""Datasets in their official layout: the splits are those of the lists, and what is wrong or missing is said."""

from collections import Counter
from pathlib import Path

import pytest

import shards.sources
from loaders.datasets import (
    DATASETS,
    ClassificationSplit,
    dcase,
    detect_datasets,
    esc50,
    hmdb51,
    read_split,
    ucf101,
)
from shards.schema import video_hash

ESC_HEADER = "filename,fold,target,category,esc10,src_file,take\n"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))


def ids(videos: tuple[shards.sources.SourceVideo, ...]) -> list[str]:
    return [video.video_id for video in videos]


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    """Two classes with a file for training and one for test, a third class without files; CRLF as in the original."""
    lists = tmp_path / "ucfTrainTestlist"
    write(lists / "classInd.txt", "1 Archery\r\n2 Punch\r\n10 YoYo\r\n")
    write(lists / "trainlist01.txt", "Punch/v_Punch_g08_c01.avi 2\r\nArchery/v_Archery_g08_c01.avi 1\r\n\r\n")
    write(lists / "testlist01.txt", "Archery/v_Archery_g01_c01.avi\r\nPunch/v_Punch_g01_c01.avi\r\n")
    touch(
        tmp_path / "UCF-101",
        "Archery/v_Archery_g01_c01.avi",
        "Archery/v_Archery_g08_c01.avi",
        "Punch/v_Punch_g01_c01.avi",
        "Punch/v_Punch_g08_c01.avi",
        "Punch/v_Punch_g25_c01.avi",
    )
    return tmp_path


@pytest.fixture
def hmdb(tmp_path: Path) -> Path:
    """Two classes, one for training alone; names as only HMDB51 has them."""
    lists = tmp_path / "testTrainMulti_7030_splits"
    names = ["#1_(a)_[b]*_wave_f_0.avi", "with space !!_wave_1.avi", "c_wave_2.avi"]
    write(lists / "wave_test_split1.txt", f"{names[0]} 1 \n{names[1]} 2 \n{names[2]} 0 \n")
    write(lists / "golf_test_split1.txt", "x_golf.avi 1 \n")
    touch(tmp_path / "hmdb51_org", *(f"wave/{name}" for name in names), "golf/x_golf.avi")
    return tmp_path


@pytest.fixture
def esc(tmp_path: Path) -> Path:
    """One clip per class and fold: a dog of ESC-10 and a cat that is not; numbers against the alphabet."""
    rows = []
    for fold in range(1, 6):
        for target, label, esc10 in ((7, "cat", "False"), (3, "dog", "True")):
            rows.append(f"{fold}-{target}.wav,{fold},{target},{label},{esc10},1,A\n")
            touch(tmp_path / "audio", f"{fold}-{target}.wav")
    write(tmp_path / "meta" / "esc50.csv", ESC_HEADER + "".join(rows))
    return tmp_path


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """DCASE 2013: 10 files of two scenes for development, 2 for test."""
    for number in range(1, 11):
        touch(tmp_path / "scenes_stereo", f"bus{number:02d}.wav", f"busystreet{number:02d}.wav")
    touch(tmp_path / "scenes_stereo_testset", "bus01.wav", "busystreet11.wav")
    touch(tmp_path / "scenes_stereo", "readme.txt", "._bus01.wav")
    return tmp_path


def test_ucf101_gives_the_lists_in_their_order_with_all_classes(ucf: Path) -> None:
    split = ucf101(ucf, 1)
    assert (split.name, split.split, split.folder) == ("ucf101", "1", str(ucf))
    assert split.classes == ("Archery", "Punch", "YoYo"), "by number, not by alphabet of the numbers"
    assert ids(split.train) == ["UCF-101/Punch/v_Punch_g08_c01.avi", "UCF-101/Archery/v_Archery_g08_c01.avi"]
    assert ids(split.test) == ["UCF-101/Archery/v_Archery_g01_c01.avi", "UCF-101/Punch/v_Punch_g01_c01.avi"]
    assert [video.label for video in split.train] == ["Punch", "Archery"]
    assert all(Path(video.path) == ucf / video.video_id for video in split.train + split.test)
    assert [video.key_hash for video in split.train] == [video_hash(name) for name in ids(split.train)]
    assert split.missing == ()
    assert split.empty_classes() == {"train": ("YoYo",), "test": ("YoYo",)}


def test_missing_files_stay_in_the_split_and_are_named(ucf: Path) -> None:
    (ucf / "UCF-101/Punch/v_Punch_g08_c01.avi").unlink()
    split = ucf101(ucf, "1")
    assert split.missing == ("UCF-101/Punch/v_Punch_g08_c01.avi",)
    assert [(video.label, video.path is None) for video in split.train] == [
        ("Punch", True),
        ("Archery", False),
    ]
    assert split.empty_classes() == {"train": ("Punch", "YoYo"), "test": ("YoYo",)}


def test_folder_or_dangling_link_is_no_video(ucf: Path) -> None:
    for name in ("UCF-101/Punch/v_Punch_g08_c01.avi", "UCF-101/Archery/v_Archery_g08_c01.avi"):
        (ucf / name).unlink()
    (ucf / "UCF-101/Punch/v_Punch_g08_c01.avi").mkdir()
    (ucf / "UCF-101/Archery/v_Archery_g08_c01.avi").symlink_to("nowhere")
    assert len(ucf101(ucf, 1).missing) == 2


@pytest.mark.parametrize("videos", ["UCF101", "videos", ""])
@pytest.mark.parametrize("lists", ["splits", "annotations", ""])
def test_other_folder_names_are_found(ucf: Path, videos: str, lists: str) -> None:
    for here, there in (("UCF-101", videos), ("ucfTrainTestlist", lists)):
        for path in sorted((ucf / here).iterdir()):
            target = ucf / there / path.name
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
        (ucf / here).rmdir()
    split = ucf101(ucf, 1)
    prefix = f"{videos}/" if videos else ""
    assert ids(split.test)[0] == f"{prefix}Archery/v_Archery_g01_c01.avi"
    assert split.missing == ()
    assert all(Path(video.path).is_file() for video in split.test + split.train)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("classInd.txt", "1 Archery\nPunch\n", ["classInd.txt, line 2", "'Punch'", "'1 ApplyEyeMakeup'"]),
        ("classInd.txt", "1 Archery\n1 Punch\n", ["line 2", "once"]),
        ("classInd.txt", "\n", ["no classes"]),
        (
            "trainlist01.txt",
            "Punch/a.avi 2\n\nPunch/b.avi\n",
            ["trainlist01.txt, line 3", "'Punch/b.avi'", "number"],
        ),
        ("trainlist01.txt", "Punch/a.avi 1\n", ["line 1", "number 1", "expected 2"]),
        ("trainlist01.txt", "Jump/a.avi 2\n", ["line 1", "'Jump'", "classInd.txt"]),
        ("testlist01.txt", "v_Punch_g01_c01.avi\n", ["testlist01.txt, line 1", "Class/video.avi"]),
        ("testlist01.txt", "Punch/../a.avi\n", ["line 1", "Class/video.avi"]),
        ("testlist01.txt", "../a.avi\n", ["line 1", "'..'"]),
        ("testlist01.txt", "Punch/a.avi\nPunch/a.avi\n", ["line 2", "twice", "line 1"]),
        (
            "testlist01.txt",
            "Punch/v_Punch_g08_c01.avi\n",
            ["testlist01.txt, line 1", "twice", "trainlist01.txt, line 1", "training or for test"],
        ),
    ],
)
def test_ucf101_says_which_line_is_wrong(ucf: Path, file: str, text: str, said: list[str]) -> None:
    write(ucf / "ucfTrainTestlist" / file, text)
    with pytest.raises(ValueError) as error:
        ucf101(ucf, 1)
    for words in said:
        assert words in str(error.value)


def test_test_list_may_repeat_the_number(ucf: Path) -> None:
    write(ucf / "ucfTrainTestlist" / "testlist01.txt", "Punch/v_Punch_g01_c01.avi 2\n")
    assert ids(ucf101(ucf, 1).test) == ["UCF-101/Punch/v_Punch_g01_c01.avi"]
    write(ucf / "ucfTrainTestlist" / "testlist01.txt", "Punch/v_Punch_g01_c01.avi 1\n")
    with pytest.raises(ValueError, match="number 1, expected 2"):
        ucf101(ucf, 1)


def test_what_is_not_there_is_said_with_where_it_was_looked_for(ucf: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a folder.*--data"):
        ucf101(ucf / "nowhere", 1)
    with pytest.raises(ValueError, match="split is '4', expected one of 1, 2, 3"):
        ucf101(ucf, 4)
    with pytest.raises(ValueError, match="trainlist02.txt cannot be read"):
        ucf101(ucf, 2)
    with pytest.raises(ValueError, match="no classInd.txt: looked for .*splits/classInd.txt"):
        ucf101(ucf / "UCF-101", 1)
    (ucf / "UCF-101").rename(ucf / "elsewhere")
    with pytest.raises(ValueError, match="none of the 4 files of ucf101.*UCF-101/Punch/v_Punch_g08_c01.avi"):
        ucf101(ucf, 1)


def test_hmdb51_gives_names_with_characters_of_patterns(hmdb: Path) -> None:
    split = hmdb51(str(hmdb), "1")
    assert split.classes == ("golf", "wave")
    assert ids(split.train) == ["hmdb51_org/golf/x_golf.avi", "hmdb51_org/wave/#1_(a)_[b]*_wave_f_0.avi"]
    assert ids(split.test) == ["hmdb51_org/wave/with space !!_wave_1.avi"]
    assert split.missing == (), "files marked 0 are in no part"
    assert all(Path(video.path).is_file() for video in split.train + split.test)
    assert split.empty_classes() == {"train": (), "test": ("golf",)}


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("wave_test_split1.txt", "a.avi\n", ["wave_test_split1.txt, line 1", "'a.avi'", "0 (unused)"]),
        ("wave_test_split1.txt", "a.avi 1\nb.avi 3\n", ["line 2", "'b.avi 3'"]),
        ("wave_test_split1.txt", "../a.avi 1\n", ["line 1", "'../a.avi 1'"]),
        ("wave_test_split1.txt", "a.avi 1\na.avi 2\n", ["line 2", "twice", "line 1"]),
        ("wave_test_split1.txt", "a.avi 0\na.avi 2\n", ["line 2", "twice", "line 1"]),
        ("jump_test_split2.txt", "a.avi 1\n", ["jump_test_split1.txt does not exist"]),
    ],
)
def test_hmdb51_says_which_line_is_wrong(hmdb: Path, file: str, text: str, said: list[str]) -> None:
    write(hmdb / "testTrainMulti_7030_splits" / file, text)
    with pytest.raises(ValueError) as error:
        hmdb51(hmdb, 1)
    for words in said:
        assert words in str(error.value)


def test_hmdb51_says_where_it_looked(hmdb: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ValueError, match="no lists: looked for <class>_test_split1.txt in .*7030_splits"):
        hmdb51(tmp_path_factory.mktemp("empty"), 1)
    (hmdb / "hmdb51_org").rename(hmdb / "elsewhere")
    with pytest.raises(ValueError, match="none of the 3 files of hmdb51.*hmdb51_org/golf/x_golf.avi"):
        hmdb51(hmdb, 1)


def test_the_same_file_name_in_two_classes_is_two_files(hmdb: Path) -> None:
    write(hmdb / "testTrainMulti_7030_splits" / "golf_test_split1.txt", "x_golf.avi 1 \nc_wave_2.avi 2 \n")
    write(hmdb / "testTrainMulti_7030_splits" / "wave_test_split1.txt", "c_wave_2.avi 1 \n")
    split = hmdb51(hmdb, 1)
    assert split.missing == ("hmdb51_org/golf/c_wave_2.avi",)
    assert "hmdb51_org/wave/c_wave_2.avi" in ids(split.train)


def test_esc50_tests_on_one_fold_and_trains_on_the_others(esc: Path) -> None:
    seen = Counter()
    for fold in DATASETS["esc50"].splits:
        split = esc50(esc, fold)
        assert split.classes == ("dog", "cat"), "by number"
        assert ids(split.test) == [f"audio/{fold}-7.wav", f"audio/{fold}-3.wav"]
        assert len(split.train) == 8 and not set(ids(split.train)) & set(ids(split.test))
        assert split.missing == ()
        seen.update(ids(split.test))
    assert len(seen) == 10 and set(seen.values()) == {1}, "each clip is tested once over the folds"


def test_esc10_keeps_only_its_own_clips_and_classes(esc: Path) -> None:
    split = read_split("esc10", esc, 2)
    assert (split.name, split.classes) == ("esc10", ("dog",))
    assert ids(split.test) == ["audio/2-3.wav"]
    assert len(split.train) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("filename,fold,target\n", ["'target'", "filename,fold,target,category,esc10"]),
        ("", ["columns none"]),
        (ESC_HEADER, ["no clips"]),
        (ESC_HEADER + "a.wav,6,0,dog,True,1,A\n", ["line 2", "a.wav,6,0,dog", "fold of 1 to 5"]),
        (ESC_HEADER + "a.wav,1,zero,dog,True,1,A\n", ["line 2", "zero"]),
        (ESC_HEADER + "a.wav,1,0,dog,maybe,1,A\n", ["line 2", "maybe"]),
        (ESC_HEADER + "../a.wav,1,0,dog,True,1,A\n", ["line 2", "../a.wav"]),
        (ESC_HEADER + "a.wav,1\n", ["line 2", "a.wav,1"]),
        (ESC_HEADER + "a.wav,1,0,dog,True,1,A\nb.wav,1,1,dog,True,1,A\n", ["line 3", "'dog' has number 1"]),
        (ESC_HEADER + "a.wav,1,0,dog,True,1,A\nb.wav,1,0,cat,True,1,A\n", ["line 3", "'cat' has number 0"]),
        (ESC_HEADER + "a.wav,1,0,dog,True,1,A\na.wav,2,0,dog,True,1,A\n", ["line 3", "twice", "line 2"]),
    ],
)
def test_esc50_says_which_row_is_wrong(esc: Path, text: str, said: list[str]) -> None:
    write(esc / "meta" / "esc50.csv", text)
    with pytest.raises(ValueError) as error:
        esc50(esc, 1)
    for words in said:
        assert words in str(error.value)


def test_esc50_says_what_is_not_there(esc: Path) -> None:
    with pytest.raises(ValueError, match="split is '0', expected one of 1, 2, 3, 4, 5"):
        esc50(esc, 0)
    with pytest.raises(ValueError, match="no esc50.csv: looked for .*meta/esc50.csv"):
        esc50(esc / "audio", 1)
    (esc / "audio").rename(esc / "sounds")
    with pytest.raises(ValueError, match="none of the 10 files of esc50.*audio/"):
        esc50(esc, 1)


def test_dcase_trains_on_development_and_tests_on_test_files(scenes: Path) -> None:
    split = dcase(scenes)
    assert (split.name, split.split, split.classes) == ("dcase2014", "test", ("bus", "busystreet"))
    assert len(split.train) == 20
    assert {video.label for video in split.train} == {"bus", "busystreet"}
    # bus01.wav is in both folders: two files.
    assert ids(split.test) == ["scenes_stereo_testset/bus01.wav", "scenes_stereo_testset/busystreet11.wav"]
    assert [video.label for video in split.test] == ["bus", "busystreet"]


def test_dcase_folds_are_stratified_and_hold_each_development_file_once(scenes: Path) -> None:
    seen = Counter()
    for fold in DATASETS["dcase2013"].splits:
        split = read_split("dcase2013", scenes, fold)
        assert (split.name, split.split) == ("dcase2013", fold)
        assert Counter(video.label for video in split.test) == {"bus": 2, "busystreet": 2}
        assert Counter(video.label for video in split.train) == {"bus": 8, "busystreet": 8}
        assert not set(ids(split.train)) & set(ids(split.test))
        assert split == dcase(scenes, "5-fold", int(fold)), "the same each time"
        seen.update(ids(split.test))
    assert len(seen) == 20 and set(seen.values()) == {1}
    assert all(name.startswith("scenes_stereo/") for name in seen)


def test_dcase_says_what_is_wrong(scenes: Path) -> None:
    with pytest.raises(ValueError, match="reading is 'other', expected 'dev-test' or '5-fold'"):
        dcase(scenes, "other")
    with pytest.raises(ValueError, match="fold is 1, expected None"):
        dcase(scenes, "dev-test", 1)
    with pytest.raises(ValueError, match="split is 'None', expected one of 1, 2, 3, 4, 5"):
        dcase(scenes, "5-fold")
    touch(scenes / "scenes_stereo_testset", "kitchen01.wav")
    with pytest.raises(ValueError, match="kitchen01.wav: expected .*busystreet01.wav.*tubestation"):
        dcase(scenes)
    dcase(scenes, "5-fold", 1)  # does not look at the test files
    for path in (scenes / "scenes_stereo").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="scenes_stereo has no scenes"):
        dcase(scenes)
    (scenes / "scenes_stereo").rmdir()
    with pytest.raises(ValueError, match="scenes_stereo is not a folder"):
        dcase(scenes)


def test_unknown_dataset_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataset is 'kinetics', expected one of ucf101, hmdb51, esc50"):
        read_split("kinetics", tmp_path, "1")


def test_datasets_are_known_by_their_annotations(
    ucf: Path,
) -> None:
    assert detect_datasets(ucf) == ("ucf101",)
    (ucf / "ucfTrainTestlist").rename(ucf / "splits")
    assert detect_datasets(ucf) == ("ucf101",)
    assert detect_datasets(ucf / "splits") == ("ucf101",), "also right in the folder"
    assert detect_datasets(ucf / "UCF-101") == ()
    with pytest.raises(ValueError, match="is not a folder"):
        detect_datasets(ucf / "nowhere")


def test_other_datasets_are_known_by_their_annotations(hmdb: Path, esc: Path, scenes: Path) -> None:
    # All in one folder, as the fixtures share it.
    assert detect_datasets(hmdb) == ("hmdb51", "esc50", "esc10", "dcase2013", "dcase2014")


def test_keys_stay_unique_when_hashes_collide(ucf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.sources, "video_hash", lambda name: f"{len(name) % 2}")
    write(ucf / "ucfTrainTestlist" / "testlist01.txt", "Archery/v_Archery_g01_c01.avi\n")
    write(ucf / "ucfTrainTestlist" / "trainlist01.txt", "Archery/v_Archery_g08_c01.avi 1\n")
    split = ucf101(ucf, 1)
    assert sorted(video.key_hash for video in split.train + split.test) == ["0", "1"]


@pytest.fixture
def full_lists(real_data: Path, tmp_path: Path) -> Path:
    """The complete official lists, with a single file of each dataset."""
    folder = real_data / "annotations_full"
    for name in ("ucfTrainTestlist", "testTrainMulti_7030_splits", "esc50.csv"):
        if not (folder / name).exists():
            pytest.skip(f"no {name} in {folder}")
        (tmp_path / name).symlink_to(folder / name)
    touch(tmp_path, "UCF-101/Punch/v_Punch_g01_c01.avi", "hmdb51_org/wave/21_wave_u_nm_np1_fr_goo_5.avi")
    touch(tmp_path, "audio/1-100032-A-0.wav")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "split", "num_classes", "num_train", "num_test"),
    [
        ("ucf101", "1", 101, 9537, 3783),
        ("ucf101", "2", 101, 9586, 3734),
        ("ucf101", "3", 101, 9624, 3696),
        ("hmdb51", "1", 51, 3570, 1530),
        ("hmdb51", "2", 51, 3570, 1530),
        ("hmdb51", "3", 51, 3570, 1530),
        *(("esc50", str(fold), 50, 1600, 400) for fold in range(1, 6)),
        *(("esc10", str(fold), 10, 320, 80) for fold in range(1, 6)),
    ],
)
def test_complete_lists_give_the_official_counts(
    full_lists: Path, name: str, split: str, num_classes: int, num_train: int, num_test: int
) -> None:
    found = read_split(name, full_lists, split)
    assert (len(found.classes), len(found.train), len(found.test)) == (num_classes, num_train, num_test)
    assert len(found.missing) == num_train + num_test - 1, "all but the one file that is there"
    assert (
        {video.label for video in found.train} == {video.label for video in found.test} == set(found.classes)
    )
    keys = {video.key_hash for video in found.train + found.test}
    assert len(keys) == num_train + num_test


def test_real_samples_are_complete_for_their_own_lists(real_data: Path) -> None:
    def counts(split: ClassificationSplit) -> tuple[int, int, int, int]:
        return len(split.classes), len(split.train), len(split.test), len(split.missing)

    split = ucf101(real_data / "ucf101", 1)
    assert counts(split) == (101, 38, 23, 0)
    assert set(split.classes) - set(split.empty_classes()["train"]) == {video.label for video in split.train}
    assert counts(hmdb51(real_data / "hmdb51", 1)) == (5, 3, 2, 0)
    for fold in range(1, 6):
        split = esc50(real_data / "ESC-50", fold)
        assert counts(split) == (10, 120, 30, 0)
        assert set(Counter(video.label for video in split.test).values()) == {3}
