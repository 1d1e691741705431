"""Tasks learned one after the other: the accuracy matrix, and what is read off it.

``R[i, j]`` is the accuracy on task j after task i was learned (both counted from 0 here, from 1 in the papers). Definitions:

- Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017 (arXiv 1706.08840), section 2, for R,
  the average accuracy, backward transfer and forward transfer;
- Chaudhry, Dokania, Ajanthan and Torr, "Riemannian Walk for Incremental Learning", ECCV 2018 (arXiv 1801.10112),
  for forgetting.

RECAST's tasks own their numbers, so that backward transfer and forgetting are zero by construction; these functions are how one
checks it, and how one compares with methods that forget.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..auto import get_recast_model
from ..banks.files import StoredBank
from ..config import RecastConfig
from ..errors import RecastConfigError, RecastSequenceError
from ..growth.biases import grow_bias_bank
from ..growth.sources import Source
from ..growth.weights import extend_bank, grow_bank
from ..layer import RecastLayer
from ..names import check_adapter_name
from ..parts import BiasConfig

# ---------------------------------------------------------------- pure functions


def average_accuracy(matrix: ArrayLike, after: int | None = None) -> float:
    """Mean accuracy on the tasks learned so far: ``ACC = 1/T sum_j R[T-1, j]`` (Lopez-Paz and Ranzato).

    Args:
        matrix: R, ``(tasks, tasks)``; entries that are not needed may be NaN.
        after: the task after which it is taken; None is the last one.

    Raises:
        RecastSequenceError: if the matrix is not square, or lacks an entry that is needed.
    """
    R, last = _checked(matrix, after)
    return float(_entries(R, [(last, j) for j in range(last + 1)]).mean())


def backward_transfer(matrix: ArrayLike, after: int | None = None) -> float:
    """What later tasks did to earlier ones: ``BWT = 1/(T-1) sum_{j<T-1} (R[T-1, j] - R[j, j])``.

    Negative where tasks were forgotten (Lopez-Paz and Ranzato). Arguments and errors as for
    :func:`average_accuracy`; at least two tasks are needed.
    """
    R, last = _checked(matrix, after, at_least=2)
    now = _entries(R, [(last, j) for j in range(last)])
    then = _entries(R, [(j, j) for j in range(last)])
    return float((now - then).mean())


def forward_transfer(matrix: ArrayLike, baseline: ArrayLike, after: int | None = None) -> float:
    """What earlier tasks did for later ones: ``FWT = 1/(T-1) sum_{j>=1} (R[j-1, j] - b[j])``.

    Lopez-Paz and Ranzato: the accuracy on a task just before it is learned, above that of a model that has learned
    nothing.

    Args:
        matrix: R, ``(tasks, tasks)``, with the entries right above the diagonal.
        baseline: b, ``(tasks,)``: accuracies before anything was learned (the paper's random initialisation; for adapters, the
            pretrained model).
        after: the last task that is counted; None is the last one.

    Raises:
        RecastSequenceError: as for :func:`average_accuracy`; at least two tasks are needed.
    """
    R, last = _checked(matrix, after, at_least=2)
    b = np.asarray(baseline, dtype=float)
    if b.shape != (len(R),):
        raise RecastSequenceError(
            f"baseline has another length than there are tasks\n  tasks:    {len(R)}\n  baseline: {tuple(b.shape)}"
        )
    missing = [j for j in range(1, last + 1) if not np.isfinite(b[j])]
    if missing:
        raise RecastSequenceError(f"baseline lacks the accuracy on task {missing[0]} before anything was learned")
    return float((_entries(R, [(j - 1, j) for j in range(1, last + 1)]) - b[1 : last + 1]).mean())


def forgetting(matrix: ArrayLike, after: int | None = None) -> float:
    """How far accuracies fell from their best: ``F = 1/(k-1) sum_{j<k-1} (max_{l<k-1} R[l, j] - R[k-1, j])``.

    Chaudhry et al.: the maximum goes over all states before the present one. Entries of it that were not measured
    (NaN, usually those before a task was learned) are left out; ``R[j, j]`` must be there. Negative where a task got better
    than it ever was. Arguments and errors as for :func:`average_accuracy`; at least two tasks are needed.
    """
    R, last = _checked(matrix, after, at_least=2)
    now = _entries(R, [(last, j) for j in range(last)])
    _entries(R, [(j, j) for j in range(last)])
    return float((np.nanmax(R[:last, :last], axis=0) - now).mean())


def _checked(matrix: ArrayLike, after: int | None, at_least: int = 1) -> tuple[NDArray[np.float64], int]:
    R = np.asarray(matrix, dtype=np.float64)
    if R.ndim != 2 or R.shape[0] != R.shape[1] or not len(R):
        raise RecastSequenceError(f"an accuracy matrix is square, with a row and a column for each task; given: {R.shape}")
    last = len(R) - 1 if after is None else after
    if not 0 <= last < len(R):
        raise RecastSequenceError(f"after={after}: expected the number of a task, 0 to {len(R) - 1}")
    if last + 1 < at_least:
        raise RecastSequenceError(f"{at_least} tasks must have been learned, not {last + 1}: there is nothing to compare yet")
    return R, last


def _entries(R: NDArray[np.float64], places: list[tuple[int, int]]) -> NDArray[np.float64]:
    missing = [f"R[{i}, {j}]" for i, j in places if not np.isfinite(R[i, j])]
    if missing:
        raise RecastSequenceError(f"the accuracy matrix lacks {', '.join(missing[:6])}{', ...' if len(missing) > 6 else ''}")
    return np.array([R[i, j] for i, j in places])


# ---------------------------------------------------------------- the matrix


class AccuracyMatrix:
    """The accuracy on every task after every task, by their names; ``print(matrix)`` shows it as a table.

    Args:
        tasks: names in the order of learning.

    Attributes:
        tasks: those names.
        values: R, ``(tasks, tasks)``; NaN where nothing was recorded.
        baseline: b, ``(tasks,)``: accuracies before anything was learned; NaN where nothing was recorded.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        if isinstance(tasks, str) or not tasks or len(set(tasks)) < len(tasks):
            raise RecastSequenceError(f"tasks={tasks!r}: expected names that differ, at least one")
        self.tasks = tuple(tasks)
        self.values = np.full((len(self.tasks), len(self.tasks)), np.nan)
        self.baseline = np.full(len(self.tasks), np.nan)

    def record(self, after: str | None, task: str, accuracy: float) -> None:
        """Put an accuracy in its place.

        Args:
            after: the task that was learned last; None before the first one.
            task: that was evaluated.
            accuracy: any finite number (a share or a percentage, the same for all).

        Raises:
            RecastSequenceError: if there is no such task, or the accuracy is not finite.
        """
        value = float(accuracy)
        if not np.isfinite(value):
            raise RecastSequenceError(f"accuracy on {task!r} after {after!r}: {accuracy}; a finite number is expected")
        if after is None:
            self.baseline[self._index(task)] = value
        else:
            self.values[self._index(after), self._index(task)] = value

    @property
    def learned(self) -> int:
        """How many tasks have been learned: rows with a diagonal entry, from the first on."""
        missing = np.flatnonzero(np.isnan(np.diagonal(self.values)))
        return int(missing[0]) if len(missing) else len(self.tasks)

    def summary(self) -> dict[str, float]:
        """The measures that what was recorded allows, taken after the last task learned.

        Returns:
            ``average_accuracy``, ``backward_transfer``, ``forgetting`` and ``forward_transfer``, or those of them that can be
            had.
        """
        last = self.learned - 1
        measures: dict[str, Callable[[], float]] = {
            "average_accuracy": lambda: average_accuracy(self.values, last),
            "backward_transfer": lambda: backward_transfer(self.values, last),
            "forgetting": lambda: forgetting(self.values, last),
            "forward_transfer": lambda: forward_transfer(self.values, self.baseline, last),
        }
        result = {}
        for name, measure in measures.items():
            try:
                result[name] = measure()
            except RecastSequenceError:
                continue  # not recorded, or too few tasks yet
        return result

    def table(self, digits: int = 3) -> str:
        """R as text, a row for each task learned, then the measures."""
        rows = [["", *self.tasks]]
        if not np.isnan(self.baseline).all():
            rows.append(["before", *(self._cell(value, digits) for value in self.baseline)])
        rows += [[f"after {n}", *(self._cell(v, digits) for v in row)] for n, row in zip(self.tasks, self.values, strict=True)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows
        ]
        lines += [f"{name.replace('_', ' ')}: {value:+.{digits}f}" for name, value in self.summary().items()]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AccuracyMatrix):
            return NotImplemented
        same = np.array_equal(self.values, other.values, equal_nan=True)
        return self.tasks == other.tasks and same and np.array_equal(self.baseline, other.baseline, equal_nan=True)

    __hash__ = None  # type: ignore[assignment]  # it can be written to

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold; what was not recorded is None."""
        return {
            "tasks": list(self.tasks),
            "values": [[_or_none(v) for v in row] for row in self.values],
            "baseline": [_or_none(v) for v in self.baseline],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> AccuracyMatrix:
        """The matrix that :meth:`to_dict` wrote.

        Raises:
            RecastSequenceError: if the content is of another form.
        """
        try:
            matrix = cls(content["tasks"])
            values = np.array(content["values"], dtype=float)
            baseline = np.array(content.get("baseline") or [None] * len(matrix.tasks), dtype=float)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecastSequenceError(f"this is no accuracy matrix ({error!r}): 'tasks' and 'values' are expected") from error
        if values.shape != matrix.values.shape or baseline.shape != matrix.baseline.shape:
            raise RecastSequenceError(
                f"the accuracy matrix has another size than there are tasks\n  tasks:  {len(matrix.tasks)}\n"
                f"  values: {values.shape}, baseline: {baseline.shape}"
            )
        matrix.values, matrix.baseline = values, baseline
        return matrix

    def plot(self, path: str | None = None, *, axes: Any = None, digits: int = 2) -> Any:
        """Draw the matrix as a picture.

        Args:
            path: where to save it; None does not save.
            axes: matplotlib axes to draw in; None makes a figure.
            digits: of the numbers in the cells.

        Returns:
            the matplotlib axes.

        Raises:
            RecastSequenceError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise RecastSequenceError("a picture needs matplotlib: pip install matplotlib") from error
        count = len(self.tasks)
        figure = Figure(figsize=(1.6 + 0.8 * count, 1.2 + 0.6 * count), layout="constrained") if axes is None else axes.figure
        axes = figure.subplots() if axes is None else axes
        image = axes.imshow(np.ma.masked_invalid(self.values), cmap="viridis", aspect="auto")
        for i, j in zip(*np.nonzero(np.isfinite(self.values)), strict=True):
            r, g, b, _ = image.cmap(image.norm(self.values[i, j]))
            ink = "black" if 0.299 * r + 0.587 * g + 0.114 * b > 0.5 else "white"
            axes.text(j, i, f"{self.values[i, j]:.{digits}f}", ha="center", va="center", color=ink)
        axes.set_xticks(range(count), self.tasks, rotation=45, ha="right")
        axes.set_yticks(range(count), self.tasks)
        axes.set_xlabel("accuracy on")
        axes.set_ylabel("after learning")
        figure.colorbar(image, ax=axes)
        if path is not None:
            figure.savefig(path, dpi=150)
        return axes

    def _index(self, task: str) -> int:
        if task not in self.tasks:
            raise RecastSequenceError(f"there is no task {task!r}; known are {', '.join(self.tasks)}")
        return self.tasks.index(task)

    @staticmethod
    def _cell(value: float, digits: int) -> str:
        return "-" if np.isnan(value) else f"{value:.{digits}f}"


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


