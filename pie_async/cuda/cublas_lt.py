"""cuBLASLt's matrix products with the algorithm named, which torch does not let one do.

torch asks cuBLAS for one algorithm and takes it. The library's own list holds others, and at the
skinny shapes of decoding the first is often not the fastest. Bound with ctypes to the library
that torch has loaded already; where that cannot be, there are simply no algorithms.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import byref, c_char, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p

import torch
from torch import Tensor

# Values of enumerations in cublasLt.h and library_types.h.
_COMPUTE_FLOAT32 = 68
_DATA_TYPES = {torch.float16: 2, torch.bfloat16: 14}
_FLOAT32 = 0
_TRANSPOSE_A, _EPILOGUE, _BIAS_POINTER = 3, 7, 8
_TRANSPOSED = 1
_ADD_BIAS = 4
_MAX_WORKSPACE, _REDUCTIONS = 1, 3
_MIN_ALIGNMENTS = (5, 6, 7, 8)
_FLOAT32_REDUCTIONS = 3
"""In place or in the compute type: partial sums are never rounded to the output's dtype."""

_ALIGNMENT_BYTES = 256
"""Of operands, as torch allocates them; the library leaves algorithms out for less."""
_STRIDE_BYTES = 16
_ALGORITHM_BYTES = 64
_WORKSPACE_BYTES = 32 * 2**20
_ALLOWANCES = (0, 2**20, 8 * 2**20, _WORKSPACE_BYTES)
"""Workspaces to propose algorithms for: with more, those that need less are not proposed."""
_AT_MOST = 8
"""Algorithms per allowance; the library has no more. Their order says little of their speed."""


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", c_char * _ALGORITHM_BYTES),
        ("workspace_bytes", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


def version() -> int:
    """The library's version, 0 where there is none; algorithms are good for one version."""
    library = _library()
    return 0 if library is None else int(library.cublasLtGetVersion())


def can_multiply(x: Tensor, weight: Tensor) -> bool:
    """Whether `multiply` takes these; otherwise it must not be called."""
    item = x.element_size()
    return (
        x.is_cuda
        and x.dtype == weight.dtype
        and x.dtype in _DATA_TYPES
        and x.stride(1) == 1
        and weight.is_contiguous()
        and not (x.stride(0) * item % _STRIDE_BYTES or weight.shape[1] * item % _STRIDE_BYTES)
        and not (x.data_ptr() % _ALIGNMENT_BYTES or weight.data_ptr() % _ALIGNMENT_BYTES)
        and _library() is not None
    )


def algorithms(m: int, n: int, k: int, dtype: torch.dtype) -> list[str]:
    """What the library proposes for [m, k] by [n, k], its favourite first; each named in hex."""
    library = _library()
    if library is None or dtype not in _DATA_TYPES:
        return []
    plan = _plan(m, n, k, k, dtype, False)
    if plan is None:
        return []
    proposed = (_propose(library, plan, allowance) for allowance in reversed(_ALLOWANCES))
    return list(dict.fromkeys(name for names in proposed for name in names))


def _propose(library: ctypes.CDLL, plan: _Plan, allowance: int) -> list[str]:
    preference = c_void_p()
    if library.cublasLtMatmulPreferenceCreate(byref(preference)):
        return []
    wanted = [(_MAX_WORKSPACE, c_uint64(allowance)), (_REDUCTIONS, c_uint32(_FLOAT32_REDUCTIONS))]
    wanted += [(each, c_uint32(_ALIGNMENT_BYTES)) for each in _MIN_ALIGNMENTS]
    for name, value in wanted:
        library.cublasLtMatmulPreferenceSetAttribute(
            preference, name, byref(value), c_size_t(ctypes.sizeof(value))
        )
    found, count = (_Heuristic * _AT_MOST)(), c_int()
    status = library.cublasLtMatmulAlgoGetHeuristic(
        _handle(), *plan.operands, preference, c_int(_AT_MOST), found, byref(count)
    )
    library.cublasLtMatmulPreferenceDestroy(preference)
    return [] if status else [_name(each) for each in found[: count.value] if not each.status]


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, algorithm: str) -> Tensor | None:
    """x W^T + b by one of `algorithms`; None where it cannot do that shape.

    Products must not overlap: they share a workspace.

    Args:
        x: [m, k], rows may be apart. weight: [n, k]. bias: [n]. See `can_multiply`.
    """
    library = _library()
    assert library is not None
    (m, k), n = x.shape, weight.shape[0]
    plan = _plan(m, n, k, x.stride(0), x.dtype, bias is not None)
    if plan is None:
        return None
    if bias is not None:
        plan.set(_BIAS_POINTER, c_void_p(bias.data_ptr()))
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    workspace = _workspace(x.device)
    description, weight_layout, x_layout, out_layout, _ = plan.operands
    status = library.cublasLtMatmul(
        _handle(),
        description,
        byref(_ONE),
        c_void_p(weight.data_ptr()),
        weight_layout,
        c_void_p(x.data_ptr()),
        x_layout,
        byref(_ZERO),
        c_void_p(out.data_ptr()),
        out_layout,
        c_void_p(out.data_ptr()),
        out_layout,
        _algorithm(algorithm),
        c_void_p(workspace.data_ptr()),
        c_size_t(_WORKSPACE_BYTES),
        c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
    )
    return None if status else out


