"""COMPUTES. torch modules, weights, tokenizers; knows nothing of actors or swapping."""
