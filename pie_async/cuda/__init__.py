"""TOUCHES. The NVIDIA device, through cuda-python; nothing of it is built yet."""
