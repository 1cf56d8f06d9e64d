"""What may be chosen on the command line. Here, so that the command line need not import what it runs."""

from typing import Literal

EngineName = Literal["transformers", "echo"]
Device = Literal["auto", "cpu", "cuda", "mps", "xpu", "npu"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
JobFilter = Literal["running", "queued", "delayed", "parked"]
"""Jobs that have not ended: ``queued`` is all that wait, ``delayed`` and ``parked`` are those that are not in line."""
