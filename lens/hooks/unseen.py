"""Keeping functions of ours out of what torch.compile traces.

Asking in each of them whether torch compiles would be one more function met with cold caches, at every call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any


def unseen(function: Any, instead: Callable[..., Any]) -> None:
    """Let dynamo trace `instead` where it meets this function, and leave it alone where it runs by itself."""
    vars(function)["_torchdynamo_inline"] = instead
    leave_alone(function)


def unseen_hook(hook: Any) -> None:
    """Let dynamo trace nothing for this hook, which calls nothing of the training's, and leave all alone that it calls."""
    vars(hook)["_torchdynamo_inline"] = _nothing
    leave_alone(hook, and_below=True)


def leave_alone(*functions: Any, and_below: bool = False) -> None:
    """Let dynamo compile none of these when they are called from what it has given up on; `and_below`: nor what they call.

    In a torch that has no such switch it tries to, gives up, and runs them as they are.
    """
    torch: Any = sys.modules.get("torch")
    try:
        switch = torch._C._dynamo.eval_frame
        skip, default = switch._FrameAction.SKIP, switch._FrameAction.DEFAULT
        alone = switch._FrameExecStrategy(skip, skip if and_below else default)
        choose = switch.set_code_exec_strategy
    except AttributeError:
        return
    for function in functions:
        if isinstance(function, FunctionType):
            choose(function.__code__, alone)


def _nothing(*_: Any) -> None:
    """What dynamo takes for a hook of ours."""
