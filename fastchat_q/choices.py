"""What may be chosen on a worker's command line. Here, so that the command line need not import the worker half."""

from typing import Literal

EngineName = Literal["transformers", "echo"]
Device = Literal["auto", "cpu", "cuda", "mps", "xpu", "npu"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
