"""TOUCHES. The NVIDIA device, through cuda-python and torch."""
