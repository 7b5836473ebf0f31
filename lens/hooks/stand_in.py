"""What stands in for a function of ``torch.distributed``: the same parameters, with a note before and after the call.

The dearest place of the hook: in a real step all of it is met with cold caches, so that what counts is how much code
and memory it touches. It is made from text for each function, as a dataclass's methods are: with the original's own
parameters nothing has to be packed, searched and unpacked again. For the same reason it calls as little as it can and
writes itself, word for word, what `Recorder.enter_collective` and `Recorder.collective` write.
"""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from lens.hooks.unseen import unseen
from lens.recorder import OPEN_COLLECTIVE_WORD as OPEN
from lens.recorder import pack_five, pack_slot
from lens.slots import COLLECTIVE, NULL


def stand_in(original: Any, name: str, place: int, measure: str, names: Mapping[str, Any]) -> Callable[..., Any]:
    """A function that records a collective and calls the original.

    Args:
        original: what it stands in for.
        name: its name in ``torch.distributed``, which also tells the parameters.
        place: where the operation stands in `Group.ids`.
        measure: a statement that sets ``size`` (bytes) and ``dtype`` from the parameters.
        names: what the text refers to; see there.

    Raises:
        AttributeError: this torch has no such function.
    """
    import torch.distributed.distributed_c10d as pristine

    # Not the original's parameters: somebody else's wrapper may hide them.
    declared = inspect.unwrap(vars(pristine)[name])
    parameters = ", ".join(inspect.signature(declared).parameters)
    made = dict(names, original=original, pack_slot=pack_slot, pack_five=pack_five)
    exec(_compiled(_text(name, parameters, place, measure)), made)
    function: FunctionType = made[name]
    function.__defaults__ = declared.__defaults__
    functools.update_wrapper(function, original)
    # torch.compile goes straight to the original, and there are no arguments then but those that were given.
    unseen(function, original)
    return function


def _text(name: str, parameters: str, place: int, measure: str) -> str:
    """The source. All parameters may be given by place and by name; one of them is called ``group``."""
    return f"""
        def {name}({parameters}):
            if not part.on:
                return original({parameters})
            t0 = clock()
            entry = failed = None
            try:
                entry = known.get(None if group is None else id(group)) or meet(group)
                if entry is not None:
                    {measure}
                    number = entry.number + 1
                    if number >= entry.ask_at:
                        number = entry.ask()
                    here = this_thread() == main_thread
                    if here:
                        ids, step, words = entry.ids[{place}], timeline.step, recorder.words
                        pack_five(words, {OPEN * 8}, t0, ids, number, size, step)
                    else:
                        enter_elsewhere({place}, entry, dtype, number, size, t0)
            except Exception as error:
                entry, failed = None, error
            if entry is None:
                result = original({parameters})
                if failed is not None:
                    part.fail(failed)  # the original accepts what we could not read: the fault was ours
                return result
            before = clock()
            result = original({parameters})
            t1 = clock()
            try:
                entry.number = number
                if result is None and here:
                    sequence = recorder.next
                    pack_slot(
                        words, recorder.first_byte + ((sequence - 1 & recorder.mask) << 7),
                        sequence, {COLLECTIVE}, t0, t1, step, ids, number, size, {NULL}, {NULL},
                        (dtypes.get(dtype) or new_dtype(dtype)) | timeline.phase << 32, 0, 0, 0, 0, sequence,
                    )
                    recorder.next = sequence + 1
                    words[{OPEN}] = 0
                    timeline.spent_on_collectives += before - t0 + clock() - t1
                else:
                    leave_elsewhere({place}, entry, dtype, number, size, t0, t1, result)
            except Exception as error:
                part.fail(error)
            return result
        """


def _compiled(text: str) -> Any:
    # As lines of this file: tracebacks are shown without the hook's own frames, and whoever looks finds the text.
    line = _text.__code__.co_firstlineno + 1
    return compile("\n" * line + textwrap.dedent(text), __file__, "exec")
