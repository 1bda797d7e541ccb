"""Kernels are tested in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not published for this platform")


@pytest.fixture(params=["interpreted", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the kernels of a test run; a process has them compiled or interpreted, not both."""
    if request.param == "gpu":
        with torch.cuda.stream(torch.cuda.Stream()):  # graphs cannot be captured on the default one
            yield torch.device("cuda")
    elif torch.cuda.is_available():
        pytest.skip("kernels are compiled on this machine")
    else:
        from tests.support.quick_interpreter import quicken

        quicken()
        yield torch.device("cpu")


def pytest_itemcollected(item: pytest.Item) -> None:
    """In the interpreter integers wrap around as on a GPU, and NumPy warns of it."""
    item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
