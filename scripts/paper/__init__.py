"""The paper's experiments, a command each: `python -m scripts.paper.transparency --help`."""
