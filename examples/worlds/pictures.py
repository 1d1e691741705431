"""The world of pictures: an ImageNet EfficientNet-Lite0 and what can be drawn from installed packages.

Four tasks, none of which a linear probe solves or misses altogether: handwritten digits (scikit-learn's), what an icon is
about (Font Awesome's own categories, tested on icons that were never seen), the font of a word, and the script of a word
(both with matplotlib's fonts). Icons and words are drawn in random colours, sizes, places and angles.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .base import Split, Task, World, draw_evenly, labels_of
from .weights import load_efficientnet, package_folder

SIZE = 96  # of a picture, in pixels
CATEGORIES = (
    "animals",
    "buildings",
    "food-beverage",
    "hands",
    "household",
    "medical-health",
    "sports-fitness",
    "transportation",
    "users-people",
    "weather",
)
FONTS = {
    "computer modern roman": "cmr10",
    "computer modern sans": "cmss10",
    "computer modern typewriter": "cmtt10",
    "computer modern bold": "cmb10",
    "sans": "DejaVuSans",
    "sans bold": "DejaVuSans-Bold",
    "sans oblique": "DejaVuSans-Oblique",
    "mono": "DejaVuSansMono",
    "serif": "DejaVuSerif",
    "serif italic": "DejaVuSerif-Italic",
    "times": "STIXGeneral",
    "times italic": "STIXGeneralItalic",
}
SCRIPTS = {  # first and last letter
    "arabic": (0x0627, 0x064A),
    "armenian": (0x0561, 0x0586),
    "cyrillic": (0x0430, 0x044F),
    "georgian": (0x10D0, 0x10F0),
    "greek": (0x03B1, 0x03C9),
    "hebrew": (0x05D0, 0x05EA),
    "lao": (0x0E81, 0x0EAE),
    "latin": (0x0061, 0x007A),
    "syllabics": (0x1401, 0x1460),
    "tifinagh": (0x2D30, 0x2D65),
}
Drawing = Callable[[np.random.Generator], Image.Image]


@cache
def matplotlib_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of the fonts that matplotlib brings."""
    return ImageFont.truetype(package_folder("matplotlib") / "mpl-data" / "fonts" / "ttf" / f"{name}.ttf", size)


