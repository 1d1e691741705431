"""Printed glyphs for tests of mimicry on a backbone that was pretrained on them (``glyph_backbone.py``); no download.

Glyphs come from the fonts that matplotlib ships. Every image is grey, 28 x 28 and distorted at random (turned, scaled,
thickened, blurred, noised, partly covered, crossed by stray strokes). Randomness comes from local, seeded generators. The
characters of pretraining and those of the tasks are disjoint, and look-alikes are removed by comparing the drawn bitmaps.
"""

# ruff: noqa: RUF001 (characters of other scripts are the data here)

from __future__ import annotations

import math
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageFont
from torch import Tensor

CANVAS_SIZE = 48
"""Side of the square on which a glyph is drawn before it is distorted, in pixels."""

IMAGE_SIZE = 28
"""Side of the images handed to a model, in pixels."""

GLYPH_SIZE = 38
"""Longer side of every drawn glyph on its canvas, in pixels."""

SANS_FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique")
SERIF_FACES = ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic")
MONO_FACES = ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique")
STIX_FACES = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta")
FACES = SANS_FACES + SERIF_FACES + MONO_FACES + STIX_FACES
"""Every face glyphs are drawn with, if it has the character."""


@dataclass(frozen=True)
class Distortion:
    """Ranges from which the distortions of one image are drawn uniformly; pairs are (lowest, highest)."""

    rotation: tuple[float, float] = (-10.0, 10.0)
    """Angle in degrees."""
    scale: tuple[float, float] = (0.8, 1.05)
    """Size of the glyph; 1 keeps the size it is drawn with."""
    stretch: float = 0.12
    """Largest relative change of the width against the height, either way."""
    shear: float = 0.12
    """Largest horizontal shear, either way."""
    shift: float = 0.10
    """Largest move along each axis, as a fraction of half the image."""
    thickness: tuple[float, float] = (-0.5, 0.8)
    """Stroke change: -1 is one pixel of the canvas eroded on each side, 1 is one pixel added."""
    blur: tuple[float, float] = (0.0, 0.7)
    """Share of a 3 x 3 mean mixed in, twice."""
    noise: tuple[float, float] = (0.0, 0.12)
    """Standard deviation of the added normal noise (ink is 1, paper is 0)."""
    contrast: tuple[float, float] = (0.6, 1.0)
    """Darkness of the ink."""
    occlusion: float = 0.25
    """Largest side of the square covered with paper, as a fraction of the image side."""
    strokes: int = 0
    """Number of stray strokes across the image."""


PRETRAINING_DISTORTION = Distortion()
"""Distortion of the images a backbone is pretrained with."""


@dataclass(frozen=True)
class Task:
    """A classification task as tensors.

    Attributes:
        name: name in :data:`TASKS`.
        class_names: one name for each label.
        train_images: float32, (train images, 1, 28, 28), about zero mean and unit variance.
        train_labels: int64, (train images,).
        test_images: float32, (test images, 1, 28, 28).
        test_labels: int64, (test images,).
    """

    name: str
    class_names: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


@dataclass(frozen=True)
class TaskDescription:
    """One row of :data:`TASKS`: what a task is, before any image of it is drawn.

    Attributes:
        description: one line for people.
        class_names: one name for each label.
        bitmaps: gives the undistorted bitmaps of a class, uint8 (bitmaps, 48, 48).
        distortions: one for each class.
    """

    description: str
    class_names: tuple[str, ...]
    bitmaps: Callable[[int], Tensor]
    distortions: tuple[Distortion, ...]


# ---- drawing ----


@cache
def _face_path(face: str) -> str:
    """Return the font file of a face."""
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf")


@cache
def _face_characters(face: str) -> frozenset[int]:
    """Return the code points a face has a glyph for, by its character map."""
    return frozenset(FT2Font(_face_path(face)).get_charmap())


@cache
def _face_font(face: str) -> ImageFont.FreeTypeFont:
    """Return a face at the size it is drawn with before scaling."""
    return ImageFont.truetype(_face_path(face), 2 * GLYPH_SIZE, layout_engine=ImageFont.Layout.BASIC)


