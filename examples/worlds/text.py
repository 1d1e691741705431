"""The world of sentences: MiniLM-L6 and what the docstrings of installed libraries say.

Four tasks, none of which a linear probe solves or misses altogether: which field of science a function of scipy or
scikit-learn belongs to, what type an argument has by its description, which kind of object a sentence documents, and which
library it comes from.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from .base import Split, Task, World, draw_evenly, labels_of
from .weights import load_minilm, minilm_folder, package_folder

TOKENS = 24  # of a sentence that are read
LIBRARIES = ("PIL", "huggingface_hub", "matplotlib", "networkx", "numpy", "peft", "scipy", "sklearn", "sympy")
FIELDS = {  # of the task ``field``: folders of scipy and scikit-learn
    "scipy": ("fft", "interpolate", "linalg", "ndimage", "optimize", "signal", "sparse", "spatial", "stats"),
    "sklearn": ("datasets", "ensemble", "linear_model", "metrics", "preprocessing"),
}
TYPES = {  # of the task ``type``: how numpy's style of docstrings begins the type of an argument
    "array": r"array|ndarray|sparse matrix|\{array",
    "bool": r"bool",
    "callable": r"callable|function\b",
    "dict": r"dict",
    "float": r"float",
    "int": r"int\b",
    "str": r"str\b|\{['\"]",
    "tuple": r"tuple|sequence|list",
}
SKIPPED_FOLDERS = {"tests", "test", "testing", "externals", "_lib", "_vendored", "benchmarks"}
_OBJECT = re.compile(r"([ \t]*)(?:async )?(def|class) (\w+)")
_ARGUMENT = re.compile(r":(?:(?<=\w:)|(?<=\w :)) ([^\n]+)\n([ \t]+)([A-Z][^\n]*(?:\n\2\S[^\n]*)*)")  # from the colon: fast


class Docstring(NamedTuple):
    """Where a docstring stands, what it documents, and its first sentence."""

    file: Path
    kind: str
    sentence: str


def plain(text: str) -> str:
    """A sentence without markup: ``:class:`` and backticks go, white space becomes one space."""
    return " ".join(re.sub(r":\w+:`~?|`+|\*\*", "", text).split())


def docstrings(file: Path) -> Iterator[Docstring]:
    """First paragraphs of the docstrings of a source file, found line by line (parsing takes twenty times as long)."""
    lines = file.read_text(encoding="utf-8", errors="ignore").split("\n")
    kind, decorator = "", ""
    for i, line in enumerate(lines):
        found = _OBJECT.match(line)
        if found:
            callable_kind = "property" if "property" in decorator else "method" if found[1] else "function"
            kind = "class" if found[2] == "class" else callable_kind
        text = line.strip()
        decorator = text if text.startswith("@") else ("" if text and not found else decorator)
        opening = re.match(r'[rR]?"""', text)
        if opening and i and lines[i - 1].rstrip().endswith(":") and kind:
            paragraph = [text[opening.end() :]]
            for more in lines[i + 1 : i + 8]:
                if '"""' in paragraph[-1] or (paragraph[-1] == "" and len(paragraph) > 1):
                    break
                paragraph.append(more.strip())
            sentence = plain(" ".join(paragraph).split('"""')[0])
            yield Docstring(file, kind, re.split(r"(?<=\w\w)\. ", sentence)[0])
            kind = ""


@cache
def sources(library: str) -> tuple[Path, ...]:
    """Source files of an installed library, its tests aside."""
    root = package_folder(library)
    return tuple(
        path
        for path in sorted(root.rglob("*.py"))
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts) and not path.name.startswith("test")
    )


@cache
def library_docstrings(library: str) -> tuple[Docstring, ...]:
    """Docstrings of a library whose first sentence says something."""
    return tuple(doc for file in sources(library) for doc in docstrings(file) if 4 <= len(doc.sentence.split()) <= 40)


def by_library() -> dict[str, list[str]]:
    """Sentences by the library that they come from; its own name is hidden."""
    hide = {name: re.compile(rf"\b({name}|scikit-learn|pillow|image(?=s?\b))\w*", re.I) for name in LIBRARIES}
    return {name: [hide[name].sub("it", doc.sentence) for doc in library_docstrings(name)] for name in LIBRARIES}


def by_field() -> dict[str, list[str]]:
    """Sentences of scipy and scikit-learn by the folder that they come from."""
    found = defaultdict(list)
    for library, folders in FIELDS.items():
        root = package_folder(library)
        for doc in library_docstrings(library):
            folder = doc.file.relative_to(root).parts[0]
            if folder in folders:
                found[folder].append(doc.sentence)
    return found


def by_kind() -> dict[str, list[str]]:
    """Sentences by what they document: a class, function, method or property."""
    found = defaultdict(list)
    for library in LIBRARIES:
        for doc in library_docstrings(library):
            found[doc.kind].append(doc.sentence)
    return found


def by_type() -> dict[str, list[str]]:
    """Descriptions of arguments by the type that the docstring gives them."""
    found = defaultdict(list)
    for library in ("scipy", "sklearn", "numpy", "matplotlib", "networkx"):
        for file in sources(library):
            for given, _, text in _ARGUMENT.findall(file.read_text(encoding="utf-8", errors="ignore")):
                matching = [name for name, start in TYPES.items() if re.match(start, given)]
                if matching and len(text.split()) >= 4:
                    found[matching[0]].append(plain(text))
    return found


@cache
def tokenizer() -> object:
    """MiniLM's own."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_folder())


def encode(sentences: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers and mask, each ``(sentences, TOKENS)``."""
    cut = tokenizer()(sentences, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")  # type: ignore[operator]
    return cut["input_ids"], cut["attention_mask"]


def make_task(name: str, sentences_by_class: Callable[[], dict[str, list[str]]], train: int, test: int) -> Task:
    """A task of sentences; a sentence that stands in two classes is in neither, and none is met twice."""
    found = {label: sorted(set(sentences)) for label, sentences in sentences_by_class().items()}
    count: dict[str, int] = defaultdict(int)
    for sentences in found.values():
        for sentence in sentences:
            count[sentence.lower()] += 1
    unique = {label: [s for s in sentences if count[s.lower()] == 1] for label, sentences in found.items()}
    classes, *parts = draw_evenly(unique, train, test)
    learn, check = (Split(encode([item for item, _ in part]), labels_of(part)) for part in parts)
    return Task(name, classes, learn, check)


TEXT = World(
    name="text",
    backbone=load_minilm,
    width=384,
    head="classifier",
    tasks={
        "field": partial(make_task, "field", by_field, 60, 120),
        "type": partial(make_task, "type", by_type, 100, 200),
        "kind": partial(make_task, "kind", by_kind, 200, 400),
        "library": partial(make_task, "library", by_library, 100, 200),
    },
    epochs=4,
    head_lr=2e-2,
    lora_targets=["query", "value"],
    norm_targets=["LayerNorm"],
    ia3_targets=["key", "value", "intermediate.dense"],
    ia3_feedforward=["intermediate.dense"],
    special_tokens=(103, 0, 100, 101, 102),  # [MASK], then [PAD], [UNK], [CLS], [SEP]
)
