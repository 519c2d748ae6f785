"""A training that gets killed: a nursery that imports everything once, forks a child, kills it after a random while, and forks again.

Usage: killed.py FOLDER WORKERS KILLS SEED. Prints the number of kills and how many struck while a checkpoint was being written.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import accelerate  # noqa: F401  imported before forking, or every child would
import torch
from toys import Toy, toy_data, toy_student

from limbeck.contract import OptimiserSpec
from limbeck.data import AugmentSpec
from limbeck.train import TrainConfig, Trainer
from limbeck.train import checkpoint as checkpoints


def train(folder: Path, workers: int, pause: float) -> None:
    method = Toy(pause=pause).bind(student=toy_student(), train=toy_data(), num_classes=3, seed=3)
    config = TrainConfig(epochs=150, batch_size=10, log_every=7, checkpoint_steps=2, keep=1000, workers=workers, optimiser=OptimiserSpec(lr=0.05))
    Trainer(method, toy_data(), config, seed=3, folder=folder, augment=AugmentSpec(noise=0.1, mixup=0.5), num_classes=3).fit()


def main() -> None:
    folder, workers, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    if kills == 0:
        train(folder, workers, 0.0)
        return
    rng = random.Random(seed)
    done, in_writing = 0, 0
    while True:
        child = os.fork()
        if child == 0:
            try:
                train(folder, workers, 0.002)
                os._exit(0)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(1)
        if done < kills:
            before = checkpoints.steps(folder / "checkpoints")[-1:]
            deadline = time.monotonic() + 60
            while checkpoints.steps(folder / "checkpoints")[-1:] == before and time.monotonic() < deadline:  # each child gets a little further
                if os.waitpid(child, os.WNOHANG)[0]:
                    sys.exit(f"the training ended after {done} kills")
                time.sleep(0.001)
            time.sleep(rng.uniform(0.0, 0.12))
            os.kill(child, signal.SIGKILL)
            done += 1
            in_writing += bool(list((folder / "checkpoints").glob(".tmp-*")))
            os.waitpid(child, 0)
            continue
        _, status = os.waitpid(child, 0)
        if status == 0:
            print(f"{done} {in_writing}")
        sys.exit(0 if status == 0 else 1)


if __name__ == "__main__":
    main()
