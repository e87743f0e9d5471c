"""Triton's interpreter without what it does again and again: the same values, in a third of the time."""

import inspect
from functools import cache
from typing import Any

import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.language.semantic import TritonSemantic


def faster() -> None:
    patched_once()
    shaped_once()
    no_idle_checks()


def patched_once() -> None:
    """A launch fits triton.language to the interpreter once, and not again in every call of a function inside.

    That was a third of the time of these tests. When any launch ends, what others have is fitted again, as before.
    """
    run, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    if getattr(patch, "once", False):
        return
    fitted: set[str] = set()  # the modules that are, now

    @cache
    def languages(fn: Any) -> frozenset[str]:
        modules = (m for m in fn.__globals__.values() if inspect.ismodule(m))
        return frozenset(m.__name__ for m in modules if m is tl or m is tl.core)

    def launch(self: Any, *arguments: Any, **options: Any) -> None:
        fitted.clear()
        try:
            run(self, *arguments, **options)
        finally:
            fitted.clear()

    def patch_lang(fn: Any) -> Any:
        names = languages(fn)
        if names and names <= fitted:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        fitted.update(names)
        return scope

    patch_lang.once = True
    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch, patch_lang


def shaped_once() -> None:
    """The types and shapes of the interpreter's tensors are made once for each shape: they are a third of its time."""
    block, tensor, np_dtype = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    if getattr(block, "once", False):
        return
    types, shapes, dtypes = dict[Any, tuple[Any, int, str]](), dict[Any, tuple[Any, Any]](), dict[str, Any]()

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = (*(s.value if isinstance(s, tl.constexpr) else s for s in shape),)
        if {*map(type, sizes)} != {int} or sizes not in types:  # wrong, or new
            block(self, element_ty, shape)
            types[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, told = types[sizes]
        self.name = f"<{told}, {element_ty}>"

    def tensor_of(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in shapes:
            tensor(self, handle, type)
            shapes[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[sizes]

    def dtype_of(of: Any) -> Any:
        if of.name not in dtypes:
            dtypes[of.name] = np_dtype(of)
        return dtypes[of.name]

    block_type.once = True
    tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype = block_type, tensor_of, dtype_of


def no_idle_checks() -> None:
    """The interpreter looks for integers that overflow only where it would tell: with debug.

    Without it, it computed all sums and products again, and asserted nothing: a third of the time of these tests.
    """
    check = TritonSemantic.binary_op_sanitize_overflow_impl
    if getattr(check, "told", False):
        return

    def told(self: Any, *operation: Any) -> None:
        if not isinstance(self.builder, interpreter.InterpreterBuilder) or self.builder.options.debug:
            check(self, *operation)

    told.told = True
    TritonSemantic.binary_op_sanitize_overflow_impl = told
