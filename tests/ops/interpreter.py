"""Triton's interpreter without two things that it does for nothing, which were two thirds of what the tests in it took."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

UNTOUCHED = tl.range  # stands in both modules until the interpreter puts its own in its place


@functools.cache
def languages(function: Callable[..., Any]) -> list[ModuleType]:
    """What a kernel may call the language by; the interpreter replaces the functions in each of them."""
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]


def call(callee: interpreter.InterpretedFunction, *arguments: Any, **options: Any) -> Any:
    """A kernel's call of a function that is jitted too, in a language that is replaced once a launch and not once a call."""
    if any(language.range is UNTOUCHED for language in languages(callee.fn)):
        interpreter._patch_lang(callee.fn)
    return callee.rewrite()(*arguments, **options)


def hasten() -> None:
    """From now on: sums are not made in 64 bits as well, for an assertion that the interpreter then leaves out."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug  # with it, the assertion is made
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter.InterpretedFunction.__call__ = call
