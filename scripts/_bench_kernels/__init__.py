"""Kernels alone: measures anew what the configuration tables beside them say."""
