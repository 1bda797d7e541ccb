"""Attention kernels alone, ours and FlashInfer's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from scripts._bench_gpu.options import Options
from scripts._bench_gpu.peers import FlashInfer, PeerFailed
from scripts._bench_gpu.roofline import Roofline
from scripts._bench_gpu.rows import Row

_DECODE = ((64, 1024), (64, 8192))
_PREFILL = (8, 2048)
_TARGET = 0.85


def kernel_rows(options: Options, roofline: Roofline) -> Iterator[Row]:
    """Decode against the read rate; decode and prefill against FlashInfer, where it is given."""
    if options.engine.device != "cuda":
        yield Row(
            group="attention", name="attention kernels", kind="time", unit="us",
            note="they need a GPU",
        )  # fmt: skip
        return
    from scripts._bench_gpu.attention import decode_attention_s, prefill_attention_s

    peer = _flashinfer(options)
    for batch, context in _DECODE:
        measured_s = decode_attention_s(roofline.shape, batch, context)
        what = f"decode attention, batch {batch}, context {context}"
        yield Row(
            group="attention", name=what, kind="time", unit="us", measured=measured_s,
            against=roofline.attention_s(batch, context), against_name="roofline", target=_TARGET,
        )  # fmt: skip
        if peer is not None:
            yield _against(what, measured_s, lambda b=batch, c=context: peer.decode_s(b, c))  # type: ignore[misc]
    batch, tokens = _PREFILL
    measured_s = prefill_attention_s(roofline.shape, batch, tokens)
    what = f"prefill attention, {batch} x {tokens} tokens"
    if peer is None:
        yield Row(group="attention", name=what, kind="time", unit="us", measured=measured_s)
    else:
        yield _against(what, measured_s, lambda: peer.prefill_s(batch, tokens))


def _against(what: str, measured_s: float, measure: Callable[[], float]) -> Row:
    peer_s, note = None, ""
    try:
        peer_s = measure()
    except PeerFailed as failure:
        note = str(failure)
    return Row(
        group="attention", name=f"{what}, beside a peer", kind="time", unit="us",
        measured=measured_s, against=peer_s, against_name="FlashInfer", note=note,
    )  # fmt: skip


def _flashinfer(options: Options) -> FlashInfer | None:
    if options.flashinfer is None:
        return None
    if options.flashinfer_script is None:
        raise SystemExit(f"there is no bench_flashinfer.py in {options.flashinfer}")
    return FlashInfer(options.flashinfer, options.flashinfer_script, options.peer_seconds)
