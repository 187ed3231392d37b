"""train.py that takes its time, and writes down the keys of each step a rank has taken: elastic_worker.py LOG ..."""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from cmac.pretrain import Pretraining

SECONDS_PER_STEP = {1: 0.5, 2: 0.1}
"""By number of ranks: one rank alone waits for the other to come."""


def main() -> None:
    log = Path(sys.argv.pop(1))
    take = Pretraining.train_step

    def train_step(self: Pretraining, batch: object) -> object:
        output = take(self, batch)
        line = {
            "life": f"{os.environ['MASTER_PORT']}/{os.environ['WORLD_SIZE']}",
            "rank": self.rank,
            "ranks": self.world_size,
            "step": self.step,
            "keys": batch.keys,
        }
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        time.sleep(SECONDS_PER_STEP[self.world_size])
        return output

    Pretraining.train_step = train_step
    train.main()


if __name__ == "__main__":
    main()
