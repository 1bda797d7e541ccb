"""Capturing beside what other threads do, on a GPU."""

from __future__ import annotations

import threading

import pytest
import torch

from pie_async.cuda.graphs import capture
from pie_async.model.transfer import download, upload

pytestmark = pytest.mark.gpu


def test_results_may_be_dropped_by_another_thread_while_a_graph_is_captured() -> None:
    """As the event loop does with an iteration's tokens while the launch thread captures."""
    device = torch.device("cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        numbers = torch.arange(4096, device=device)
        results = [download(numbers) for _ in range(8)]
        torch.cuda.current_stream().synchronize()
        out = torch.zeros_like(numbers)

        def work() -> None:
            dropper = threading.Thread(target=results.pop)
            dropper.start()
            dropper.join()
            torch.add(numbers, 1, out=out)

        pieces = capture([work, work], torch.cuda.graph_pool_handle())
        assert len(results) == 4
        results.clear()
        for _ in range(20):  # torch looks after freed pinned memory when it needs some
            again = upload(list(range(4096)), device)
        for piece in pieces:
            piece.replay()
        found = download(out)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(found, torch.arange(4096) + 1)
    assert torch.equal(again.cpu(), torch.arange(4096))


def test_pieces_hand_on_what_is_kept_while_others_share_their_memory() -> None:
    """Two programs of two pieces in one pool, replayed in turn."""
    with torch.cuda.stream(torch.cuda.Stream()):
        pool = torch.cuda.graph_pool_handle()
        source = torch.zeros(1 << 20, device="cuda")
        kept: dict[str, torch.Tensor] = {}
        outs = {name: torch.empty_like(source) for name in "ab"}

        def program(name: str, factor: float):
            def first() -> None:
                kept[name] = (source * factor).square().sqrt()

            def second() -> None:
                hidden = kept[name]
                outs[name].copy_((hidden * 2 + 1) - hidden)

            return capture([first, second], pool)

        programs = {"a": program("a", 3.0), "b": program("b", 5.0)}
        for turn in range(4):
            source.fill_(float(turn))
            for name, factor in (("a", 3.0), ("b", 5.0)):
                for piece in programs[name]:
                    piece.replay()
                torch.cuda.current_stream().synchronize()
                assert bool((outs[name] == turn * factor + 1).all())
