"""The stages of `tools/gpu_check.py`."""
