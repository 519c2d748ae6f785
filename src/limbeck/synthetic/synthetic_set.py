"""A synthetic set: images and targets that networks are trained on, with all that their use needs; limbeck's artefact of kind "dataset".

M images, U shared patterns, Q pairs of an image and a pattern, N = M + Q samples that a user trains on, C classes, c channels of h×w pixels.
Images are in network units (standardised or whitened, never clipped); pixels are in [0, 1]. A pair's sample is images[i] + patterns[u], clipped
to the pixels' range: INFER's compensated images (arXiv 2408.06927; our sheet `infer`, eqs. 1 and 5).
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from limbeck.contract import Data
from limbeck.data import Whitened, preprocessing, root
from limbeck.errors import InputError
from limbeck.files import write_atomic
from limbeck.synthetic.budget import index_bytes, label_bytes

Labels = Literal["hard", "soft", "vectors"]
"""hard: a class each; soft: C numbers each, logits or probabilities; vectors: d numbers each (KRR-ST's targets)."""
NO_STEP_SIZE = 0.01
"""What `step_size` holds where none was given."""
SLACK = 1e-3
"""How far real pixels may lie outside of [0, 1] (resizing overshoots a little)."""


class SyntheticSet(nn.Module):
    """Images to train on, as a module (so that it is saved, moved and trained like one) and as a PyTorch data set of N samples.

    Built by shapes, with zeros; `hard`, `soft`, `vectors` and `compensated` build it from tensors, which they copy.

    Args:
        count: M. num_classes: C. input_shape: of an image. labels: see `Labels`. dim: d of vectors. patterns: U. pairs: Q.
        whitened: whether images are ZCA-whitened, for which [c·h·w, c·h·w] numbers are kept. learns_step_size: whether a step size goes with the images.

    Attributes:
        images: Parameter [M, *input_shape] float32.
        targets: hard: buffer [M] int64, a pair takes its image's. soft and vectors: Parameter [N, C] or [N, d] float32, which learns only as "vectors".
        step_size: Parameter [], the learning rate of SGD that goes with the images; of no meaning without `learns_step_size`, see `learned_step_size`.
        patterns: Parameter [U, *input_shape]. pair_image, pair_pattern: buffers [Q] int64.
        mean, std: buffers [c]: pixels = x · std + mean where not whitened.
        zca_mean [D], zca_matrix [D, D]: x = (pixels − zca_mean) @ zca_matrix where whitened, else empty.

    Raises:
        InputError: a size is out of range, or whitened images have patterns.
    """

    targets: Tensor
    pair_image: Tensor
    pair_pattern: Tensor
    mean: Tensor
    std: Tensor
    zca_mean: Tensor
    zca_matrix: Tensor

    def __init__(
        self,
        count: int,
        num_classes: int,
        input_shape: Sequence[int],
        labels: Labels = "hard",
        *,
        dim: int = 0,
        patterns: int = 0,
        pairs: int = 0,
        whitened: bool = False,
        learns_step_size: bool = False,
    ) -> None:
        super().__init__()
        if labels not in ("hard", "soft", "vectors"):
            raise InputError(f"labels are 'hard', 'soft' or 'vectors', not '{labels}'.", where="labels")
        if count < 1 or num_classes < 1 or not input_shape or min(input_shape) < 1:
            raise InputError(f"a set of {count} images of shape {list(input_shape)} and {num_classes} classes cannot be.", where="count")
        if (labels == "vectors") != (dim > 0) or dim < 0:
            raise InputError(f"'dim' is the length of target vectors, and of nothing else; it is {dim} with labels '{labels}'.", where="dim")
        if patterns < 0 or pairs < 0 or (pairs > 0) != (patterns > 0):
            raise InputError(f"there are {patterns} patterns and {pairs} pairs.", where="pairs", fix="Pair every pattern with an image at least.")
        if patterns and whitened:
            raise InputError("patterns are added to standardised images, not to whitened ones.", where="whitened", fix="Leave out data.whitening.")
        self.num_classes, self.input_shape, self.labels = num_classes, tuple(int(side) for side in input_shape), labels
        self.whitened, self.learns_step_size = whitened, learns_step_size
        self.images = nn.Parameter(torch.zeros(count, *self.input_shape))
        self.patterns = nn.Parameter(torch.zeros(patterns, *self.input_shape))
        self.step_size = nn.Parameter(torch.tensor(NO_STEP_SIZE))
        if labels == "hard":
            self.register_buffer("targets", torch.zeros(count, dtype=torch.int64))
        else:
            self.targets = nn.Parameter(torch.zeros(count + pairs, dim or num_classes), requires_grad=labels == "vectors")
        self.register_buffer("pair_image", torch.zeros(pairs, dtype=torch.int64))
        self.register_buffer("pair_pattern", torch.zeros(pairs, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(self.input_shape[0]))
        self.register_buffer("std", torch.ones(self.input_shape[0]))
        size = math.prod(self.input_shape) if whitened else 0
        self.register_buffer("zca_mean", torch.zeros(size))
        self.register_buffer("zca_matrix", torch.eye(size))

    # ---- from tensors ---------------------------------------------------------------------------------------------

    @classmethod
    def hard(cls, images: Tensor, labels: Tensor, num_classes: int, step_size: float | None = None, *, data: Data | None = None) -> SyntheticSet:
        """From images [M, ...] in network units and classes [M] int64.

        Args:
            step_size: of SGD, where one goes with the images, to be learned or used; None: none does.
            data: where the images are from, which says how they were standardised or whitened; None: network units are pixels.

        Raises:
            InputError: a shape, class or number is wrong.
        """
        return cls._of(images, labels, num_classes, "hard", step_size, data)

    @classmethod
    def soft(cls, images: Tensor, targets: Tensor, step_size: float | None = None, *, data: Data | None = None) -> SyntheticSet:
        """From images [M, ...] and logits or probabilities [M, C]. The rest as in `hard`."""
        return cls._of(images, targets, 0, "soft", step_size, data)

    @classmethod
    def vectors(cls, images: Tensor, targets: Tensor, step_size: float | None = None, *, num_classes: int = 1, data: Data | None = None) -> SyntheticSet:
        """From images [M, ...] and vectors [M, d] that are learned with them (KRR-ST). The rest as in `hard`."""
        return cls._of(images, targets, num_classes, "vectors", step_size, data)

    @classmethod
    def compensated(
        cls,
        images: Tensor,
        labels: Tensor,
        num_classes: int,
        patterns: Tensor,
        pair_image: Tensor,
        pair_pattern: Tensor,
        step_size: float | None = None,
        *,
        data: Data | None = None,
    ) -> SyntheticSet:
        """From images [M, ...], classes [M], patterns [U, ...], and the pairs [Q] int64 that make images[pair_image] + patterns[pair_pattern].

        Soft labels of all N samples are given afterwards, see `relabelled`.

        Raises:
            InputError: as `hard`; a pair names what there is not; or images lie outside of the pixels' range, which clipping would change.
        """
        if patterns.shape[1:] != images.shape[1:] or len(patterns) == 0:
            raise InputError(f"patterns of shape {list(patterns.shape)} do not fit images of shape {list(images.shape)}.", where="patterns")
        for name, index, size in (("pair_image", pair_image, len(images)), ("pair_pattern", pair_pattern, len(patterns))):
            if (
                index.dim() != 1
                or len(index) != len(pair_image)
                or len(index) == 0
                or index.is_floating_point()
                or int(index.min()) < 0
                or int(index.max()) >= size
            ):
                raise InputError(f"'{name}' must be as many places below {size} as there are pairs.", where=name)
        found = cls._of(images, labels, num_classes, "hard", step_size, data, patterns=len(patterns), pairs=len(pair_image))
        with torch.no_grad():
            found.patterns.copy_(patterns)
        found.pair_image.copy_(pair_image)
        found.pair_pattern.copy_(pair_pattern)
        outside = (found.images - found.clipped(found.images)).abs().amax((0, *range(2, images.dim()))) * found.std
        if bool((outside > SLACK).any()):
            raise InputError("the images are no pixels in [0, 1] once standardisation is undone.", where="images", fix="Give real images, and their data.")
        return found

    @classmethod
    def _of(
        cls, images: Tensor, targets: Tensor, num_classes: int, labels: Labels, step_size: float | None, data: Data | None, *, patterns: int = 0, pairs: int = 0
    ) -> SyntheticSet:
        if images.dim() < 2 or not images.is_floating_point() or len(images) == 0:
            raise InputError(f"images must be floats [M, ...], these are {images.dtype} {list(images.shape)}.", where="images")
        if labels == "hard":
            if targets.dim() != 1 or targets.is_floating_point() or targets.dtype == torch.bool:
                raise InputError(f"hard labels are [M] whole numbers, these are {targets.dtype} {list(targets.shape)}.", where="labels")
            if len(targets) and (int(targets.min()) < 0 or int(targets.max()) >= num_classes):
                raise InputError(f"labels run from {int(targets.min())} to {int(targets.max())}, but there are {num_classes} classes.", where="labels")
        elif targets.dim() != 2 or not targets.is_floating_point():
            raise InputError(f"targets are floats [M, numbers], these are {targets.dtype} {list(targets.shape)}.", where="targets")
        if len(targets) != len(images):
            raise InputError(f"there are {len(images)} images and {len(targets)} targets.", where="targets")
        if step_size is not None and not (math.isfinite(step_size) and step_size > 0):
            raise InputError(f"the step size is {step_size}.", where="step_size", fix="It must be above 0.")
        whitening = root(data) if data is not None else None
        whitened = isinstance(whitening, Whitened)
        dim = targets.shape[1] if labels == "vectors" else 0
        classes = targets.shape[1] if labels == "soft" else num_classes
        found = cls(
            len(images), classes, images.shape[1:], labels,
            dim=dim, patterns=patterns, pairs=pairs, whitened=whitened, learns_step_size=step_size is not None,
        ).to(images.device)  # fmt: skip
        with torch.no_grad():
            found.images.copy_(images)
            found.targets.copy_(targets)
            found.step_size.fill_(NO_STEP_SIZE if step_size is None else step_size)
            if isinstance(whitening, Whitened):
                found.zca_mean.copy_(whitening.zca.mean)
                found.zca_matrix.copy_(whitening.zca.matrix)
            elif data is not None:
                said: dict[str, Any] = dict(preprocessing(data))
                found.mean.copy_(torch.tensor(tuple(said.get("mean") or (0.0,))))
                found.std.copy_(torch.tensor(tuple(said.get("std") or (1.0,))))
        return found

    def relabelled(self, targets: Tensor) -> SyntheticSet:
        """A copy with soft labels [N, C] of all samples, logits or probabilities. Raises InputError: of another shape."""
        if tuple(targets.shape) != (len(self), self.num_classes) or not targets.is_floating_point():
            raise InputError(f"soft labels of {len(self)} samples and {self.num_classes} classes are not {list(targets.shape)}.", where="targets")
        found = SyntheticSet(
            len(self.images), self.num_classes, self.input_shape, "soft",
            patterns=len(self.patterns), pairs=len(self.pair_image), whitened=self.whitened, learns_step_size=self.learns_step_size,
        ).to(self.images.device)  # fmt: skip
        found.load_state_dict(self.state_dict() | {"targets": targets})
        return found

    @property
    def arguments(self) -> dict[str, Any]:
        """What `synthetic_set` builds the same shapes from, as JSON values."""
        return {
            "count": len(self.images), "num_classes": self.num_classes, "input_shape": list(self.input_shape), "labels": self.labels,
            "dim": self.targets.shape[1] if self.labels == "vectors" else 0, "patterns": len(self.patterns), "pairs": len(self.pair_image),
            "whitened": self.whitened, "learns_step_size": self.learns_step_size,
        }  # fmt: skip

    @property
    def learned_step_size(self) -> float | None:
        """The learning rate of SGD that goes with the images; None: a recipe's own is to be taken."""
        return float(self.step_size.detach()) if self.learns_step_size else None

    # ---- what a user trains on ------------------------------------------------------------------------------------

    def clipped(self, images: Tensor) -> Tensor:
        """Images [B, c, ...] in network units, kept to pixels in [0, 1] (standardised ones only)."""
        shape = (-1, *[1] * (len(self.input_shape) - 1))
        return torch.minimum(torch.maximum(images, (-self.mean / self.std).view(shape)), ((1 - self.mean) / self.std).view(shape))

    def expanded(self) -> tuple[Tensor, Tensor]:
        """The N samples in network units [N, ...] and their targets: the M images as they are, then those of the pairs, clipped. With gradient."""
        if not len(self.pair_image):
            return self.images, self.targets
        made = self.clipped(self.images[self.pair_image] + self.patterns[self.pair_pattern])
        targets = torch.cat((self.targets, self.targets[self.pair_image])) if self.labels == "hard" else self.targets
        return torch.cat((self.images, made)), targets

    def dataset(self) -> TensorDataset:
        """The N samples and their targets, without gradient, for any PyTorch loop."""
        with torch.no_grad():
            return TensorDataset(*(tensor.detach().clone() for tensor in self.expanded()))

    def __len__(self) -> int:
        """N."""
        return len(self.images) + len(self.pair_image)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Sample and target number `index`, as in `expanded`, without gradient."""
        count, total = len(self.images), len(self)
        if not -total <= index < total:
            raise IndexError(f"sample {index} of a set of {total}")
        index %= total
        if index < count:
            return self.images[index].detach(), self.targets[index].detach()
        image = self.pair_image[index - count]
        with torch.no_grad():
            made = self.clipped((self.images[image] + self.patterns[self.pair_pattern[index - count]])[None])[0]
        return made, self.targets[image if self.labels == "hard" else index].detach()

    def forward(self, *_: Tensor) -> Tensor:
        """A set answers nothing. Raises InputError, always."""
        raise InputError("a synthetic set is data to train on, not a network.", fix="Use its dataset(), or expanded(), in a training loop.")

    # ---- pixels ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def to_pixels(self, images: Tensor) -> Tensor:
        """Images [B, *input_shape] in network units → pixels in [0, 1], clipped, for showing."""
        if self.whitened:
            flat = images.flatten(1).double()
            raw = (torch.linalg.solve(self.zca_matrix.to(flat).T, flat.T).T + self.zca_mean.to(flat)).to(images.dtype).view_as(images)
        else:
            shape = (-1, *[1] * (images.dim() - 2))
            raw = images * self.std.to(images).view(shape) + self.mean.to(images).view(shape)
        return raw.clamp(0, 1)

    def prepare(self, pixels: Tensor) -> Tensor:
        """Pixels [B, *input_shape] in [0, 1] → network units [B, *input_shape]: what real images must go through before a network trained on the set."""
        if self.whitened:
            return ((pixels.flatten(1) - self.zca_mean.to(pixels)) @ self.zca_matrix.to(pixels)).view_as(pixels)
        shape = (-1, *[1] * (pixels.dim() - 2))
        return (pixels - self.mean.to(pixels).view(shape)) / self.std.to(pixels).view(shape)

    def bytes(self) -> dict[str, int]:
        """Bytes of each part, those that are there, by E7 of our sheet: float32 numbers, hard labels and pairs in the least whole bytes each."""
        targets = label_bytes(len(self.images), self.num_classes) if self.labels == "hard" else 4 * self.targets.numel()
        pairs = len(self.pair_image) * (index_bytes(len(self.images)) + index_bytes(len(self.patterns)))
        parts = {
            "images": 4 * self.images.numel(), "labels": targets, "patterns": 4 * self.patterns.numel(), "pairs": pairs, "step_size": 4,
            "preprocessing": 4 * (self.mean.numel() + self.std.numel()), "whitening": 4 * (self.zca_mean.numel() + self.zca_matrix.numel()),
        }  # fmt: skip
        return {name: size for name, size in parts.items() if size}

    @property
    def shows(self) -> bool:
        """Whether inputs are images of one or three channels, which `grid` takes."""
        return len(self.input_shape) == 3 and self.input_shape[0] in (1, 3)

    def grid(self, per_class: int = 10, border: int = 1) -> Tensor:
        """[H, W, 3] uint8: a row a class, its first samples from left to right; without classes, rows of `per_class`.

        Raises:
            InputError: the inputs are no images of one or three channels.
        """
        if not self.shows:
            raise InputError(f"inputs of shape {list(self.input_shape)} cannot be shown as pictures.", where="input_shape")
        if per_class < 1 or border < 0:
            raise InputError(f"{per_class} images a row with a border of {border} pixels cannot be shown.", where="per_class")
        images, targets = (tensor.detach().cpu() for tensor in self.expanded())
        if self.labels == "vectors":
            rows = list(torch.arange(len(images)).split(per_class))
        else:
            classes = targets if self.labels == "hard" else targets.argmax(1)
            rows = [found[:per_class] for k in range(self.num_classes) if len(found := (classes == k).nonzero()[:, 0])]
        channels, height, width = self.input_shape
        columns = max(len(row) for row in rows)
        picture = torch.ones(3, len(rows) * (height + border) + border, columns * (width + border) + border)
        pixels = self.to_pixels(images.to(self.images.device)).cpu()
        for r, row in enumerate(rows):
            for k, place in enumerate(row.tolist()):
                top, left = r * (height + border) + border, k * (width + border) + border
                picture[:, top : top + height, left : left + width] = pixels[place].expand(3, -1, -1) if channels == 1 else pixels[place]
        return (picture * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()

    def save_png(self, path: Path | str, per_class: int = 10, magnify: int = 1) -> Path:
        """`grid` as a PNG file, whole or absent, every pixel `magnify`² pixels. Raises InputError as `grid`."""
        from PIL import Image

        if magnify < 1:
            raise InputError(f"'magnify' is {magnify}.", where="magnify", fix="Use 1 or more.")
        picture = self.grid(per_class).repeat_interleave(magnify, 0).repeat_interleave(magnify, 1)
        content = io.BytesIO()
        Image.fromarray(picture.numpy()).save(content, format="PNG")
        write_atomic(path, content.getvalue())
        return Path(path)


def synthetic_set(
    count: int,
    num_classes: int,
    input_shape: Sequence[int],
    labels: Labels = "hard",
    dim: int = 0,
    patterns: int = 0,
    pairs: int = 0,
    whitened: bool = False,
    learns_step_size: bool = False,
) -> SyntheticSet:
    """A set of zeros of these shapes, as artefacts of kind 'dataset' name it; see `SyntheticSet`.

    Raises:
        InputError: a size is out of range.
    """
    return SyntheticSet(count, num_classes, input_shape, labels, dim=dim, patterns=patterns, pairs=pairs, whitened=whitened, learns_step_size=learns_step_size)