# ---------------------------------------------------------------- a bank that grows with the tasks


@dataclass
class Growth:
    """How the bank of a sequence grows: from what the tasks learned so far do to the pretrained weights.

    A task that is learned with coefficients alone moves the weights within the span of the bank, so there is nothing in it to
    grow from. So a source is a task with a LoRA part (``RecastConfig(lora_config=...)``), or ``source`` learns the task a
    second time by freer means.

    Attributes:
        source: is called with a plain copy of the backbone and the task, and returns what moved the weights (an adapter such
            as a LoRA, a fine-tuned copy: a source of ``grow_bank``), or None if the task is to add nothing. Without it the
            tasks of the sequence that have a LoRA part are the sources, coefficients and LoRA together.
        of: ``"weights"``, or ``"biases"`` for a bank of biases (``grow_bias_bank``): tasks are then learned with coefficients
            for its templates beside those that their configs ask for. Then ``source`` is needed, since what trains biases whole
            is no task of the sequence.
        config: targets and groups of a bank of weights, as for ``grow_bank``.
        num_templates: templates of a group that are added each time, at most; None adds all principal components.
        rank: stores each template of weights as a low-rank pair.
        plain_templates: keep the pretrained weights as templates beside the grown ones.
        bank: where to start, and afterwards the bank as it stands; None before anything was grown.
    """

    source: Callable[[nn.Module, Any], Source | None] | None = None
    config: RecastConfig | None = None
    num_templates: int | None = None
    rank: int | None = None
    plain_templates: bool = True
    bank: StoredBank | None = None
    of: str = "weights"
    _sources: list[Source] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.of not in ("weights", "biases"):
            raise RecastConfigError(f"Growth(of={self.of!r}): expected 'weights' or 'biases'")
        if self.bank is not None and self.bank.is_of_biases != (self.of == "biases"):
            raise RecastConfigError(f"Growth(of={self.of!r}) starts from a bank that is of {_kind_of(self.bank)}")
        if self.of == "biases" and (self.source is None or self.config is not None or self.rank is not None):
            raise RecastConfigError(
                "Growth(of='biases') needs source=, a function that learns a task by training biases, and takes neither config="
                " nor rank=, which are of weights"
            )

    def learn(self, plain: nn.Module, task: Any, model: PeftModel, name: str) -> None:
        """Get the source of a task that the model has learned under a name."""
        if self.source is not None:
            found = self.source(copy.deepcopy(plain), task)
        else:
            found = (model, name) if getattr(model.peft_config[name], "lora_config", None) is not None else None
        if found is not None:
            self._sources.append(found)

    def grow(self, plain: nn.Module) -> None:
        """Grow the bank from the sources since it grew last, or extend it by them; without any it stays."""
        sources, self._sources = self._sources, []
        if not sources:
            return
        if self.bank is not None:
            self.bank = extend_bank(self.bank, plain, sources, num_templates=self.num_templates)
            return
        if self.of == "biases":
            self.bank = grow_bias_bank(plain, sources, num_templates=self.num_templates)
            return
        self.bank = grow_bank(
            plain,
            sources,
            self.config,
            num_templates=self.num_templates,
            rank=self.rank,
            plain_templates=self.plain_templates,
        )


