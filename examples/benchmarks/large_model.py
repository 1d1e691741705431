"""Convert a large language model: time, and peak memory above the model itself.

    python examples/benchmarks/large_model.py                       # 1.1 billion parameters in bfloat16, n = 1 of 2
    python examples/benchmarks/large_model.py --layers 4 --templates 2

The model is LLaMA-shaped and built from a configuration with random weights, so nothing is downloaded. Memory is the peak of
the process's resident set during the conversion, less what it was just before; a thread reads it every few milliseconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recast_peft import RecastConfig, get_recast_model, plan_recast, save_compressed_model
from recast_peft.planning.candidates import total_bytes

PAGE = 4096
GIB = 2**30


def resident_bytes() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class PeakMemory:
    """The highest resident set while the context is open, above that at its start."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.before = self.peak = resident_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.peak = max(self.peak, resident_bytes())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.after = resident_bytes()

    @property
    def above(self) -> int:
        """Bytes above the start."""
        return self.peak - self.before


def build(layers: int, width: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model of LLaMA's shape with random weights, built in its dtype so that it is never held twice."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=32000,
        tie_word_embeddings=True,
    )
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02, generator=generator)
        rotary = model.model.rotary_emb  # a buffer that is not stored
        frequencies = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, 64, 2).float() / 64)
        rotary.inv_freq = frequencies
        rotary.original_inv_freq = frequencies.clone()
    return model.eval()


def main() -> None:
    """Convert and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--group-size", type=int, default=2)
    parser.add_argument("--templates", type=int, default=1, help="as many as the group size is exact (default: %(default)s)")
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="also store the compressed model and say how large it is")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    # what the first conversion of a process loads (modules, buffers of the linear algebra) is not the model's
    get_recast_model(build(2, 128, dtype), RecastConfig(target_modules="all-linear", num_templates=1))
    model = build(arguments.layers, arguments.width, dtype)
    before = total_bytes(model)
    config = RecastConfig(target_modules=arguments.targets, group_size=arguments.group_size, num_templates=arguments.templates)
    plan = plan_recast(model, config)
    start = time.perf_counter()
    with PeakMemory() as memory:
        converted = get_recast_model(model, config)
    seconds = time.perf_counter() - start
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        finite = bool(torch.isfinite(converted(input_ids=tokens).logits).all())
    result = {
        "parameters": sum(p.numel() for p in model.parameters()) if plan.groups[0].is_exact else before // 2,
        "model_gib": before / GIB,
        "banks": len(plan.groups),
        "numbers_per_task": plan.num_coefficients,
        "seconds": round(seconds, 2),
        "peak_above_model_gib": memory.above / GIB,
        "largest_group_gib": max(group.weight_bytes for group in plan.groups) / GIB,
        "resident_change_gib": (memory.after - memory.before) / GIB,
        "model_after_gib": total_bytes(model) / GIB,
        "output_is_finite": finite,
    }
    if arguments.save:
        with tempfile.TemporaryDirectory() as folder:
            save_compressed_model(converted, folder)
            result["on_disk_gib"] = sum(path.stat().st_size for path in Path(folder).iterdir()) / GIB
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