def colours(generator: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Random ink and paper, light on dark or dark on light."""
    ink, paper = generator.integers(0, 110, 3), generator.integers(145, 256, 3)
    pair = (tuple(map(int, ink)), tuple(map(int, paper)))
    return pair if generator.random() < 0.5 else (pair[1], pair[0])


def on_paper(mask: Image.Image, generator: np.random.Generator, noise: float) -> np.ndarray:
    """A picture ``(SIZE, SIZE, 3)`` of a shape (its mask in grey) in random colours, turned a little, with grain."""
    mask = mask.rotate(float(generator.uniform(-15, 15)), resample=Image.Resampling.BILINEAR)
    ink, paper = (Image.new("RGB", (SIZE, SIZE), colour) for colour in colours(generator))
    paper.paste(ink, mask=mask)
    grain = generator.normal(0, noise, (SIZE, SIZE, 3))
    return np.clip(np.asarray(paper) + grain, 0, 255).astype(np.uint8)


def draw_text(text: str, font: ImageFont.FreeTypeFont, generator: np.random.Generator) -> Image.Image:
    """The mask of a text, at a random place near the middle."""
    mask = Image.new("L", (SIZE, SIZE))
    middle = tuple(SIZE / 2 + generator.uniform(-8, 8, 2))
    ImageDraw.Draw(mask).text(middle, text, fill=255, font=font, anchor="mm")
    return mask


def pixels(pictures: list[np.ndarray]) -> tuple[Tensor]:
    """What the network is given: ``(pictures, 3, SIZE, SIZE)`` from -1 to 1, as it was pretrained."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)  # channels stay last in memory: faster
    return ((stacked.float() - 127) / 128,)


def make_task(
    name: str, drawings: Callable[[], dict[str, list[Drawing]]], train: int, test: int, noise: float = 12, seed: int = 0
) -> Task:
    """A task of pictures: what is drawn for the test is never drawn for training."""
    classes, *parts = draw_evenly(drawings(), train, test, seed)
    generator = np.random.default_rng(seed)
    splits = [
        Split(pixels([on_paper(draw(generator), generator, noise) for draw, _ in part]), labels_of(part)) for part in parts
    ]
    return Task(name, classes, *splits)


def handwritten_digits() -> dict[str, list[Drawing]]:
    """scikit-learn's handwritten digits of 8 x 8 pixels, enlarged."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)

    def draw(image: np.ndarray, generator: np.random.Generator) -> Image.Image:
        side = int(generator.integers(SIZE // 2, SIZE))
        small = Image.fromarray((image.reshape(8, 8) * 15.9).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        mask = Image.new("L", (SIZE, SIZE))
        mask.paste(small, tuple(map(int, generator.integers(0, SIZE - side, 2))))
        return mask

    return {str(k): [partial(draw, image) for image in images[labels == k]] for k in range(10)}


def icon_folder() -> Path:
    """Where Font Awesome lies."""
    return package_folder("fontawesomefree") / "static" / "fontawesomefree"


def categories() -> dict[str, list[str]]:
    """Icons by category, in the file's order; an icon of two chosen categories is in neither."""
    found: dict[str, list[str]] = {}
    for line in (icon_folder() / "metadata" / "categories.yml").read_text().splitlines():  # a plain list: no YAML is needed
        if not line.startswith(" "):
            current = found.setdefault(line.rstrip(":"), [])
        elif line.startswith("    - "):
            current.append(line[6:].strip("'\""))
    chosen = {name: found[name] for name in CATEGORIES}
    count = Counter(icon for icons in chosen.values() for icon in icons)
    return {name: [icon for icon in icons if count[icon] == 1] for name, icons in chosen.items()}


def category_icons() -> dict[str, list[Drawing]]:
    """Font Awesome's solid icons by category."""
    codes = json.loads((icon_folder() / "metadata" / "icons.json").read_text())
    file = icon_folder() / "otfs" / "Font Awesome 6 Free-Solid-900.otf"

    def draw(letter: str, generator: np.random.Generator) -> Image.Image:
        font = ImageFont.truetype(file, int(generator.integers(SIZE // 2, SIZE * 3 // 4)))
        return draw_text(letter, font, generator)

    letters = {
        name: [chr(int(codes[icon]["unicode"], 16)) for icon in icons if "solid" in codes[icon]["styles"]]
        for name, icons in categories().items()
    }
    return {name: [partial(draw, letter) for letter in found] for name, found in letters.items()}


def random_words(first: int, last: int, count: int, generator: np.random.Generator) -> list[str]:
    """Strings of three to five letters."""
    return ["".join(map(chr, generator.integers(first, last + 1, generator.integers(3, 6)))) for _ in range(count)]


def draw_word(word: str, font: str, generator: np.random.Generator) -> Image.Image:
    """A word in a font of a random size."""
    return draw_text(word, matplotlib_font(font, int(generator.integers(18, 30))), generator)


def words_in_fonts(count: int = 60) -> dict[str, list[Drawing]]:
    """Words of Latin letters by font."""
    generator = np.random.default_rng(1)
    return {
        name: [partial(draw_word, word, font) for word in random_words(*SCRIPTS["latin"], count, generator)]
        for name, font in FONTS.items()
    }


def words_in_scripts(count: int = 60) -> dict[str, list[Drawing]]:
    """Words of one font by the script of their letters."""
    generator = np.random.default_rng(2)
    return {
        name: [partial(draw_word, word, "DejaVuSans") for word in random_words(*letters, count, generator)]
        for name, letters in SCRIPTS.items()
    }


PICTURES = World(
    name="pictures",
    backbone=load_efficientnet,
    width=1280,
    head="classifier",
    tasks={
        "digits": partial(make_task, "digits", handwritten_digits, 16, 40),
        "icons": partial(make_task, "icons", category_icons, 14, 40),
        "fonts": partial(make_task, "fonts", words_in_fonts, 20, 40),
        "scripts": partial(make_task, "scripts", words_in_scripts, 16, 40),
    },
    epochs=20,
    head_lr=1e-2,
    lora_targets=r".*\.(conv_pw|conv_pwl)",
    norm_targets=r".*\.bn\d",
    ia3_targets=r".*\.(conv_pw|conv_pwl)",
)