def _kind_of(bank: StoredBank) -> str:
    return "biases" if bank.is_of_biases else "weights"


# ---------------------------------------------------------------- the driver


def learn_in_sequence(
    model: nn.Module,
    tasks: Mapping[str, Any],
    train: Callable[[PeftModel, Any], Any],
    evaluate: Callable[[nn.Module, Any], float],
    *,
    config: RecastConfig | Mapping[str, RecastConfig] | None = None,
    evaluate_unseen: bool = False,
    grow: Growth | None = None,
    grow_every: int = 1,
    progress: bool = True,
) -> tuple[PeftModel, AccuracyMatrix]:
    """Learn tasks one after the other, and measure after each of them.

    Each task becomes an adapter of its own. Nothing of the earlier ones may change; that is checked.

    Args:
        model: a backbone, which is converted, or a model that has tasks already.
        tasks: what ``train`` and ``evaluate`` are given, by the task's name, in the order of learning.
        train: is called with the model, whose new task is active and alone trainable, and with the task; any training loop.
        evaluate: is called with the model and the task, and returns an accuracy. The task's adapter is active, the model in
            evaluation mode, gradients are off.
        config: of every task, or by name; None is ``RecastConfig()``.
        evaluate_unseen: also evaluate tasks before they are learned, for forward transfer: with the adapter learned last, and
            before the first one with the backbone as it is. It makes sense where tasks share a head.
        grow: grows a bank from the tasks; each task is learned on the bank as it stands then, and stays on that version. The
            tasks before the bank has grown are learned on the banks of their configs.
        grow_every: after how many tasks the bank grows.
        progress: show a progress bar.

    Returns:
        the model with all tasks, the last of them active, and the accuracy matrix.

    Raises:
        RecastSequenceError: if a task's name is taken, an accuracy is not a finite number, or training changed an earlier task.
        RecastConfigError: if ``grow_every`` is below 1, or a config names a bank of its own beside ``grow``.
        RecastError: if a task cannot be made.
    """
    matrix = AccuracyMatrix(list(tasks))
    _check_names(model, tasks, config)
    plain = None if grow is None else _checked_plain(model, tasks, config, grow, grow_every)
    if evaluate_unseen:
        with _plain(model) as backbone:
            for name, task in tasks.items():
                matrix.record(None, name, _measure(backbone, evaluate, task))
    earlier: dict[str, dict[str, Tensor]] = {}
    bar = tqdm(tasks.items(), desc="tasks", disable=not progress)
    for place, (name, task) in enumerate(bar, start=1):
        bar.set_postfix_str(name)
        model = _add_task(model, name, config, None if grow is None else grow.bank)
        model.train()
        train(model, task)
        _check_untouched(model, earlier)
        earlier[name] = _numbers(model, name)
        for other in tasks if evaluate_unseen else earlier:
            model.set_adapter(other if other in earlier else name)
            matrix.record(name, other, _measure(model, evaluate, tasks[other]))
        model.set_adapter(name)
        if grow is not None and plain is not None:
            grow.learn(plain, task, model, name)
            if place % grow_every == 0:
                grow.grow(plain)
    assert isinstance(model, PeftModel)
    return model, matrix


