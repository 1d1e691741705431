"""practice_bank: a bank for whoever has data, but neither labels nor earlier tasks.

Practice tasks are made of what has no labels: which word was taken out of a text, which picture is it that was shifted and
recoloured. What training does to the model on many of them has directions in common, and these are the templates. A family of
practice tasks is one small class (:class:`PracticeFamily`); two are here, and users add theirs.

Related: prompts and adapters pretrained on self-supervised tasks (PVP, Song et al., arXiv 2211.06871; SUPMER, Pan et al.,
arXiv 2303.12314) start a new task at a learned point, where a practice bank gives it the directions to move in; aTLAS (Zhang et
al., arXiv 2407.02880) scales blocks of task vectors that labelled tasks gave, and Uni-LoRA (Li et al., arXiv 2506.00799) and
VB-LoRA (Li et al., arXiv 2405.15179) do without any: their directions are random, or learned with the task.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..banks.files import StoredBank
from ..config import RecastConfig
from ..errors import RecastConfigError
from ..mimicry.features import call_arguments, device_of, evaluating, main_tensor
from ..tasks.plan import plan_recast
from ..validation import is_int, is_number, shown
from .biases import bias_places, grow_bias_bank, is_norm
from .sources import check_plain, check_sizes
from .weights import grow_bank

Inputs = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class PracticeTask:
    """One practice task: examples, whose labels were made of themselves.

    Attributes:
        name: in a few words, for the bank's card.
        inputs: a tensor ``(examples, ...)``, or such tensors by the names of the model's arguments.
        labels: ``(examples,)``, numbers of classes.

    Raises:
        RecastConfigError: if there is no label for each example, or only one class.
    """

    name: str
    inputs: Inputs
    labels: Tensor

    def __post_init__(self) -> None:
        labels, inputs = self.labels, [*self.inputs.values()] if isinstance(self.inputs, Mapping) else [self.inputs]
        are_numbers = labels.ndim == 1 and labels.dtype == torch.long and int((labels < 0).sum()) == 0
        if not inputs or any(len(tensor) != len(labels) for tensor in inputs) or not are_numbers or len(labels.unique()) < 2:
            raise RecastConfigError(
                f"practice task {self.name!r}: expected a label for each example, whole numbers from 0 of two classes or more\n"
                f"  inputs: {', '.join(str(tuple(tensor.shape)) for tensor in inputs) or 'none'}\n"
                f"  labels: {tuple(labels.shape)} in {labels.dtype}, {len(labels.unique())} different"
            )

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return int(self.labels.max()) + 1


class PracticeFamily(Protocol):
    """A way to make practice tasks of unlabelled data; a new one is a class with this method."""

    def make(self, data: Inputs, generator: torch.Generator) -> PracticeTask:
        """One task, drawn by the generator: another call gives another task.

        Raises:
            RecastConfigError: if the data do not suit the family.
        """
        ...


@dataclass(frozen=True)
class MissingWords:
    """Texts: which of a few words was taken out of the text?

    Args:
        mask_token_id: what stands in place of the word.
        special_token_ids: tokens that are no words, of padding and the ends of a text.
        words: number of words to tell apart, the classes of a task.
        examples: texts of each class at most.
        least: texts that a word must stand in to be asked for.
        text: the name of the model's argument that holds the tokens ``(texts, length)``.
    """

    mask_token_id: int
    special_token_ids: tuple[int, ...] = ()
    words: int = 12
    examples: int = 40
    least: int = 10
    text: str = "input_ids"

    def __post_init__(self) -> None:
        check_sizes(words=self.words, examples=self.examples, least=self.least)

    def make(self, data: Inputs, generator: torch.Generator) -> PracticeTask:
        """Draw words that stand in enough texts, but in no more than a tenth of them where that leaves enough words."""
        tokens = data[self.text] if isinstance(data, Mapping) else data
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise RecastConfigError(f"MissingWords needs tokens (texts, length); given: {tokens.dtype} {tuple(tokens.shape)}")
        words, places = tokens.unique(return_inverse=True)
        stands = torch.zeros(len(tokens), len(words), dtype=torch.bool).scatter_(1, places.cpu(), True)
        is_word = ~torch.isin(words.cpu(), torch.tensor([self.mask_token_id, *self.special_token_ids]))
        counts = stands.sum(0)
        eligible = is_word & (counts >= self.least)
        rare = eligible & (counts <= max(self.least, len(tokens) // 10))
        eligible = rare if int(rare.sum()) >= self.words else eligible
        chosen = eligible.nonzero().flatten()
        if len(chosen) < self.words:
            raise RecastConfigError(
                f"MissingWords(words={self.words}, least={self.least}): only {len(chosen)} words stand in that many of "
                f"{len(tokens)} texts; give more texts, or smaller numbers"
            )
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[: self.words]]
        alone = stands[:, chosen].sum(1) == 1  # a text with two of the words would have two answers
        rows, labels = [], []
        for label, word in enumerate(chosen.tolist()):
            own = (alone & stands[:, word]).nonzero().flatten()
            own = own[torch.randperm(len(own), generator=generator)[: self.examples]]
            rows.append(own)
            labels.append(torch.full((len(own),), label))
        row, answers = torch.cat(rows).to(tokens.device), torch.cat(labels)
        kept = tokens[row]
        gone = words[chosen.to(words.device)][answers.to(words.device)]
        hidden = torch.where(kept == gone[:, None], torch.full_like(kept, self.mask_token_id), kept)
        inputs = {key: value[row] for key, value in data.items()} if isinstance(data, Mapping) else {}
        names = ", ".join(str(int(words[word])) for word in chosen[:3])
        return PracticeTask(f"missing words: tokens {names}, ...", {**inputs, self.text: hidden}, answers)


@dataclass(frozen=True)
class KnownPictures:
    """Pictures: which of a few pictures is it, that was cut, turned over, shifted in colour and made noisy?

    Args:
        pictures: number of pictures to tell apart, the classes of a task.
        views: number of views of each picture.
        crop: the smallest side of a cut, in units of the picture's.
        colour: standard deviation of a channel's factor and offset, in units of the picture's standard deviation.
        noise: standard deviation of the noise, likewise.
    """

    pictures: int = 12
    views: int = 30
    crop: float = 0.5
    colour: float = 0.3
    noise: float = 0.2

    def __post_init__(self) -> None:
        check_sizes(pictures=self.pictures, views=self.views)

    def make(self, data: Inputs, generator: torch.Generator) -> PracticeTask:
        """Draw pictures, and views of each."""
        images = next(iter(data.values())) if isinstance(data, Mapping) else data
        if images.ndim != 4 or not images.is_floating_point() or len(images) < self.pictures:
            raise RecastConfigError(
                f"KnownPictures(pictures={self.pictures}) needs at least so many pictures (n, channels, height, width); given: "
                f"{images.dtype} {tuple(images.shape)}"
            )
        chosen = torch.randperm(len(images), generator=generator)[: self.pictures]
        views = torch.cat([self._views(images[i], generator) for i in chosen.tolist()])
        labels = torch.arange(self.pictures).repeat_interleave(self.views)
        inputs: Inputs = {next(iter(data)): views} if isinstance(data, Mapping) else views
        return PracticeTask(f"known pictures: {', '.join(map(str, chosen[:3].tolist()))}, ...", inputs, labels)

    def _views(self, image: Tensor, generator: torch.Generator) -> Tensor:
        count, (channels, height, width) = self.views, image.shape
        draw = torch.rand(4, count, generator=generator).to(image)
        side = self.crop + (1 - self.crop) * draw[0]
        turn = torch.where(draw[1] < 0.5, -1.0, 1.0).to(image)
        zero = torch.zeros_like(side)
        across, down = (1 - side) * (2 * draw[2] - 1), (1 - side) * (2 * draw[3] - 1)
        rows = [torch.stack([side * turn, zero, across], dim=1), torch.stack([zero, side, down], dim=1)]
        grid = F.affine_grid(torch.stack(rows, dim=1), [count, channels, height, width], align_corners=False)
        views = F.grid_sample(image.expand(count, -1, -1, -1), grid, padding_mode="reflection", align_corners=False)
        spread = image.std()
        normal = torch.randn(2, count, channels, 1, 1, generator=generator).to(image)
        views = views * (1 + self.colour * normal[0]) + self.colour * spread * normal[1]
        return views + self.noise * spread * torch.randn(views.shape, generator=generator).to(image)


def practice_bank(
    model: nn.Module,
    data: Inputs,
    family: PracticeFamily | Sequence[PracticeFamily],
    *,
    tasks: int = 12,
    of: str = "biases",
    config: RecastConfig | None = None,
    num_templates: int | None = None,
    group_size: int = 1,
    scales: bool = False,
    epochs: int = 4,
    batch_size: int = 32,
    lr: float = 3e-3,
    features: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> StoredBank:
    """Grow a bank from practice tasks, which are made of unlabelled data and trained one after the other.

    Args:
        model: plain model with its pretrained weights; it is not changed.
        data: unlabelled: a tensor ``(examples, ...)``, or such tensors by the names of the model's arguments. A model in half
            precision is trained in float32, so floating numbers are expected in float32.
        family: how practice tasks are made of them, or several that take turns: :class:`MissingWords`, :class:`KnownPictures`,
            or a class of your own with a method ``make``.
        tasks: how many are trained.
        of: ``"biases"``: biases of layers and norms are trained, and the bank is one for ``BiasConfig(bank=...)``;
            ``"weights"``: LoRAs of rank 4 on the config's targets are, and it is one for ``RecastConfig(bank=...)``.
        config: for ``"weights"``: targets and groups, as for ``grow_bank``.
        num_templates: templates of a group at most; None takes all principal components, as many as tasks.
        group_size: for ``"biases"``: blocks that share templates and coefficients.
        scales: for ``"biases"``: the scales of norms are trained too, and take part in the templates.
        epochs: passes over the examples of each task.
        batch_size: examples of a step.
        lr: learning rate at its height; it rises over a tenth of the steps and falls to zero.
        features: from the model and a batch of inputs to ``(batch, features)``, which a linear classifier sees. None takes the
            model's output (its logits or last hidden state), averaged over positions that the ``attention_mask`` names.
        seed: random seed for the tasks, the classifiers and the order of examples.
        progress: show a progress bar over the tasks.

    Returns:
        the bank, version 1; ``growth_report`` says how much of the tasks' moves its templates keep.

    Raises:
        RecastConfigError: if an argument cannot be used, the data do not suit a family, or the model is converted already.
        RecastTargetError: if nothing of the model can be trained in this way.
    """
    check_plain(model, "practice_bank")
    check_sizes(tasks=tasks, num_templates=num_templates, group_size=group_size, epochs=epochs, batch_size=batch_size)
    if of not in ("biases", "weights"):
        raise RecastConfigError(f"practice_bank(of={of!r}): expected 'biases' or 'weights'")
    families = list(family) if isinstance(family, Sequence) else [family]
    if not families or any(isinstance(one, type) or not callable(getattr(one, "make", None)) for one in families):
        raise RecastConfigError(f"family={shown(family)}: expected an object with a method make, such as KnownPictures()")
    check_data(data)
    wrong = {
        f"lr={shown(lr)}: expected a number above 0": not is_number(lr) or lr <= 0,
        f"seed={shown(seed)}: expected a whole number": not is_int(seed),
        "batch_size=1: expected at least 2": batch_size == 1,
    }
    for message, holds in wrong.items():
        if holds:
            raise RecastConfigError(message)
    generator = torch.Generator().manual_seed(seed)
    plan = plan_recast(model, config or RecastConfig(group_size=1)) if of == "weights" else None
    how: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "features": features or mean_features}
    train = partial(_train, generator=generator, **how)
    moved, names = [], []
    for index in tqdm(range(tasks), desc="practice", disable=not progress):
        task = families[index % len(families)].make(data, generator)
        names.append(task.name)
        copied = copy.deepcopy(model)
        if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in copied.parameters()):
            copied = copied.float()  # small steps would be rounded away
        targets = [target.name for target in plan.candidates] if plan is not None else None
        moved.append(_trained(copied, targets, scales, seed, partial(train, task)))
    if plan is not None:
        bank = grow_bank(model, moved, config, num_templates=num_templates)
    else:
        bank = grow_bias_bank(model, moved, num_templates=num_templates, group_size=group_size, scales=scales)
    made = dict(bank.mimicry) if isinstance(bank.mimicry, Mapping) else {}
    return replace(bank, mimicry={**made, "sources": names})


def check_data(data: Any) -> None:
    """Refuse unlabelled data that are no tensors with as many examples each, or hold numbers that are not finite.

    Raises:
        RecastConfigError: saying what was given.
    """
    tensors = [*data.values()] if isinstance(data, Mapping) else [data]
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.ndim for tensor in tensors):
        kinds = ", ".join(type(tensor).__name__ for tensor in tensors) or "an empty dictionary"
        raise RecastConfigError(f"data is {kinds}: expected a tensor (examples, ...), or tensors by the model's arguments")
    if any(tensor.is_floating_point() and not tensor.isfinite().all() for tensor in tensors):
        raise RecastConfigError("data holds numbers that are not finite")
    counts = [len(tensor) for tensor in tensors]
    if len(set(counts)) > 1:
        raise RecastConfigError(f"data has tensors of {', '.join(map(str, counts))} examples: expected as many in each")


def mean_features(model: nn.Module, inputs: Any) -> Tensor:
    """What a model says of each input ``(batch, features)``: its output, averaged over the positions that are attended to."""
    args, kwargs = call_arguments(inputs, device_of(model))
    found = main_tensor(model(*args, **kwargs))
    if found is None:
        raise RecastConfigError("the model's output holds no tensor of features: give practice_bank features=")
    if found.ndim == 2:
        return found
    mask = kwargs.get("attention_mask")
    if found.ndim == 3 and mask is not None and mask.shape == found.shape[:2]:
        weights = mask[..., None].to(found.dtype)
        return (found * weights).sum(1) / weights.sum(1).clamp_min(1)
    return found.mean(1) if found.ndim == 3 else found.flatten(2).mean(2)


def _trained(
    model: nn.Module, targets: list[str] | None, scales: bool, seed: int, train: Callable[..., None]
) -> dict[str, Tensor]:
    """The parameters that training on a task moved, by the names of the plain model."""
    model.requires_grad_(False)
    trained: nn.Module = model
    if targets is not None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            trained = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    else:
        for place in bias_places(model):
            place.module.bias.requires_grad_(True)  # type: ignore[union-attr]
            if scales and is_norm(place.module):
                place.module.weight.requires_grad_(True)  # type: ignore[union-attr]
    free = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    with evaluating(trained):
        train(trained, free)
    if targets is not None:
        state = trained.merge_and_unload().state_dict()  # type: ignore[operator]
        return {f"{name}.weight": state[f"{name}.weight"] for name in targets if f"{name}.weight" in state}
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _train(
    task: PracticeTask,
    model: nn.Module,
    free: list[nn.Parameter],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    features: Callable[[nn.Module, Any], Tensor],
    generator: torch.Generator,
) -> None:
    with torch.no_grad():
        first = features(model, rows_of_inputs(task.inputs, torch.arange(min(2, len(task.labels)))))
    device = device_of(model)
    # the scale of features differs from model to model: a classifier of standardised ones has one learning rate for all
    scale = nn.BatchNorm1d(first.shape[1], affine=False).to(device)
    head = nn.utils.skip_init(nn.Linear, first.shape[1], task.num_classes).to(device)  # draws no random numbers
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(
        [{"params": head.parameters(), "lr": 1e-2, "weight_decay": 0.01}, {"params": free, "lr": lr, "weight_decay": 0.0}]
    )
    batches = math.ceil(len(task.labels) / batch_size)
    if epochs * batches < 2:
        raise RecastConfigError(
            f"practice task {task.name!r} has {len(task.labels)} examples, one step of batch_size={batch_size}: the first step "
            "moves the classifier alone. Expected more: give more examples, a smaller batch_size, or more epochs."
        )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[1e-2, lr], total_steps=epochs * batches, pct_start=0.1)
    with torch.enable_grad():
        for rows in _batches(len(task.labels), batch_size, epochs, generator):
            logits = head(scale(features(model, rows_of_inputs(task.inputs, rows)).float()))
            loss = F.cross_entropy(logits, task.labels[rows].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(free, 1.0)
            optimizer.step()
            schedule.step()


def _batches(count: int, size: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of each step; one row alone has no spread, so it goes with the batch before it."""
    for _ in range(epochs):
        order = list(torch.randperm(count, generator=generator).split(size))
        if len(order) > 1 and len(order[-1]) == 1:
            order[-2:] = [torch.cat(order[-2:])]
        yield from order


def rows_of_inputs(inputs: Inputs, rows: Tensor) -> Inputs:
    """Some of the examples."""
    if isinstance(inputs, Mapping):
        return {key: value[rows.to(value.device)] for key, value in inputs.items()}
    return inputs[rows.to(inputs.device)]
