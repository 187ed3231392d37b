"""Backend `auto`: a trial decides, says why, and never hides what is wrong with the configuration."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loaders_media import write_shards

from loaders import build_loader
from loaders.config import AudioConfig, LoaderConfig, VideoConfig, gdt_audio_config
from loaders.portable import PortableLoader
from loaders.probe import Trial, choose_backend, resolve_backend, try_backends, why_unavailable
from train import check_ranks_agree, previous_backend

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


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


def test_ranks_choose_alike_whatever_each_of_them_knows(config, tmp_path):
    """Only rank 0 knows what the run was using, and only rank 1 lacks DALI: nobody waits for nobody."""
    script = textwrap.dedent(
        """
        import importlib.util, os, sys
        from dataclasses import replace
        import torch, torch.distributed as dist
        from loaders.config import LoaderConfig, VideoConfig
        from loaders import probe
        rank = int(os.environ["RANK"])
        dist.init_process_group("gloo")
        config = LoaderConfig(shards=sys.argv[1], global_batch_size=4, num_workers=0, dali_threads=1,
                              probe_seconds=0.2, video=VideoConfig(num_frames=2, short_side=36, crop_size=32))
        tell = lambda line: os.write(1, (line + "\\n").encode())  # whole lines: the ranks share a pipe
        say = lambda line: tell(f"said {rank}: {line}")
        def choose(previous):
            return probe.resolve_backend(config, rank, 2, torch.device("cpu"), say, previous).backend
        tell(f"chosen {rank} {choose('portable' if rank == 0 else None)}")
        if rank == 1:
            probe.importlib.util.find_spec = lambda name: None
        tell(f"chosen {rank} {choose(None)}")
        dist.destroy_process_group()
        """
    )
    path = tmp_path / "ranks.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", path, config.shards],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    chosen = sorted(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("chosen"))
    assert chosen == [["0", "portable"]] * 2 + [["1", "portable"]] * 2
    assert "said 0: loader backend: portable, as before in this run" in done.stdout
    assert "the only one that can run here" in done.stdout and "said 1" not in done.stdout


def test_ranks_with_other_shards_are_refused(monkeypatch):
    states = [{"manifest": "a", "dropped_shards": []}, {"manifest": "a", "dropped_shards": [3]}]

    def gather(values: list, value: dict) -> None:
        values[:] = states

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    with pytest.raises(
        ValueError, match=r"rank 1 reads other clips than rank 0: its loader has dropped_shards"
    ):
        check_ranks_agree(states[0], 2)
    states[1] = dict(states[0])
    check_ranks_agree(states[0], 2)