def faces_with(character: str, faces: tuple[str, ...] = FACES) -> tuple[str, ...]:
    """Return those of the faces whose character map has the character, so that no missing-glyph box is ever drawn."""
    return tuple(face for face in faces if ord(character) in _face_characters(face))


@cache
def draw_glyph(character: str, face: str) -> Tensor:
    """Draw a character in the middle of a canvas, its longer side always equally long.

    Returns:
        uint8, (48, 48); ink is 255, paper 0.

    Raises:
        ValueError: if the face lacks the character, or draws nothing for it.
    """
    if ord(character) not in _face_characters(face):
        raise ValueError(f"{face} has no glyph for {character!r} (U+{ord(character):04X}); see faces_with()")
    mask = _face_font(face).getmask(character)
    width, height = mask.size
    pixels = np.asarray(mask, dtype=np.uint8).reshape(height, width)
    if not pixels.any():
        raise ValueError(f"{face} draws nothing for {character!r} (U+{ord(character):04X})")
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return _centre(pixels, GLYPH_SIZE)


def _centre(pixels: np.ndarray, longer_side: int) -> Tensor:
    """Scale grey pixels, uint8 (height, width), to the given longer side and centre them on a canvas (48, 48)."""
    height, width = pixels.shape
    factor = longer_side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    scaled = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    canvas = np.zeros((CANVAS_SIZE, CANVAS_SIZE), dtype=np.uint8)
    top, left = (CANVAS_SIZE - size[1]) // 2, (CANVAS_SIZE - size[0]) // 2
    canvas[top : top + size[1], left : left + size[0]] = scaled
    return torch.from_numpy(canvas)


@cache
def glyph_bitmaps(characters: str, faces: tuple[str, ...] = FACES) -> Tensor:
    """Draw every character with each of the faces that has it.

    Returns:
        uint8, (bitmaps, 48, 48).

    Raises:
        ValueError: if no face has any of the characters.
    """
    bitmaps = [draw_glyph(character, face) for character in characters for face in faces_with(character, faces)]
    if not bitmaps:
        raise ValueError(f"none of the faces {faces} has a glyph for any of {characters!r}")
    return torch.stack(bitmaps)


# ---- distorting ----


