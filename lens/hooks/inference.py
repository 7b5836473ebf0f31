"""Requests of models that generate, recorded without a line about them in the script.

``generate`` of a watched model is stood in for on that instance, and its ``forward`` only while a request runs.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from lens.hooks.automatic import RootForward
from lens.hooks.drafts import Drafts, MakesDrafts
from lens.hooks.guard import Part, StandIn
from lens.hooks.requests import Request, Requests
from lens.slots import NULL


def watch_generate(model: Any, requests: Requests) -> None:
    """Record what this model generates."""
    if requests.part.on:
        requests.part.at_end(Generate(model, requests).put())


class Pass(StandIn):
    """Stands in for a model's ``forward`` while one of its requests runs."""

    def __init__(self, model: Any) -> None:
        import torch

        super().__init__(model, "forward")
        self.requests: Any = lambda: None
        self.request: Request | None = None
        self._compiling: Callable[[], bool] = torch.compiler.is_compiling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request, requests = self.request, self.requests()
        if self._compiling() or request is None or requests is None:
            return self._original(*args, **kwargs)
        forward = self._original
        if isinstance(forward, RootForward) and requests.timeline.step == NULL and not requests.trains():
            forward = forward._original  # there is no training, of which a step could begin here
        _safely(requests.part, request.pass_begins, args, kwargs)
        requests.divert_experts(request.now)
        output = forward(*args, **kwargs)
        requests.divert_experts(None)
        _safely(requests.part, request.pass_ends, output, kwargs)
        return output


class Generate(StandIn):
    """Stands in for a model's ``generate``."""

    def __init__(self, model: Any, requests: Requests) -> None:
        import torch

        super().__init__(model, "generate")
        self._requests = weakref.ref(requests)
        self._pass: Pass | None = None
        self._name = _name(model)
        self._busy = False
        self._compiling: Callable[[], bool] = torch.compiler.is_compiling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        requests = self._requests()
        # One that runs inside another, or beside it in another thread, would meet the other's forward passes.
        if self._compiling() or self._busy or requests is None or not requests.part.on:
            return self._original(*args, **kwargs)
        self._busy = True
        give_back: list[Callable[[], None]] = []
        request = None
        try:
            request = requests.request(self._name, None, None, None, _on_device(self._owner))
            give_back.append(self._put_pass(requests, request))
            if hasattr(self._owner, MakesDrafts.NAME):
                give_back.append(MakesDrafts(self._owner, functools.partial(_drafts_of, request)).put())
            request.__enter__()
        except Exception as error:
            requests.part.fail(error)
            request = None
        output = None
        try:
            output = self._original(*args, **kwargs)
            return output
        finally:
            self._busy = False
            self._leave(requests, give_back)
            if request is not None:
                _safely(requests.part, _end, request, output, args, kwargs)

    def _put_pass(self, requests: Requests, request: Request) -> Callable[[], None]:
        if self._pass is None:
            self._pass = Pass(self._owner)
            wrapped = False
        else:
            # One and the same object each time: what was compiled with it in its place stays valid.
            wrapped = not self._pass.is_gone()
            if not wrapped:
                self._pass.look_again()
        self._pass.requests = weakref.ref(requests)
        self._pass.request = request
        return _nothing if wrapped else self._pass.put()

    def _leave(self, requests: Requests, give_back: list[Callable[[], None]]) -> None:
        """Put ``forward`` back, whatever has failed."""
        try:
            requests.divert_experts(None)
            if self._pass is not None:
                self._pass.request = None
            while give_back:
                give_back.pop()()
        except Exception as error:
            requests.part.fail(error)


def _drafts_of(request: Request) -> Drafts:
    """Tokens are going to be drafted for this request."""
    request.drafts = Drafts()
    return request.drafts


def _end(request: Request, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The request is over; without an output it has failed."""
    if output is None:
        request.__exit__(Exception)
        return
    request.close(_new_tokens(output, args, kwargs))
    request.__exit__(None)


def _new_tokens(output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Tokens that each sequence has gained; None where only the passes tell."""
    sequences = getattr(output, "sequences", output)
    given = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    if given is None or not hasattr(sequences, "shape") or not hasattr(given, "shape"):
        return None
    new = int(sequences.shape[-1]) - int(given.shape[-1])
    return new if new > 0 and len(given.shape) == 2 else None


def _name(model: Any) -> str:
    path = getattr(getattr(model, "config", None), "name_or_path", None)
    return path if isinstance(path, str) and path else type(model).__name__


def _on_device(model: Any) -> bool:
    parameter = next(model.parameters(), None) if hasattr(model, "parameters") else None
    return parameter is not None and parameter.is_cuda


def _nothing() -> None:
    """Nothing is to be given back."""


def _safely(part: Part, action: Callable[..., Any], *given: Any) -> None:
    """An error of our own switches the part off and is nobody else's."""
    try:
        if part.on:
            action(*given)
    except Exception as error:
        part.fail(error)
