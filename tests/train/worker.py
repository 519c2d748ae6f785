"""One training for the tests that need processes of their own: worker.py MODE FOLDER [SHARDING]. MODE: run, slow, hold."""

import sys
import time
from pathlib import Path

import torch
from torch import nn
from toys import Toy, plain_student, toy_data

from limbeck.contract import Batch, Clock, OptimiserSpec, Phase, Player, Update
from limbeck.data import AugmentSpec
from limbeck.errors import LimbeckError
from limbeck.train import TrainConfig, Trainer, locked


class Quiet(Toy):
    """Two players without noise, so that the number of processes does not matter."""

    def players(self):
        return {"student": Player(self.student), "critic": Player(self.critic, OptimiserSpec(name="adam", lr=1e-3))}

    def phases(self):
        return [Phase()]

    def updates(self, batch: Batch, clock: Clock):
        own = torch.tensor([float(len(batch)), 1.0])
        assert clock.total(own).tolist() == [float(min(12, 44 - 12 * (clock.step % 4))), float(clock.world)]  # the global batch, the processes
        assert own[1] == 1  # what was given is left alone
        out = self.student(batch.inputs)
        yield Update("student", nn.functional.cross_entropy(out, batch.targets), {"largest": out.mean()})
        yield Update("critic", (self.critic(self.student(batch.inputs).detach()) - 1).square().mean())


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    sharding = sys.argv[3] if len(sys.argv) > 3 else "none"
    torch.set_num_threads(1)
    if mode == "hold":
        with locked(folder):
            print("held", flush=True)
            time.sleep(60)
    method = (Toy(pause=0.02) if mode == "slow" else Quiet()).bind(student=plain_student(), train=toy_data(), num_classes=3)
    length = {"epochs": 400} if mode == "slow" else {"epochs": 6, "checkpoint_steps": 6}
    config = TrainConfig(**length, batch_size=12, log_every=5, clip_norm=1.0, sharding=sharding, optimiser=OptimiserSpec(lr=0.05), keep=100)
    spec = None if mode == "slow" else AugmentSpec(noise=0.1, mixup=0.4)
    try:
        Trainer(method, toy_data(), config, seed=1, folder=folder, augment=spec, num_classes=3, cpu=True).fit()
    except LimbeckError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
