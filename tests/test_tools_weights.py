"""The command line exports, imports and shows weights, and says in one line what does not fit."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch

import cmac
from cmac.checkpoint import build_model, save_checkpoint
from cmac.config import demo
from cmac.weights import CARD
from tools.weights import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = demo()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, queue_length=8))
    torch.manual_seed(0)
    save_checkpoint(folder / "checkpoints", 720, config, {"model": build_model(config).state_dict()}, keep=1)
    return folder


@pytest.fixture(scope="module")
def gdt_file(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GDT file of small networks."""
    encoders = cmac.load(run_folder)
    state = {f"video_network.base.{n}": v for n, v in encoders.video.state_dict().items()}
    state |= {f"audio_network.base.{n}": v for n, v in encoders.audio.state_dict().items()}
    state["mlp_v.block_forward.2.weight"] = torch.ones(2, 2)
    path = tmp_path_factory.mktemp("gdt") / "gdt.pth"
    torch.save({"model": state, "epoch": 7}, path)
    return path


def test_export_writes_safetensors_and_a_card_that_load_reads(run_folder, tmp_path, capsys):
    assert main(["export", str(run_folder), str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    encoders = cmac.load(tmp_path / "out")
    assert encoders.digest == cmac.load(run_folder).digest
    assert f"digest: {encoders.digest}" in output and "step 720" in output
    with safetensors.safe_open(tmp_path / "out" / "encoders.safetensors", "pt") as file:
        assert "video.stem.0.weight" in file.keys() and "audio.conv1.weight" in file.keys()  # noqa: SIM118


def test_import_lists_what_it_drops_in_output_and_card(gdt_file, tmp_path, capsys):
    assert main(["import", str(gdt_file), str(tmp_path / "out"), "--audio", "gdt-40"]) == 0
    output = capsys.readouterr().out
    card = json.loads((tmp_path / "out" / CARD).read_text())
    assert card["source"]["dropped"] == ["epoch", "mlp_v.block_forward.2.weight"]
    for name in card["source"]["dropped"]:
        assert f"not used: {name}\n" in output
    assert cmac.load(tmp_path / "out").audio_config.num_mel_bins == 40
    assert "do not redistribute" in output


def test_show_describes_a_run_and_gives_its_card_as_json(run_folder, capsys):
    assert main(["show", str(run_folder)]) == 0
    output = capsys.readouterr().out
    model, _ = cmac.load_checkpoint(run_folder)
    for name in ("video encoder", "audio encoder"):
        assert f"{model.parameter_counts()[name]:,} parameters" in output
    assert "8 of 64x64 pixels" in output and "24000 Hz" in output and "h_v" in output
    assert main(["show", str(run_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == cmac.load(run_folder).digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "missing.pth"], "missing.pth: no such file"),
        (["export", "RUN", "OUT", "--format", "torchvision"], "not torchvision's r2plus1d_18"),
        (["import", "GDT", "OUT", "--format", "xdc"], "names and shapes of its weights are gdt's"),
        (["import", "GDT", "OUT", "--classifier"], "has no classifier"),
        (["import", "GDT", "RUN"], "not empty"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(run_folder, gdt_file, tmp_path, capsys, arguments, message):
    places = {"RUN": str(run_folder), "GDT": str(gdt_file), "OUT": str(tmp_path / "out")}
    assert main([places.get(argument, argument) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("weights: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_module_runs_from_the_repository(run_folder, tmp_path):
    command = [sys.executable, "-m", "tools.weights", "show", str(run_folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Video and audio encoders of Cross-Modal Attention Consistency pretraining")
