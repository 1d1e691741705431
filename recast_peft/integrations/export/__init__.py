"""Models for devices without Python: one graph, and tasks of a few hundred bytes that go in and out of it.

tasks.py    a task (or many) as plain tensors, and the files that hold them
layers.py   modules that compute with a task that is given to the call
lora.py     the LoRA part of such a task
graph.py    the model with such modules in place of ours, and what cannot be exported
program.py  torch.export and AOTInductor
onnx.py     ONNX
"""

from .onnx import export_onnx
from .program import export_aoti, export_program
from .tasks import export_task, export_tasks

__all__ = ["export_aoti", "export_onnx", "export_program", "export_task", "export_tasks"]
