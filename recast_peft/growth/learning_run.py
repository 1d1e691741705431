"""The training loop of learn_bank: mixed batches of a pool's tasks, and checkpoints from which it goes on exactly."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import RecastConfigError, RecastLoadError
from ..mimicry.features import call_arguments, device_of
from ..pool.task_pool import TaskPool

FORMAT = 1
WARM_UP = 0.1  # share of the steps in which the learning rates rise; after it they fall as a cosine does
MAX_NORM = 1.0  # to which the gradient is clipped (paper, appendix)


@dataclass(frozen=True)
class LearningRates:
    """Learning rates of Adam.

    Attributes:
        head: of classifiers.
        coefficient: of coefficients.
        template: of templates, in units of their own root mean square.
    """

    head: float = 1e-2
    coefficient: float = 0.05
    template: float = 0.05


class LearningRun:
    """One run: what is trained, by which batches, and how far it is.

    Args:
        model: with the pool.
        pool: of the tasks.
        templates: tensors that are trained.
        batches: of ``(inputs, labels, task)``.
        rates: learning rates.
        loss: of the model's output and the labels.
        identity: what makes it this run and no other; a checkpoint of another one is refused.
    """

    def __init__(
        self,
        model: PeftModel,
        pool: TaskPool,
        templates: Sequence[Tensor],
        batches: Iterable[Any],
        rates: LearningRates,
        loss: Callable[[Any, Tensor], Tensor],
        identity: Mapping[str, Any],
    ) -> None:
        self.model, self.pool, self.batches, self.loss = model, pool, batches, loss
        self.names = list(pool)
        table, *heads = pool.requires_grad_().parameters()
        self.rates = [rates.coefficient] + [rates.template * _size(t) for t in templates] + [rates.head] * bool(heads)
        groups: list[list[Tensor]] = [[table], *([t] for t in templates)]
        if heads:
            groups.append([*heads])
        self.trained = [tensor for group in groups for tensor in group]
        self.optimizer = torch.optim.Adam([{"params": group} for group in groups])
        self.identity = {**identity, "rates": asdict(rates), "tasks": self.names}
        self.steps = 0
        self.losses: list[float] = []
        self.position = 0  # batches taken since they were begun last
        self.began: dict[str, Tensor] = {}  # random states when they were begun last

    def train(self, steps: int | None, checkpoint: str | Path | None, every: int, progress: bool) -> list[float]:
        """Train to the last step, from a checkpoint if there is one.

        Returns:
            the loss of every step.
        """
        self.steps = self._count(steps, every)
        path = None if checkpoint is None else Path(checkpoint)
        resumed = path is not None and path.is_file()
        if path is not None and resumed:
            self._restore(path)
        self.model.train()
        done = len(self.losses)
        bar = tqdm(total=self.steps, initial=done, desc="learning a bank", disable=not progress, leave=False)
        with bar:
            for batch in self._stream(resumed):
                self._step(batch)
                bar.update()
                if path is not None and (len(self.losses) % every == 0 or len(self.losses) == self.steps):
                    self._save(path)
        self.model.eval()
        self.pool.requires_grad_(False)
        return self.losses

    def _count(self, steps: int | None, every: int) -> int:
        if steps is None:
            if not hasattr(self.batches, "__len__"):
                raise RecastConfigError("batches do not say how many they are: give steps=, the number of optimisation steps")
            steps = len(self.batches)  # type: ignore[arg-type]
        for name, value in (("steps", steps), ("checkpoint_every", every)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RecastConfigError(f"{name}={value!r}: expected a whole number of at least 1")
        return steps

    # ---------------------------------------------------------------- steps

    def _stream(self, resumed: bool) -> Iterator[Any]:
        """The batches up to the last step, begun again when they end."""
        if resumed and len(self.losses) < self.steps:
            now = _random_states(self.batches)
            _set_random_states(self.began, self.batches)
            again = iter(self.batches)
            for place in range(self.position):
                if next(again, None) is None:
                    raise RecastConfigError(f"the checkpoint has seen {self.position} batches, and now there are {place}")
            _set_random_states({"torch": now["torch"]}, self.batches)
            yield from self._rest(again)
        while len(self.losses) < self.steps:
            self.began, self.position = _random_states(self.batches), 0
            yield from self._rest(iter(self.batches))
            if not self.position:
                raise RecastConfigError(
                    f"batches ended after {len(self.losses)} of {self.steps} steps and cannot be begun again: give a list, a "
                    "DataLoader, or fewer steps"
                )

    def _rest(self, iterator: Iterator[Any]) -> Iterator[Any]:
        for batch in iterator:
            self.position += 1
            yield batch
            if len(self.losses) == self.steps:
                return

    def _step(self, batch: Any) -> None:
        if not isinstance(batch, (tuple, list)) or len(batch) != 3:
            raise RecastConfigError(f"a batch is (inputs, labels, task), not {type(batch).__name__} of another form")
        inputs, labels, task = batch
        device = device_of(self.model)
        labels = torch.as_tensor(labels).to(device)
        args, kwargs = call_arguments(inputs, device)
        step = len(self.losses)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._factor(step)
        self.optimizer.zero_grad()
        value = self.loss(self.model(*args, **kwargs, task_ids=self._ids(task, len(labels)).to(device)), labels)
        value.backward()
        nn.utils.clip_grad_norm_(self.trained, MAX_NORM)
        self.optimizer.step()
        self.losses.append(float(value.detach()))

    def _factor(self, step: int) -> float:
        warm_up = max(1, int(WARM_UP * self.steps))
        return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def _ids(self, task: Any, samples: int) -> Tensor:
        """Rows of the pool; tasks were put in in the order of their names."""
        if isinstance(task, Tensor):
            ids = task.reshape(-1).long()
        else:
            names = [task] * samples if isinstance(task, str) else list(task)
            unknown = [name for name in names if name not in self.names]
            if unknown:
                raise RecastConfigError(f"a batch names the task {unknown[0]!r}; the tasks are {', '.join(self.names)}")
            ids = self.pool.ids(names)
        if len(ids) != samples or not bool(((ids >= 0) & (ids < len(self.names))).all()):
            raise RecastConfigError(
                f"the tasks of a batch do not fit it\n  samples: {samples}\n  tasks:   {ids.tolist()}\n"
                f"Expected a name, a name for each sample, or a number from 0 to {len(self.names) - 1} for each."
            )
        return ids

    # ---------------------------------------------------------------- checkpoints

    def _save(self, path: Path) -> None:
        content = {
            "format": FORMAT,
            "identity": {**self.identity, "steps": self.steps},
            "trained": [tensor.detach().cpu() for tensor in self.trained],
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "position": self.position,
            "began": self.began,
            "now": _random_states(self.batches)["torch"],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        torch.save(content, part)
        os.replace(part, path)  # a run that ends while it writes leaves the checkpoint before whole

    def _restore(self, path: Path) -> None:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            found = content["identity"]
        except Exception as error:
            raise RecastLoadError(f"{path} is no checkpoint of learn_bank, or is damaged: {error}") from error
        own = {**self.identity, "steps": self.steps}
        differ = [key for key in own if found.get(key) != own[key]]
        if content["format"] != FORMAT or differ:
            which = differ[0] if differ else "format"
            raise RecastLoadError(
                f"the checkpoint {path} belongs to another run: {which} differs\n  in the checkpoint: {found.get(which)}\n"
                f"  of this run:       {own.get(which)}\nGive another checkpoint, or delete it to begin again."
            )
        with torch.no_grad():
            for tensor, value in zip(self.trained, content["trained"], strict=True):
                tensor.copy_(value)
        self.optimizer.load_state_dict(content["optimizer"])
        self.losses, self.position, self.began = list(content["losses"]), content["position"], content["began"]
        torch.set_rng_state(content["now"])


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt())


def _random_states(batches: Iterable[Any]) -> dict[str, Tensor]:
    """States of torch's global generator, and of the one that a DataLoader shuffles by."""
    states = {"torch": torch.get_rng_state()}
    own = getattr(batches, "generator", None)
    if isinstance(own, torch.Generator):
        states["batches"] = own.get_state()
    return states


def _set_random_states(states: Mapping[str, Tensor], batches: Iterable[Any]) -> None:
    torch.set_rng_state(states["torch"])
    if "batches" in states:
        batches.generator.set_state(states["batches"])  # type: ignore[attr-defined]
