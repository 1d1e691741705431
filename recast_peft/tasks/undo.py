"""Wholly or not at all: what a model is made of, noted before a change and put back if the change fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..names import modules_of


class Snapshot:
    """The modules of a model as they are: their children, parameters, hooks and lists, and which parameters are trained.

    No tensor is copied: what is written into one stays written. What is noted keeps weights alive that a change releases.
    """

    def __init__(self, model: nn.Module) -> None:
        # the attributes of each module, with copies of those that are changed in place
        self._modules = [
            (module, {key: (held, _content(held)) for key, held in vars(module).items()})
            for module in modules_of(model, nn.Module)
        ]
        self._trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Put everything back."""
        for module, noted in self._modules:
            state = vars(module)
            for key in [key for key in state if key not in noted]:
                del state[key]
            for key, (held, content) in noted.items():
                _put_back(held, content)
                state[key] = held
        for parameter, requires_grad in self._trained:
            if parameter.requires_grad != requires_grad:  # a lazy parameter cannot be asked to
                parameter.requires_grad_(requires_grad)


def _content(held: Any) -> Any:
    return next((kind(held) for kind in (dict, list, set) if isinstance(held, kind)), None)


def _put_back(held: Any, content: Any) -> None:
    if isinstance(held, dict) and [*held] == [*content] and all(held[key] is content[key] for key in content):
        return  # a dictionary may refuse to be written to, as those of diffusers do
    if isinstance(held, (dict, set)):
        held.clear()
        held.update(content)
    elif isinstance(held, list):
        held[:] = content


@contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[Snapshot]:
    """A block whose failure leaves a model as it was before."""
    snapshot = Snapshot(model)
    try:
        yield snapshot
    except BaseException:
        snapshot.restore()
        raise
