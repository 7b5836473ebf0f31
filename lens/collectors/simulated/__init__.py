"""Simulated cards: a workload-driven model beneath the vendor's own library, never a collector beside the real one.

Training slots → `workload` → `device` → `fake_nvml` → the real pynvml → the real NVIDIA collector. No random walk:
when the run stalls, the card idles. Every number made here carries the label ``simulated=true``.
"""
