"""torchdistill's contestant in engine.py: its DistillationBox on the same networks and images, run by its own interpreter."""

from __future__ import annotations

import sys

import torch
from torch.utils.data import RandomSampler, SequentialSampler, TensorDataset
from torchdistill.core.distillation import DistillationBox

from engine import BATCH, THREADS, Gate, images, networks


def main() -> None:
    torch.set_num_threads(THREADS)
    teacher, student = networks()
    data = TensorDataset(*images(BATCH * 16))
    terms = {"student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".", "teacher_module_io": "output"}
    kd = {"key": "KDLoss", "kwargs": {**terms, "temperature": 4.0, "alpha": 0.1}}
    config = {
        "num_epochs": 10**6,
        "train_data_loader": {"dataset_id": "train", "sampler": {"class_or_func": RandomSampler}, "kwargs": {"batch_size": BATCH, "num_workers": 0}},
        "val_data_loader": {"dataset_id": "train", "sampler": {"class_or_func": SequentialSampler}, "kwargs": {"batch_size": BATCH}},
        "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only", "sequential": [], "frozen_modules": [], "wrapper": None},
        "student": {"requires_grad": True, "forward_proc": "forward_batch_only", "sequential": [], "frozen_modules": [], "wrapper": None},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.05, "momentum": 0.9}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}}},
    }
    box = DistillationBox(teacher, student, {"train": data}, config, torch.device("cpu"), None, False, 1)
    gate = Gate(int(sys.argv[1]))
    gate.wait()
    for epoch in range(config["num_epochs"]):
        box.pre_epoch_process(epoch=epoch)
        for batch, targets, supplement in box.train_data_loader:
            box.pre_forward_process()
            loss = box.forward_process(batch, targets, supp_dict=supplement)
            box.post_forward_process(loss=loss)
            gate.step()


if __name__ == "__main__":
    main()
