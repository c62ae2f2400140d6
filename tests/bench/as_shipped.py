"""A worker extension for comparison: its workers keep torchao's own FP8 product."""

import bench_memory
from torchao.float8.inference import addmm_float8_unwrapped_inference
from torchao.quantization.quantize_.workflows.float8 import float8_tensor


class AsShipped(bench_memory.Extension):
    """Everything else is the same."""

    def __new__(cls, *args, **kwargs):
        """Undo that one patch, before there is a model."""
        worker = super().__new__(cls, *args, **kwargs)
        float8_tensor.addmm_float8_unwrapped_inference = addmm_float8_unwrapped_inference
        return worker
