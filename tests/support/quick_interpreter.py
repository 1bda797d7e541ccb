"""Triton's interpreter without what it does for nothing: half of what our kernels' tests took.

- For every launch of a kernel, and every call of a device function within one, it goes through all
  of `triton.language` for what is to behave otherwise while it interprets. Where kernels are never
  compiled that can be done once.
- Every addition and product of integers is done again in 64 bits to find overflows, but without its
  debug mode, which we don't use, the result is dropped.
- The table that says which NumPy type a Triton type is gets made anew at each look.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class _Stays:
    def restore(self) -> None:
        """Nothing compiles a kernel in this process."""


@functools.cache
def quicken() -> None:
    """For the rest of this process.

    These are Triton's own affairs: a version that goes about them in another way is left as it is.
    """
    if prepare := getattr(interpreter, "_patch_lang", None):
        interpreter._patch_lang = _once(prepare)
    if np_dtype := getattr(interpreter, "_get_np_dtype", None):
        interpreter._get_np_dtype = _remembered(np_dtype)
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not options.debug:
        builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _once(prepare: Any) -> Any:
    modules: set[ModuleType] = set()
    functions: set[Any] = set()

    def prepare_if_new(fn: Any) -> _Stays:
        if fn not in functions:
            used = {each for each in fn.__globals__.values() if inspect.ismodule(each)}
            if not used & {tl, tl.core} <= modules:
                prepare(fn)
            modules.update(used)
            functions.add(fn)
        return _Stays()

    return prepare_if_new


def _remembered(np_dtype: Any) -> Any:
    known: dict[tl.dtype, Any] = {}

    def look_up(kind: Any) -> Any:
        scalar = kind.scalar  # of a block: its elements'
        if scalar.is_ptr():
            return np_dtype(kind)
        found = known.get(scalar)
        if found is None:
            found = known[scalar] = np_dtype(kind)
        return found

    return look_up
