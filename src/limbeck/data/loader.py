"""Batches as a pure function of the step: any start, any number of workers, processes or micro-batches gives the same samples, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from multiprocessing.util import get_temp_dir
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from limbeck import seeds
from limbeck.contract import Batch, Data
from limbeck.data.augment import AugmentSpec, blend, mates, soft_targets, transform
from limbeck.data.augment import augment as augmented
from limbeck.data.views import Views
from limbeck.errors import InputError


class BatchPlan:
    """Which samples make up the global batch of every step.

    Args:
        samples: how many there are (ids 0 to samples - 1), or their ids ([M] int64). batch_size: samples a step, over all processes.
        seed: of the order, and of the augmentation. shuffle: a new order each epoch. drop_last: leave out an epoch's incomplete last batch.
        views: of each sample that stand side by side in a batch (of batch_size // views samples then).

    Raises:
        InputError: no samples, a batch size below 1 or no multiple of `views`, or one above the number of samples with `drop_last`.
    """

    def __init__(self, samples: int | Tensor, batch_size: int, seed: int, *, shuffle: bool = True, drop_last: bool = False, views: int = 1) -> None:
        self.indices = torch.arange(samples) if isinstance(samples, int) else samples
        self.batch_size, self.seed, self.shuffle, self.drop_last, self.views = batch_size, seed, shuffle, drop_last, views
        count = len(self.indices)
        if batch_size < 1 or count < 1:
            raise InputError(f"cannot cut {count} samples into batches of {batch_size}.", where="batch_size")
        if batch_size % views:
            raise InputError(f"a batch of {batch_size} cannot hold {views} views of each sample.", where="batch_size", fix=f"Use a multiple of {views}.")
        if drop_last and batch_size // views > count:
            fix = f"Use at most {count * views}."
            raise InputError(f"a batch of {batch_size // views} is more than the {count} samples there are.", where="batch_size", fix=fix)
        self.steps_per_epoch = self._passes(batch_size // views)
        self.switch: int | None = None
        self._order: tuple[int, Tensor] = (-1, self.indices)

    def end_single(self, passes: int, stop: int) -> None:
        """Over the last `passes` passes before step `stop`, batches hold batch_size samples with one view each."""
        self.switch = max(stop - passes * self._passes(self.batch_size), 0)

    def _passes(self, batch: int) -> int:
        count = len(self.indices)
        return max(count // batch, 1) if self.drop_last else -(-count // batch)

    def views_at(self, step: int) -> int:
        """Views of each sample in the batch of a step."""
        return self.views if self.switch is None or step < self.switch else 1

    def epoch(self, step: int) -> int:
        """Passes over the samples that were begun before a step's (from 0)."""
        return self._place(step)[0]

    def _place(self, step: int) -> tuple[int, int, int]:
        """Epoch, batch within it, samples a batch."""
        if self.switch is None or step < self.switch:
            return *divmod(step, self.steps_per_epoch), self.batch_size // self.views
        before = -(-self.switch // self.steps_per_epoch)
        epoch, place = divmod(step - self.switch, self._passes(self.batch_size))
        return before + epoch, place, self.batch_size

    def ids(self, step: int) -> tuple[int, Tensor]:
        """The epoch of a step (both from 0) and the ids of its global batch, [B] int64 (each once, however many views of it there are)."""
        epoch, place, size = self._place(step)
        if self.shuffle and self._order[0] != epoch:
            self._order = epoch, self.indices[torch.randperm(len(self.indices), generator=seeds.generator(self.seed, "order", epoch))]
        return epoch, self._order[1][place * size : (place + 1) * size]

    @property
    def smallest(self) -> int:
        """Samples in the smallest batch."""
        sizes = {self.batch_size // self.views} | (set() if self.switch is None else {self.batch_size})
        return min(size if self.drop_last else len(self.indices) - (self._passes(size) - 1) * size for size in sizes)


def stream(
    data: Data,
    plan: BatchPlan,
    *,
    augment: AugmentSpec | None,
    start: int,
    stop: int,
    num_classes: int,
    rank: int = 0,
    world: int = 1,
    micro: int = 1,
    workers: int = 0,
    views: Views | None = None,
    usable: Tensor | None = None,
) -> Generator[list[Batch], None, None]:
    """This process's share of every step from `start` to `stop` (not included), prepared and augmented, as micro-batches.

    The global batch is dealt out to `world` processes in turn (every world-th sample, from `rank`), then cut into at most `micro` parts, whose sizes
    differ by at most one. A sample's content depends on plan, seed, epoch and id only. With mixup or cutmix it depends on the sample's mate too, which
    is chosen within the global batch, so `batch_size` changes it and rank, world, micro, workers and start do not (a share that lacks the mates fetches
    them too). Dropping or closing the generator sends the workers home.

    Args:
        num_classes: width of soft targets. workers: processes that prepare batches ahead; 0: none.
        views: shows its views in place of `data` and `augment`. usable: [N, V] bool, which of them; None: all.

    Raises:
        InputError: at once, where the shortest batch cannot give every process its micro-batches; later, what `data.fetch` finds.
    """
    if not 0 <= rank < world or micro < 1 or workers < 0 or not 0 <= start <= stop:
        raise InputError(f"impossible: rank {rank} of {world}, {micro} micro-batches, {workers} workers, steps {start} to {stop}.", where="stream")
    if world > 1 and plan.smallest < world * micro:
        raise InputError(
            f"the shortest batch has {plan.smallest} samples, too few for {world} processes with {micro} micro-batches each.",
            where="batch_size",
            fix="Drop the last incomplete batch, or choose another batch size.",
        )
    shares = _Shares(data, plan, augment, num_classes, rank, world, views, usable)
    raw = ahead(shares, range(start, stop), workers)
    return (replace(share, inputs=data.prepare(share.inputs)).cut(micro) for share in raw)


def blank(plan: BatchPlan, *, start: int, stop: int, rank: int = 0, world: int = 1, micro: int = 1) -> Generator[list[Batch], None, None]:
    """As `stream`, for training without data: batches of the same sizes whose inputs are empty [B, 0], with the ids that stand for them."""
    for step in range(start, stop):
        ids_B = plan.ids(step)[1][rank::world]
        yield Batch(torch.empty(len(ids_B), 0), None, ids_B).cut(micro)


def evaluation_batches(data: Data, batch_size: int, indices: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """(prepared inputs [B, ...], targets [B] or None, ids [B]) over the data, or over `indices` ([M] int64), in order, without augmentation."""
    for ids_B in (torch.arange(len(data)) if indices is None else indices).split(batch_size):
        raw, targets = data.fetch(ids_B)
        yield data.prepare(raw), targets, ids_B


class _Shares(Dataset[Batch | InputError]):
    """Step → this process's share, augmented but still raw (uint8 is cheap to hand over); indexed by workers, who return an InputError as a value."""

    def __init__(
        self, data: Data, plan: BatchPlan, spec: AugmentSpec | None, num_classes: int, rank: int, world: int, views: Views | None, usable: Tensor | None
    ) -> None:
        self.data, self.plan, self.spec, self.num_classes = data, plan, spec, num_classes
        self.rank, self.world, self.views, self.usable = rank, world, views, usable

    def __getitem__(self, step: int) -> Batch | InputError:
        try:
            return self.share(step)
        except InputError as error:
            return InputError(error.what, where=error.where, fix=error.fix)

    def share(self, step: int) -> Batch:
        epoch, all_ids = self.plan.ids(step)
        ids_B = all_ids if self.world == 1 else all_ids[self.rank :: self.world]
        if self.views is not None:
            count = self.plan.views_at(step)
            return self.views.batch(ids_B, self.views.draw(ids_B, count=count, seed=self.plan.seed, epoch=epoch, usable=self.usable))
        if self.spec is not None and self.spec.mixes and self.world > 1:
            raw, targets = self._mixed_share(self.spec, epoch, all_ids, ids_B)
        else:
            raw, targets = self.data.fetch(ids_B, seed=self.plan.seed, epoch=epoch)
            if self.spec is not None:
                raw, targets = augmented(raw, targets, ids_B, spec=self.spec, seed=self.plan.seed, epoch=epoch, num_classes=self.num_classes)
        return Batch(raw, targets, ids_B)

    def _mixed_share(self, spec: AugmentSpec, epoch: int, all_ids: Tensor, ids_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """A share whose mates may be in another process's: fetched along with it."""
        own, seed = len(ids_B), self.plan.seed
        with_mates = torch.cat((ids_B, all_ids[mates(all_ids, seed=seed, epoch=epoch)[self.rank :: self.world]]))
        raw, targets = self.data.fetch(with_mates, seed=seed, epoch=epoch)
        raw = transform(raw, with_mates, spec=spec, seed=seed, epoch=epoch)
        soft = None if targets is None else soft_targets(targets, self.num_classes)
        ours, theirs = (None, None) if soft is None else (soft[:own], soft[own:])
        return blend(raw[:own], raw[own:], ours, theirs, ids_B, spec=spec, seed=seed, epoch=epoch)


def ahead(items: Dataset[Any], order: range, workers: int) -> Iterator[Any]:
    """`items[i]` for i in `order`, made ahead by worker processes (one thread each, as torch sets them up; none for 0), in order.

    Raises:
        InputError: what `items` gives as a value: an exception's fields do not survive the way out of a worker.
    """
    if workers and len(order):
        made: Any = DataLoader(
            items,
            batch_size=None,
            sampler=order,
            num_workers=min(workers, len(order)),
            collate_fn=_as_it_is,
            worker_init_fn=_settle_worker,
            generator=torch.Generator(),  # else torch would draw the workers' seed from the global generator
        )
    else:
        made = (items[i] for i in order)
    for item in made:
        if isinstance(item, InputError):
            raise item
        yield item


def _as_it_is(share: Any) -> Any:
    return share


def _settle_worker(worker: int) -> None:
    """Tie a worker's life to its parent's, and to nothing else: Ctrl-C or SIGTERM for the whole process group is the parent's to answer.

    A worker goes when its parent is gone (killed, say), or when the parent itself sends SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent, ppid = multiprocessing.parent_process(), os.getppid()
    waits = hasattr(signal, "sigtimedwait")  # Linux; elsewhere SIGTERM keeps its default
    if waits:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch() -> None:
        while os.getppid() == ppid and parent is not None and parent.is_alive():
            if not waits:
                time.sleep(0.5)
                continue
            caught = signal.sigtimedwait({signal.SIGTERM}, 0.5)
            if caught is not None and caught.si_pid == ppid:
                os._exit(0)
        shutil.rmtree(get_temp_dir(), ignore_errors=True)  # of the sockets through which tensors are handed over; no one else is left to do it
        os._exit(0)

    threading.Thread(target=watch, name="limbeck-watch", daemon=True).start()