def _uniform(count: int, limits: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Draw (count,) numbers uniformly between two limits."""
    return torch.empty(count).uniform_(limits[0], limits[1], generator=generator)


def _change_thickness(images: Tensor, amount: Tensor) -> Tensor:
    """Thicken strokes where the amount, (N,), is above zero and thin them where below; images are (N, 1, H, W)."""
    amount = amount.view(-1, 1, 1, 1)
    thick = F.max_pool2d(images, 3, stride=1, padding=1)
    thin = -F.max_pool2d(-images, 3, stride=1, padding=1)
    return images + amount.clamp(min=0) * (thick - images) + (-amount).clamp(min=0) * (thin - images)


def _place(images: Tensor, distortion: Distortion, generator: torch.Generator) -> Tensor:
    """Turn, scale, stretch, shear and shift canvases (N, 1, 48, 48) and sample images (N, 1, 28, 28) from them."""
    count = len(images)
    angle = _uniform(count, distortion.rotation, generator) * (math.pi / 180)
    scale = _uniform(count, distortion.scale, generator)
    stretch = _uniform(count, (-distortion.stretch, distortion.stretch), generator).exp()
    shear = _uniform(count, (-distortion.shear, distortion.shear), generator)
    shift = torch.empty(count, 2).uniform_(-distortion.shift, distortion.shift, generator=generator)
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], dim=1).view(count, 2, 2)
    lean = torch.stack([1 / stretch, shear, torch.zeros(count), stretch], dim=1).view(count, 2, 2)
    matrix = (lean @ turn) / scale.view(-1, 1, 1)  # (N, 2, 2), from places in the image to places on the canvas
    offset = -(matrix @ shift.unsqueeze(-1))  # (N, 2, 1)
    grid = F.affine_grid(torch.cat([matrix, offset], dim=2), [count, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _blur(images: Tensor, amount: Tensor) -> Tensor:
    """Mix a share, (N,), of the 3 x 3 mean into images (N, 1, H, W), twice."""
    amount = amount.view(-1, 1, 1, 1)
    for _ in range(2):
        images = images + amount * (F.avg_pool2d(images, 3, stride=1, padding=1) - images)
    return images


def _add_strokes(images: Tensor, strokes: int, generator: torch.Generator) -> Tensor:
    """Draw straight strokes at random places across images (N, 1, H, W), as dark as ink."""
    count, _, height, width = images.shape
    ends = torch.empty(count, strokes, 2, 2, 1, 1).uniform_(0, 1, generator=generator)  # (N, strokes, end, axis, 1, 1)
    rows = torch.linspace(0, 1, height).view(height, 1)
    columns = torch.linspace(0, 1, width).view(1, width)
    (row, column), (row_step, column_step) = ends[:, :, 0].unbind(2), (ends[:, :, 1] - ends[:, :, 0]).unbind(2)
    length = (row_step**2 + column_step**2).clamp(min=1e-6)
    along = (((rows - row) * row_step + (columns - column) * column_step) / length).clamp(0, 1)  # (N, strokes, H, W)
    distance = ((rows - row - along * row_step) ** 2 + (columns - column - along * column_step) ** 2).sqrt()
    ink = (1.5 - distance * height).clamp(0, 1).amax(dim=1, keepdim=True)  # (N, 1, H, W)
    return torch.maximum(images, ink)


def _occlude(images: Tensor, largest_side: float, generator: torch.Generator) -> Tensor:
    """Cover a square of images (N, 1, H, W) with paper; its side is at most the given fraction of the image side."""
    count, _, height, width = images.shape
    side = _uniform(count, (0, largest_side), generator).view(-1, 1, 1, 1)
    centre = torch.empty(count, 2, 1, 1, 1).uniform_(0, 1, generator=generator)
    rows = torch.linspace(0, 1, height).view(1, 1, height, 1)
    columns = torch.linspace(0, 1, width).view(1, 1, 1, width)
    covered = ((rows - centre[:, 0]).abs() < side / 2) & ((columns - centre[:, 1]).abs() < side / 2)
    return images.masked_fill(covered, 0.0)


def distort(bitmaps: Tensor, distortion: Distortion, generator: torch.Generator) -> Tensor:
    """Distort bitmaps and standardise them, each with its own random draw.

    Args:
        bitmaps: uint8, (N, 48, 48), ink 255.
        distortion: ranges of the draws.
        generator: source of all randomness.

    Returns:
        float32, (N, 1, 28, 28), about zero mean and unit variance.
    """
    count = len(bitmaps)
    images = bitmaps.unsqueeze(1).float() / 255
    images = _change_thickness(images, _uniform(count, distortion.thickness, generator))
    images = _place(images, distortion, generator)
    if distortion.strokes:
        images = _add_strokes(images, distortion.strokes, generator)
    if distortion.occlusion:
        images = _occlude(images, distortion.occlusion, generator)
    images = _blur(images, _uniform(count, distortion.blur, generator))
    images = images * _uniform(count, distortion.contrast, generator).view(-1, 1, 1, 1)
    noise = torch.empty_like(images).normal_(generator=generator)
    images = images + noise * _uniform(count, distortion.noise, generator).view(-1, 1, 1, 1)
    return (images - 0.15) / 0.3


# ---- tasks ----


def _glyph_task(
    description: str,
    characters: str,
    distortion: Distortion,
    faces: tuple[str, ...] = FACES,
) -> TaskDescription:
    """Describe the task "which of these characters is it"."""
    return TaskDescription(
        description=description,
        class_names=tuple(characters),
        bitmaps=lambda label: glyph_bitmaps(characters[label], faces),
        distortions=(distortion,) * len(characters),
    )


_WORN = Distortion(
    rotation=(-15.0, 15.0),
    scale=(0.7, 1.05),
    stretch=0.15,
    shear=0.15,
    shift=0.15,
    thickness=(-0.5, 1.2),
    contrast=(0.6, 1.0),
    occlusion=0.3,
)

_RESERVED = {
    "digits": "0123456789",
    "greek": "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρστφχψω",
    "cyrillic": "БДЖЗИЙЛУЦЧШЩЪЫЭЮЯЄЂЉЊЋб",
    "armenian": "ԲԳԴԵԶԷԸԹԺԻԽԾԿՀՁՂՃՄՅՆՇՉՊՋՌՎՏՐՑՓՔ",
    "hebrew": "אבגדהוזחטךכלםמנסעףפץצקרשת",
    "operators": "∀∂∃∅∇∈∉∋∏∑√∛∝∞∠∧∨∩∪∫∮≈≠≡≤≥⊂⊃⊆⊕⊗⊥",
    "arrows": "←↑→↓↔↕↖↗↘↙↩↪↺↻⇄⇅⇇⇉⇐⇑⇒⇓⇔⇕⇦⇧⇨⇩",
}
"""Characters that pretraining never shows, nor any character that looks like one of them; tasks choose from them."""

TASKS: dict[str, TaskDescription] = {
    "greek": _glyph_task("Greek letters on very grainy paper", "ΓΔΘΛΞΠΣΦΨΩαβδζηλξω", replace(_WORN, noise=(0.25, 0.4))),
    "cyrillic": _glyph_task("Cyrillic letters, crossed out", "БДЖЗИЛУЦЧШЪЫЭЮЯЄЉЋ", replace(_WORN, strokes=3)),
    "hebrew": _glyph_task(
        "Hebrew letters on grainy paper, struck", "אבגדהוזחטךכלמנסעפץצקשת", replace(_WORN, noise=(0.15, 0.3), strokes=1)
    ),
}
"""Every task by name."""


def _choose(bitmaps: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Choose bitmaps so that each serves as often as any other, up to one; returns (count, 48, 48)."""
    rounds = -(-count // len(bitmaps))
    order = torch.cat([torch.randperm(len(bitmaps), generator=generator) for _ in range(rounds)])
    return bitmaps[order[:count]]


def load_task(name: str, seed: int = 0, train_per_class: int = 40, test_per_class: int = 40) -> Task:
    """Draw the images of a task.

    Args:
        name: a key of :data:`TASKS`.
        seed: the same seed gives the same images.
        train_per_class: training images of each class.
        test_per_class: test images of each class.

    Returns:
        The task; images are ordered by class.

    Raises:
        ValueError: if the name is unknown, a count is below 1, or the task has too few images.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known tasks: {', '.join(TASKS)}")
    return _draw_task(name, TASKS[name], seed, train_per_class, test_per_class)


def _draw_task(name: str, description: TaskDescription, seed: int, train_per_class: int, test_per_class: int) -> Task:
    if min(train_per_class, test_per_class) < 1:
        raise ValueError(f"counts must be at least 1, got train_per_class={train_per_class}, {test_per_class=}")
    generator = torch.Generator().manual_seed((zlib.crc32(name.encode()) << 16) + seed)
    train_images, test_images = [], []
    for label, distortion in enumerate(description.distortions):
        bitmaps = description.bitmaps(label)
        train, test = (_choose(bitmaps, count, generator) for count in (train_per_class, test_per_class))
        train_images.append(distort(train, distortion, generator))
        test_images.append(distort(test, distortion, generator))
    labels = torch.arange(len(description.class_names))
    return Task(
        name=name,
        class_names=description.class_names,
        train_images=torch.cat(train_images),
        train_labels=labels.repeat_interleave(train_per_class),
        test_images=torch.cat(test_images),
        test_labels=labels.repeat_interleave(test_per_class),
    )


# ---- pretraining ----

_PRETRAINING_RANGES = (
    (0x0041, 0x005A),  # Latin capitals
    (0x0061, 0x007A),  # Latin small letters
    (0x00C0, 0x00FF),  # Latin-1 letters
    (0x0180, 0x024F),  # Latin extended B
    (0x0250, 0x02AF),  # phonetic letters
    (0x07C0, 0x07FF),  # N'Ko
    (0x0E80, 0x0EDF),  # Lao
    (0x10A0, 0x10FF),  # Georgian
    (0x1400, 0x167F),  # Canadian syllabics
    (0x2600, 0x26FF),  # symbols
    (0x2D30, 0x2D7F),  # Tifinagh
    (0xA4D0, 0xA4FF),  # Lisu
    (0x10300, 0x1032F),  # Old Italic
)

_LOOK_ALIKE = 0.93
"""Cosine of two bitmaps above which two characters count as the same."""


def _signatures(characters: str) -> Tensor:
    """Return a blurred unit-length bitmap of each character in the first face that has it, (characters, 576)."""
    bitmaps = torch.stack([draw_glyph(character, faces_with(character)[0]) for character in characters])
    small = F.avg_pool2d(bitmaps.unsqueeze(1).float(), 4, stride=2, padding=1).flatten(1)
    return F.normalize(small - small.mean(dim=1, keepdim=True), dim=1)


def _is_drawable(character: str) -> bool:
    """Tell whether some face has the character and draws ink for it."""
    faces = faces_with(character)
    return bool(faces) and _face_font(faces[0]).getmask(character).getbbox() is not None


@cache
def pretraining_characters() -> str:
    """Return the characters of pretraining, one for each class: none belongs to a task, no two look alike."""
    codes = [code for low, high in _PRETRAINING_RANGES for code in range(low, high + 1)]
    letters = [chr(code) for code in codes if unicodedata.category(chr(code))[0] in "LNPS"]
    candidates = "".join(letter for letter in letters if _is_drawable(letter))
    reserved = "".join(_RESERVED.values())
    signatures = _signatures(reserved + candidates)
    similar = signatures @ signatures.T > _LOOK_ALIKE  # (characters, characters)
    kept = list(range(len(reserved)))
    for index in range(len(kept), len(signatures)):
        if not similar[index, kept].any():
            kept.append(index)
    return "".join((reserved + candidates)[index] for index in kept[len(reserved) :])


@cache
def _pretraining_bitmaps(held_out: bool) -> tuple[Tensor, Tensor]:
    """Return the bitmaps, (bitmaps, 48, 48), and labels, (bitmaps,), of pretraining or of its held-out faces.

    Of each character with at least four faces, one (another for each character in turn) is held out.
    """
    bitmaps, labels = [], []
    for label, character in enumerate(pretraining_characters()):
        faces = faces_with(character)
        kept_back = faces[label % len(faces)] if len(faces) >= 4 else None
        chosen = [face for face in faces if (face == kept_back) == held_out]
        bitmaps += [draw_glyph(character, face) for face in chosen]
        labels += [label] * len(chosen)
    return torch.stack(bitmaps), torch.tensor(labels)


def pretraining_batches(
    batches: int,
    batch_size: int = 128,
    seed: int = 0,
    held_out: bool = False,
    distortion: Distortion = PRETRAINING_DISTORTION,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw batches of pretraining images, every class equally often on average.

    Args:
        batches: number of batches.
        batch_size: images in a batch.
        seed: the same seed gives the same batches.
        held_out: draw from the faces that pretraining never shows instead.
        distortion: ranges of the distortions.

    Yields:
        Images, float32 (batch, 1, 28, 28), and labels, int64 (batch,), into :func:`pretraining_characters`.
    """
    bitmaps, labels = _pretraining_bitmaps(held_out)
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / torch.bincount(labels)[labels].double()  # (bitmaps,)
    for _ in range(batches):
        chosen = torch.multinomial(weights, batch_size, replacement=True, generator=generator)
        yield distort(bitmaps[chosen], distortion, generator), labels[chosen]