_ONE, _ZERO = c_float(1.0), c_float(0.0)


class _Plan:
    """Descriptors of one product; kept for good, since an engine has few shapes."""

    def __init__(
        self, library: ctypes.CDLL, description: c_void_p, layouts: list[c_void_p]
    ) -> None:
        self._library = library
        self._description = description
        weight, x, out = layouts
        self.operands = (description, weight, x, out, out)

    def set(self, name: int, value: c_void_p | c_int) -> int:
        status: int = self._library.cublasLtMatmulDescSetAttribute(
            self._description, name, byref(value), c_size_t(ctypes.sizeof(value))
        )
        return status


@functools.cache
def _plan(
    m: int, n: int, k: int, x_stride: int, dtype: torch.dtype, has_bias: bool
) -> _Plan | None:
    """Rows are the library's columns: out^T [n, m] = W x^T, W given as its transpose."""
    library = _library()
    assert library is not None
    description = c_void_p()
    status = library.cublasLtMatmulDescCreate(byref(description), _COMPUTE_FLOAT32, _FLOAT32)
    layouts = []
    for rows, columns, stride in ((k, n, k), (k, m, x_stride), (n, m, n)):
        layout = c_void_p()
        status |= library.cublasLtMatrixLayoutCreate(
            byref(layout), _DATA_TYPES[dtype], c_uint64(rows), c_uint64(columns), c_int64(stride)
        )
        layouts.append(layout)
    if status:
        return None
    plan = _Plan(library, description, layouts)
    status = plan.set(_TRANSPOSE_A, c_int(_TRANSPOSED))
    if has_bias:
        status |= plan.set(_EPILOGUE, c_int(_ADD_BIAS))
    return None if status else plan


def _name(found: _Heuristic) -> str:
    return ctypes.string_at(ctypes.addressof(found), _ALGORITHM_BYTES).hex()


@functools.cache
def _algorithm(name: str) -> ctypes.Array[c_char]:
    return ctypes.create_string_buffer(bytes.fromhex(name), _ALGORITHM_BYTES)


@functools.cache
def _library() -> ctypes.CDLL | None:
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    try:
        library = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}")
    except OSError:
        return None
    library.cublasLtGetVersion.restype = c_size_t
    return library


@functools.cache
def _handle() -> c_void_p:
    library = _library()
    assert library is not None
    handle = c_void_p()
    if library.cublasLtCreate(byref(handle)):
        raise RuntimeError("cublasLtCreate failed")
    return handle


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
