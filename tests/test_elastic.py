"""Nodes come and go: two torchrun agents on this machine stand for two."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest
import torch
from test_train import SMALL, make_sixteen_videos

import train
from cmac.watchdog import descendants
from loaders import build_loader

ROOT = Path(__file__).resolve().parents[1]
STEPS = 60
CHECKPOINT_EVERY = 4
# Without it torchrun's first agent keeps the address at which ranks meet to itself in later rounds, and a node that
# comes waits for it in vain (torch 2.11).
ENVIRONMENT = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# Half a minute is waited for nodes to come, and a dead one is noticed after 15 s, unless told otherwise.
RENDEZVOUS = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
FLAGS = [*SMALL, "--loader.global-batch-size", "4", "--loader.num-workers", "1"]


class Node:
    """A torchrun agent with one rank."""

    def __init__(self, port: int, is_host: bool, folder: Path, shards: Path) -> None:
        self._out = folder / f"node_{time.monotonic_ns()}.txt"
        line = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1"]
        line += [
            "--max-restarts=3",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{port}",
            "--rdzv-id=run",
        ]
        line += ["--local-addr=127.0.0.1", f"--rdzv-conf={RENDEZVOUS},is_host={int(is_host)}"]
        line += [
            "tests/elastic_worker.py",
            str(folder / "keys.jsonl"),
            "demo",
            "--run-dir",
            str(folder / "run"),
        ]
        line += ["--loader.shards", str(shards), *FLAGS, "--max-steps", str(STEPS)]
        line += ["--checkpoint-every", str(CHECKPOINT_EVERY), "--keep-checkpoints", "20"]
        with open(self._out, "w") as out:
            self.process = subprocess.Popen(
                line, cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=subprocess.STDOUT
            )

    @property
    def said(self) -> str:
        return self._out.read_text()

    def kill(self) -> None:
        """As when its power fails."""
        for pid in (self.process.pid, *descendants(self.process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def taken(folder: Path) -> list[dict]:
    """What ranks wrote down; a line may be cut off by a kill."""
    path = folder / "keys.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for(folder: Path, ranks: int, step: int, nodes: list[Node]) -> None:
    """Until so many ranks together have taken that step."""
    deadline = time.monotonic() + 200
    while not any(line["ranks"] == ranks and line["step"] >= step for line in taken(folder)):
        assert time.monotonic() < deadline, "\n".join(node.said for node in nodes)
        time.sleep(0.05)


@pytest.mark.slow
def test_a_node_is_lost_and_another_comes_and_each_global_batch_stays_what_it_was(tmp_path, free_port):
    """Steps after the last checkpoint are taken again from there, none is lost, and none has other clips."""
    shards = make_sixteen_videos(tmp_path)
    config = train.parse(["demo", "--loader.shards", str(shards), *FLAGS]).loader
    loader = build_loader(config, 0, 1, device=torch.device("cpu"))
    expected = []
    while len(expected) < STEPS:
        expected += [batch.keys for batch in islice(loader, STEPS - len(expected))]
    loader.close()

    nodes = [Node(free_port, True, tmp_path, shards)]
    try:
        nodes.append(Node(free_port, False, tmp_path, shards))
        wait_for(tmp_path, 2, 6, nodes)
        nodes[1].kill()
        wait_for(tmp_path, 1, 5, nodes)
        nodes.append(Node(free_port, False, tmp_path, shards))
        for node in (nodes[0], nodes[2]):
            assert node.process.wait(200) == 0, node.said
    finally:
        for node in nodes:
            node.kill()

    lives: dict[str, dict[int, dict[int, list[str]]]] = {}
    for line in taken(tmp_path):
        lives.setdefault(line["life"], {}).setdefault(line["step"], {})[line["rank"]] = line["keys"]
    assert [int(life.split("/")[1]) for life in lives] == [2, 1, 2], nodes[0].said
    reached = 0
    for life, steps in lives.items():
        num_ranks = int(life.split("/")[1])
        assert list(steps) == list(range(min(steps), max(steps) + 1))
        assert (min(steps) - 1) % CHECKPOINT_EVERY == 0 or min(steps) == reached + 1
        assert reached - CHECKPOINT_EVERY < min(steps) <= reached + 1, "steps are lost, or too many repeated"
        for step, parts in steps.items():
            size = 4 // num_ranks
            for rank, keys in parts.items():
                part = expected[step - 1][rank * size : (rank + 1) * size]
                assert tuple(keys) == part, (life, step, rank)
            # Of the step in which a node was lost one rank may not have told any more.
            assert len(parts) == num_ranks or step == max(steps)
        reached = max(steps)
    assert reached == STEPS and "ranks: 2 -> 1" in nodes[0].said and "ranks: 1 -> 2" in nodes[0].said
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))


def test_ranks_that_cannot_share_a_batch_are_told_which_numbers_can():
    config = train.parse(["demo", "--loader.global-batch-size", "8"])
    with pytest.raises(
        ValueError, match="is 8, which 3 ranks cannot share equally; start one of 1, 2, 4, 8 ranks"
    ):
        train._build_loader(config, 0, 3)