def _checked_plain(model: nn.Module, tasks: Mapping[str, Any], config: Any, grow: Growth, grow_every: int) -> nn.Module:
    """A plain copy of the backbone, to grow a bank for."""
    if not isinstance(grow_every, int) or isinstance(grow_every, bool) or grow_every < 1:
        raise RecastConfigError(f"grow_every={grow_every!r}: expected a whole number of at least 1")
    configs = {name: config[name] if isinstance(config, Mapping) else config for name in tasks}
    if grow.source is None and not any(own is not None and own.lora_config is not None for own in configs.values()):
        raise RecastConfigError(
            "there is nothing that a bank could grow from: none of the tasks has a LoRA part. Give Growth(source=...), or some "
            "of the tasks RecastConfig(lora_config=...)"
        )
    for name, own in configs.items():
        named = None if own is None else (_bias_bank_in(own) if grow.of == "biases" else own.bank)
        if named is not None:
            raise RecastConfigError(
                f"the config of task {name!r} names the bank {named}, and grow= is given too: start from it with "
                "Growth(bank=...), or leave grow out"
            )
    plain = copy.deepcopy(model)
    converted = isinstance(plain, PeftModel) and any(isinstance(module, RecastLayer) for module in plain.modules())
    return plain.unload() if converted else plain  # type: ignore[operator]


