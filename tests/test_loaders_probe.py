"""Backend `auto`: a trial decides, says why, and never hides what is wrong with the configuration."""

import json
from dataclasses import replace

import pytest
import torch
from loaders_media import write_shards

from loaders import build_loader
from loaders.config import AudioConfig, LoaderConfig, VideoConfig, gdt_audio_config
from loaders.portable import PortableLoader
from loaders.probe import Trial, choose_backend, resolve_backend, try_backends, why_unavailable
from train import previous_backend

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> LoaderConfig:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [8], num_slots=1)
    return LoaderConfig(
        shards=str(folder),
        global_batch_size=4,
        num_workers=0,
        dali_threads=1,
        probe_seconds=0.3,
        video=VideoConfig(num_frames=2, short_side=36, crop_size=32),
    )


def trial(backend: str, rate: float | None, reason: str = "") -> Trial:
    return Trial(backend=backend, clips_per_second=rate, first_batch_seconds=1.0, reason=reason)


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ((None, 100.0, 90.0), "dali-cpu-decode"),
        ((None, 102.0, 100.0), "portable"),  # not clearly faster: the one that needs less
        ((500.0, 400.0, 100.0), "dali-gpu"),
        ((410.0, 400.0, 100.0), "dali-cpu-decode"),
        ((500.0, None, None), "dali-gpu"),
    ],
)
def test_the_fastest_is_chosen_if_it_is_clearly_so(rates, chosen):
    names = ("dali-gpu", "dali-cpu-decode", "portable")
    assert choose_backend([trial(*pair) for pair in zip(names, rates)]) == chosen


def test_a_trial_measures_what_can_run_and_says_why_others_cannot(config):
    trials = {t.backend: t for t in try_backends(config, 0, 1, CPU)}
    assert trials["portable"].clips_per_second > 0 and trials["portable"].first_batch_seconds > 0
    assert trials["dali-gpu"].clips_per_second is None
    assert "needs a GPU, the device is cpu" in str(trials["dali-gpu"])
    assert "clips/s, first batch after" in str(trials["portable"])


def test_the_choice_is_said_and_a_run_keeps_it(config, tmp_path):
    said = []
    chosen = resolve_backend(config, 0, 1, CPU, said.append)
    assert chosen.backend in ("portable", "dali-cpu-decode")
    assert said[0].startswith(f"loader backend: {chosen.backend}, the ") and len(said) >= 1
    assert replace(chosen, backend="auto") == config
    (tmp_path / "config.json").write_text(json.dumps({"loader": {"backend": "portable"}}))
    again = resolve_backend(config, 0, 1, CPU, said.append, previous_backend(tmp_path))
    assert again.backend == "portable" and said[-1] == "loader backend: portable, as before in this run"
    assert previous_backend(tmp_path / "nothing") is None


def test_a_backend_that_was_named_is_not_tried(config):
    named = replace(config, backend="portable")
    assert resolve_backend(named, 0, 1, CPU, pytest.fail) is named


def test_one_candidate_needs_no_trial(config):
    said = []
    gdt = replace(config, audio=gdt_audio_config())
    assert resolve_backend(gdt, 0, 1, CPU, said.append).backend == "portable"
    assert "the only one that can run here" in said[0] and "front end gdt" in said[0]
    assert isinstance(build_loader(gdt), PortableLoader)


def test_a_candidate_that_fails_is_not_chosen(config, monkeypatch):
    pytest.importorskip("nvidia.dali")
    monkeypatch.setattr("loaders.dali_audio.DaliAudio.__call__", _fail)
    said = []
    assert resolve_backend(config, 0, 1, CPU, said.append).backend == "portable"
    assert any("dali-cpu-decode: RuntimeError: DALI is not well" in line for line in said)


def _fail(*arguments):
    raise RuntimeError("DALI is not well")


def test_what_is_wrong_for_all_is_an_error(config, tmp_path):
    with pytest.raises(ValueError, match="expected a folder written by tools/make_shards.py"):
        resolve_backend(replace(config, shards=str(tmp_path)), 0, 1, CPU, pytest.fail)


def test_reasons_name_what_is_missing(config, monkeypatch):
    assert why_unavailable("portable", config, CPU) == ""
    gdt = replace(config, audio=gdt_audio_config())
    assert why_unavailable("dali-cpu-decode", gdt, CPU) == "DALI does not do the audio front end gdt"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_unavailable("dali-cpu-decode", config, CPU) == "NVIDIA DALI is not installed"
    assert why_unavailable("portable", replace(config, audio=AudioConfig()), CPU) == ""
