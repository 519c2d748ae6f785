"""What decides how long and how a player is trained: the `train:` section of a recipe."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from limbeck.contract import Frozen, OptimiserSpec


class TrainConfig(Frozen):
    """Length, batches, optimiser and upkeep of one training. Batches are global: over all processes and micro-batches."""

    epochs: int | None = Field(None, ge=0, le=1_000_000, description="passes over the data; give this or steps")
    steps: int | None = Field(None, ge=0, le=10**12, description="batches; give this or epochs")
    batch_size: int = Field(128, ge=1, le=10_000_000, description="samples an update, over all processes and micro-batches")
    accumulate: int = Field(1, ge=1, le=65_536, description="micro-batches that a batch is cut into")
    drop_last: bool = Field(False, description="leave out an epoch's last, smaller batch")
    optimiser: OptimiserSpec = OptimiserSpec()
    clip_norm: float | None = Field(None, gt=0, description="largest gradient norm of a player (L2)")
    precision: Literal["no", "bf16", "fp16"] = Field("no", description="autocast type; fp16 scales the loss")
    ema: float | None = Field(
        None, ge=0, lt=1, description="decay of an average of the weights of the student (or generator), which is then what is evaluated and saved"
    )
    workers: int = Field(0, ge=0, le=256, description="loader processes; the result does not depend on it")
    sharding: Literal["none", "fsdp2"] = Field("none", description="fsdp2 shards the players over the processes")
    log_every: int = Field(50, ge=1, description="batches between two rows of metrics.jsonl")
    evaluate_every: int = Field(0, ge=0, description="epochs between two evaluations for the learning curve; 0: none")
    checkpoint_steps: int | None = Field(None, ge=1, description="batches between two checkpoints")
    checkpoint_minutes: float = Field(5.0, gt=0, description="minutes between two checkpoints, where checkpoint_steps is not given")
    keep: int = Field(2, ge=1, le=1000, description="checkpoints kept")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give 'epochs' or 'steps', one of them.")
        return self
