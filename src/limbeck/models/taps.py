"""Feature taps: what named submodules return, collected while a network runs (public as `limbeck.taps`).

with taps.tap(network, ["layer2", "layer3.0.conv1"]) as features:
    logits = network(x)
loss = (features["layer2"] - target).square().mean()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from limbeck.errors import InputError, suggestion


class Features(Mapping[str, Tensor]):
    """Outputs of the tapped modules by path; those that have run so far, in the order of their last run."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, int]] = {}

    def __getitem__(self, path: str) -> Tensor:
        """The output of the module at `path`.

        Raises:
            InputError: it has not run, or an in-place operation after it (often ReLU(inplace=True)) has overwritten its output.
        """
        if path not in self._kept:
            raise InputError(f"the module '{path}' has not run, or is not tapped.", where=path, fix=suggestion(path, self._kept))
        kept, version = self._kept[path]
        if _version(kept) != version:
            raise InputError(
                f"an in-place operation overwrote the output of '{path}' after it was returned.",
                where=path,
                fix="Tap the module that did it (the ReLU, or the block around it), or build that one without inplace=True.",
            )
        return kept

    def __contains__(self, path: object) -> bool:
        return path in self._kept

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def _keep(self, path: str, output: Tensor) -> None:
        self._kept.pop(path, None)
        self._kept[path] = (output, _version(output))


@contextmanager
def tap(module: nn.Module, paths: str | Sequence[str], *, detach: bool = False) -> Iterator[Features]:
    """Collect what the submodules at `paths` return while the `with` block runs.

    The features stay readable after the block; the hooks go at its end, also on an exception. Gradients flow through the features.
    A module that runs more than once keeps its last output. Of a tuple or list the first element is kept (hidden states), of an object its
    `last_hidden_state`. Works under `torch.func.functional_call`, and taps may be nested.

    Args:
        module: the network that will be called. paths: as in `paths(module)`; one path or several.
        detach: keep the features without their graph.

    Raises:
        InputError: a path does not exist (with the nearest ones); a tapped module returned no tensor.
    """
    features = Features()
    modules = dict(module.named_modules(remove_duplicate=False))
    with ExitStack() as hooks:
        for path in [paths] if isinstance(paths, str) else paths:
            if path not in modules or not path:
                raise _unknown(path, module, modules)

            def keep(_module: nn.Module, _args: Any, output: Any, path: str = path) -> None:
                found = _tensor(output, path)
                features._keep(path, found.detach() if detach else found)

            hooks.callback(modules[path].register_forward_hook(keep).remove)
        yield features


def paths(module: nn.Module) -> list[str]:
    """The paths of all submodules, outer before inner, as `tap` takes them; a module used in two places has two."""
    return [name for name, _ in module.named_modules(remove_duplicate=False) if name]


def _tensor(output: Any, path: str) -> Tensor:
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    found = getattr(output, "last_hidden_state", output)
    if not isinstance(found, Tensor):
        raise InputError(f"the module '{path}' returned {type(output).__name__}, not a tensor.", where=path, fix="Tap a module inside it.")
    return found


def _version(tensor: Tensor) -> int:
    """How often the tensor was written to in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _unknown(path: str, module: nn.Module, known: Mapping[str, nn.Module]) -> InputError:
    """Says where the path leaves the network, and what there is."""
    deepest = path
    while deepest not in known:
        deepest = deepest.rpartition(".")[0]
    inside = [name for name, _ in known[deepest].named_children()]
    shown = ", ".join(inside[:12]) + (", …" if len(inside) > 12 else "") or "nothing"
    near = suggestion(path, [name for name in known if name])
    did_you = f"{near} " if near.startswith("Did you mean") else ""
    return InputError(
        f"{type(module).__name__} has no module '{path}'.", where="paths", fix=f"{did_you}{f'Inside {deepest!r}' if deepest else 'At the top'}: {shown}."
    )
