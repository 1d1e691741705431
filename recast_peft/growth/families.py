"""Practice tasks and how they are made of unlabelled data: a family is one small class, and users add theirs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RecastConfigError
from ..validation import COUNT, Options, is_int, number_above, shown

Inputs = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class PracticeTask:
    """One practice task: examples, whose labels were made of themselves.

    Attributes:
        name: in a few words, for the bank's card.
        inputs: a tensor ``(examples, ...)``, or such tensors by the names of the model's arguments.
        labels: ``(examples,)``, numbers of classes.

    Raises:
        RecastConfigError: if there is no label for each example, only one class, or all examples are the same.
    """

    name: str
    inputs: Inputs
    labels: Tensor

    def __post_init__(self) -> None:
        labels, inputs = self.labels, [*self.inputs.values()] if isinstance(self.inputs, Mapping) else [self.inputs]
        if not all(isinstance(tensor, Tensor) and tensor.ndim for tensor in (labels, *inputs)):
            kinds = ", ".join(type(tensor).__name__ for tensor in inputs)
            raise RecastConfigError(
                f"practice task {self.name!r}: expected tensors (examples, ...)\n  inputs: {kinds}\n"
                f"  labels: {type(labels).__name__}"
            )
        are_numbers = labels.ndim == 1 and labels.dtype == torch.long and int((labels < 0).sum()) == 0
        if not inputs or any(len(tensor) != len(labels) for tensor in inputs) or not are_numbers or len(labels.unique()) < 2:
            raise RecastConfigError(
                f"practice task {self.name!r}: expected a label for each example, whole numbers from 0 of two classes or more\n"
                f"  inputs: {', '.join(str(tuple(tensor.shape)) for tensor in inputs) or 'none'}\n"
                f"  labels: {tuple(labels.shape)} in {labels.dtype}, {len(labels.unique())} different"
            )
        if all(bool((tensor == tensor[:1]).all()) for tensor in inputs):
            raise RecastConfigError(
                f"practice task {self.name!r}: its examples are all the same, so that nothing tells the classes"
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
class MissingWords(Options):
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
        self.check(COUNT, "words", "examples", "least")
        special = self.special_token_ids
        if not isinstance(special, Collection) or not all(map(is_int, (self.mask_token_id, *special))):
            raise RecastConfigError(
                f"MissingWords(mask_token_id={shown(self.mask_token_id)}, special_token_ids={shown(special)}): expected the "
                "number of a token, and a tuple of such. Where there is no token for a mask, take another that is no word."
            )

    def make(self, data: Inputs, generator: torch.Generator) -> PracticeTask:
        """Draw words that stand in enough texts, but in no more than a tenth of them where that leaves enough words."""
        if isinstance(data, Mapping) and self.text not in data:
            raise RecastConfigError(f"MissingWords(text={self.text!r}): the data have {', '.join(map(repr, data))}")
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
class KnownPictures(Options):
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
        self.check(COUNT, "pictures", "views")
        self.check(number_above(0, itself=True, most=1), "crop")
        self.check(number_above(0, itself=True), "colour", "noise")

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
        draw = torch.rand(4, count, generator=generator, dtype=torch.float32).to(image)
        side = self.crop + (1 - self.crop) * draw[0]
        turn = torch.where(draw[1] < 0.5, -1.0, 1.0).to(image)
        zero = torch.zeros_like(side)
        across, down = (1 - side) * (2 * draw[2] - 1), (1 - side) * (2 * draw[3] - 1)
        rows = [torch.stack([side * turn, zero, across], dim=1), torch.stack([zero, side, down], dim=1)]
        grid = F.affine_grid(torch.stack(rows, dim=1), [count, channels, height, width], align_corners=False)
        views = F.grid_sample(image.expand(count, -1, -1, -1), grid, padding_mode="reflection", align_corners=False)
        spread = image.std()
        normal = torch.randn(2, count, channels, 1, 1, generator=generator, dtype=torch.float32).to(image)
        views = views * (1 + self.colour * normal[0]) + self.colour * spread * normal[1]
        return views + self.noise * spread * torch.randn(views.shape, generator=generator, dtype=torch.float32).to(image)


def check_data(data: Any) -> None:
    """Refuse (``RecastConfigError``) data that are no tensors with as many examples each, or not finite."""
    tensors = [*data.values()] if isinstance(data, Mapping) else [data]
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.ndim for tensor in tensors):
        kinds = ", ".join(type(tensor).__name__ for tensor in tensors) or "an empty dictionary"
        raise RecastConfigError(f"data is {kinds}: expected a tensor (examples, ...), or tensors by the model's arguments")
    if any(tensor.is_floating_point() and not tensor.isfinite().all() for tensor in tensors):
        raise RecastConfigError("data holds numbers that are not finite")
    counts = [len(tensor) for tensor in tensors]
    if len(set(counts)) > 1:
        raise RecastConfigError(f"data has tensors of {', '.join(map(str, counts))} examples: expected as many in each")


def each_tensor(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Inputs of the same form with every tensor changed."""
    return {key: change(value) for key, value in inputs.items()} if isinstance(inputs, Mapping) else change(inputs)


def rows_of_inputs(inputs: Inputs, rows: Tensor) -> Inputs:
    """Some of the examples."""
    return each_tensor(inputs, lambda tensor: tensor[rows.to(tensor.device)])
