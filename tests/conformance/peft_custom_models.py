"""Run PEFT's own tests of custom models with RECAST as the method.

The source release of the installed PEFT carries its tests. They are fetched from the package registry into a temporary
folder, the two tables of cases in ``tests/test_custom_models.py`` are replaced by cases of RECAST, and pytest runs the file.

    python tests/conformance/peft_custom_models.py            # all cases
    python tests/conformance/peft_custom_models.py -k merge   # further arguments go to pytest

The exit status is 0 only if tests ran and none failed.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

TEST_FILE = "test_custom_models.py"
NEEDED = ("diffusers", "datasets", "parameterized", "scipy")  # what PEFT's tests import beside our own test tools

# The name of each case, the model of PEFT's test file, and what RecastConfig is given.
CASES = [
    ("one linear layer", "MLP", {"target_modules": "lin0"}),
    ("one linear layer in a list", "MLP", {"target_modules": ["lin0"]}),
    ("another linear layer", "MLP", {"target_modules": ["lin1"]}),
    ("two linear layers", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("a module saved whole", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("two coefficient sets", "MLP", {"target_modules": ["lin0"], "num_coefficient_sets": 2}),
    ("transposed linear", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("embedding", "EmbConv1D", {"target_modules": ["emb"]}),
    ("convolution 1d", "Conv1d", {"target_modules": ["conv1d"]}),
    ("convolution 2d", "Conv2d", {"target_modules": ["conv2d"]}),
    ("convolution and linear", "Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    ("grouped convolution", "Conv2dGroups", {"target_modules": ["conv2d"]}),
    ("convolution 3d", "Conv3d", {"target_modules": ["conv3d"]}),
    ("multi-head attention", "MHA", {"target_modules": ["mha"]}),
    ("a LoRA part", "MLP", {"target_modules": ["lin0"], "lora_config": {"r": 4}}),
    ("a LoRA part elsewhere", "MLP", {"target_modules": ["lin0"], "lora_config": {"target_modules": ["lin1"]}}),
    ("a DoRA part", "MLP", {"target_modules": ["lin0"], "lora_config": {"target_modules": ["lin0", "lin1"], "use_dora": True}}),
    (
        "a LoRA part on a convolution",
        "Conv2d",
        {"target_modules": ["conv2d"], "lora_config": {"target_modules": ["conv2d", "lin0"]}},
    ),
    (
        "a LoRA part on an embedding",
        "EmbConv1D",
        {"target_modules": ["emb"], "lora_config": {"target_modules": ["emb", "conv1d"]}},
    ),
]
# Two of PEFT's tests take every parameter without the method's own prefix for one of the base, so those of a LoRA part too.
NOT_FOR_PARTS = "part and (test_training_custom_models or test_only_params_are_updated)"
PAIRS = [
    ("the same targets", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("other targets", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    (
        "LoRA parts",
        {"target_modules": ["lin0"], "lora_config": {"r": 4}},
        {"target_modules": ["lin0"], "lora_config": {"r": 2}},
    ),
]
# Tables of PEFT's file that list cases by method; each is replaced as a whole.
TABLES = ("TEST_CASES", "ALL_PEFT_CONFIG_CLASSES", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES")


def replacement(table: str) -> str:
    """The source of a table, with RECAST's cases in place of PEFT's."""
    if table == "ALL_PEFT_CONFIG_CLASSES":
        return f"{table} = [RecastConfig]"
    if table == "TEST_CASES":
        rows = [f"(RECAST {name!r}, {model!r}, RecastConfig, {options!r})" for name, model, options in CASES]
    else:
        random = {"init_weights": False}
        rows = [
            f"(RECAST {name!r}, 'recast', RecastConfig, { ({**first, **random})!r}, { ({**second, **random})!r})"
            for name, first, second in PAIRS
        ]
    return f"{table} = [{', '.join(row.replace('(RECAST ', '(', 1) for row in rows)}]"


def with_recast_cases(source: str) -> str:
    """PEFT's test file with its tables replaced.

    Raises:
        SystemExit: if a table is not where it is expected, so that a changed PEFT is noticed.
    """
    lines = source.splitlines()
    assignments = {
        node.targets[0].id: node
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in TABLES
    }
    missing = [table for table in TABLES if table not in assignments]
    if missing:
        sys.exit(f"{TEST_FILE} of this PEFT has no table {', '.join(missing)}; this script must follow the change")
    for table, node in sorted(assignments.items(), key=lambda item: -item[1].lineno):
        lines[node.lineno - 1 : node.end_lineno] = [replacement(table)]
    imports = next(i for i, line in enumerate(lines) if line.startswith("import torch"))
    lines.insert(imports, "from recast_peft import RecastConfig")
    return "\n".join(lines) + "\n"


def fetch_tests(folder: Path) -> Path:
    """Download and unpack the source release of the installed PEFT; returns its folder of tests."""
    version = importlib.metadata.version("peft")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source_only = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    subprocess.run([*pip, "download", "-q", *source_only, "-d", str(folder), f"peft=={version}"], check=True)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    tests = next(folder.glob("peft-*/tests"))
    (tests / "__init__.py").touch()
    return tests


def main() -> int:
    """Fetch, replace, run; returns pytest's exit status."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *absent], check=True)
    with tempfile.TemporaryDirectory() as folder:
        tests = fetch_tests(Path(folder))
        target = tests / TEST_FILE
        target.write_text(with_recast_cases(target.read_text()))
        options = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:warnings", "-q", "--tb=short"]
        # the parametrised tests whose name bears the method; PEFT's tests of one other method stay out
        options += ["-n", "auto", "-k", f"(RecastConfig or recast) and not ({NOT_FOR_PARTS})", *sys.argv[1:]]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pytest", *options, str(target)]
        return subprocess.run(command, cwd=tests.parent, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