def _check_names(model: nn.Module, tasks: Mapping[str, Any], config: Any) -> None:
    for name in tasks:
        check_adapter_name(name)
    taken = [name for name in tasks if isinstance(model, PeftModel) and name in model.peft_config]
    if taken:
        raise RecastSequenceError(f"the model has a task {taken[0]!r} already: choose other names, or delete_adapter first")
    without = [name for name in tasks if isinstance(config, Mapping) and name not in config]
    if without:
        raise RecastSequenceError(f"config names no configuration for task {without[0]!r}")


def _add_task(
    model: nn.Module, name: str, config: RecastConfig | Mapping[str, RecastConfig] | None, bank: StoredBank | None = None
) -> PeftModel:
    own = copy.deepcopy(config[name] if isinstance(config, Mapping) else config) or RecastConfig()
    if bank is not None and bank.is_of_biases:
        others = [partner for partner in own.partners or () if not isinstance(partner, BiasConfig)]
        own.partners = [*others, BiasConfig(bank=bank)]
    elif bank is not None:
        own.bank = bank  # type: ignore[assignment]
    if not isinstance(model, PeftModel):
        return get_recast_model(model, own, adapter_name=name)
    model.add_adapter(name, own)
    model.set_adapter(name)
    return model


def _bias_bank_in(config: RecastConfig) -> Any:
    return next((partner.bank for partner in config.partners or () if isinstance(partner, BiasConfig)), None)


@contextmanager
def _plain(model: nn.Module) -> Iterator[nn.Module]:
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield model
    else:
        yield model


def _measure(model: nn.Module, evaluate: Callable[[nn.Module, Any], float], task: Any) -> float:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return float(evaluate(model, task))
    finally:
        model.train(was_training)


def _numbers(model: PeftModel, name: str) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Task .* not stored yet")  # nothing is saved here
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach().clone() for key, value in state.items()}


def _check_untouched(model: PeftModel, earlier: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, before in earlier.items():
        now = _numbers(model, name)
        changed = [key for key, value in before.items() if not torch.equal(now[key].to(value.device), value)]
        if changed:
            raise RecastSequenceError(
                f"training changed the earlier task {name!r}: {', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}\n"
                "Give the optimiser only the parameters that require gradients, and do not activate other tasks while training."
            )
