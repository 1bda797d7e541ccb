"""Chat templates in a process of their own, where neither memory nor time can be taken from others.

A template is a program from whoever made the model, and minijinja's fuel counts instructions, not
bytes: doubling a string forty times takes 200 instructions and a terabyte. Nothing short of the
operating system stops that in time, so templates run where it can: in a child with limits on
its memory and its CPU time, which ends when they are exceeded and is started again.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pie_async.errors import InvalidRequest, ModelError
from pie_async.model.chat_template import ChatMessage, ChatTemplate
from pie_async.model.template_worker import (
    CPU_S,
    MEMORY_BYTES,
    Open,
    Outcome,
    Render,
    receive_frame,
    send_frame,
)

_WORKER = (
    "-P",  # nothing is imported from the working directory
    "-c",
    "import sys; _, fd, root = sys.argv; root in sys.path or sys.path.insert(0, root)\n"
    "from pie_async.model.template_worker import main; main(int(fd))",
)
"""The interpreter's arguments; a socket's number and the package's directory follow."""
_SILENCE_S = 60.0
"""A child that does not answer for so long does not even get to run; it is given up."""
_MOST_CHARS = 2**18
_REASONS = {
    -signal.SIGPROF: f"it takes more than {CPU_S:g} s",
    -signal.SIGABRT: f"it takes more than {MEMORY_BYTES >> 20} MiB of memory",
}

_outcomes = msgspec.msgpack.Decoder(Outcome)


class ConfinedTemplate:
    """A `ChatTemplate` that renders elsewhere. Safe to use from several threads, not for the loop.

    The child starts with the first rendering, about 0.1 s, and ends with this object. One
    conversation is rendered at a time: 0.1 ms for a short one, most of it the way there and back.

    Args: as `ChatTemplate`.

    Raises:
        ModelError: the template is not well-formed.
    """

    def __init__(self, source: str, variables: Mapping[str, str], *, path: Path) -> None:
        self._open = Open(source=source, variables=dict(variables), path=str(path))
        self._lock = threading.Lock()
        self._child: _Child | None = None
        if len(source) > _MOST_CHARS:
            raise ModelError(
                f"the chat template in {path} has {len(source)} characters; at most "
                f"{_MOST_CHARS} are read"
            )
        if "*" in source:  # products of constants are computed, and kept, when it is compiled
            self._child = _Child(self._open)
        else:
            ChatTemplate(source, variables, path=path)  # only to see whether it is well-formed

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, bool] | None = None,
    ) -> str:
        """The prompt text; arguments as `ChatTemplate.render`.

        Raises:
            InvalidRequest: the template refuses these messages, or takes too much time or memory
                over them.
        """
        command = Render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=[dict(tool) for tool in tools] if tools else None,
            options=dict(options or {}),
        )
        with self._lock:
            outcome = self._ask(command)
        if outcome.text is None:
            raise InvalidRequest(outcome.refusal, param="messages")
        return outcome.text

    def _ask(self, command: Render) -> Outcome:
        if self._child is None or not self._child.is_alive:
            self._child = _Child(self._open)
        try:
            return self._child.ask(command)
        except OSError:  # it hung up, or is silent
            reason = self._child.bury()
            self._child = None
        return Outcome(refusal=f"the model's chat template cannot render these messages: {reason}")


class _Child:
    """One process. Nothing is lost with it: it is killed when nobody refers to it any more."""

    def __init__(self, template: Open) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    *_WORKER,
                    str(theirs.fileno()),
                    str(Path(__file__).parents[2]),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # a terminal's Ctrl-C is its parent's to handle
            )
        self._socket.settimeout(_SILENCE_S)
        self._end = weakref.finalize(self, _end, self._process, self._socket)
        self._compile(template)

    def _compile(self, template: Open) -> None:
        try:
            refusal = self.ask(template).refusal
        except OSError:
            refusal = f"the chat template in {template.path} cannot be used: {self.bury()}"
        if refusal:
            self._end()
            raise ModelError(refusal)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, command: Open | Render) -> Outcome:
        """Raises OSError when it ends instead of answering."""
        send_frame(self._socket, command)
        answer = receive_frame(self._socket)
        if answer is None:
            raise ConnectionResetError
        return _outcomes.decode(answer)

    def bury(self) -> str:
        """Make sure that it has ended, and say why it did."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)  # its own end, if it hung up
        self._end()
        return _REASONS.get(self._process.returncode, "its process ended")


def _end(process: subprocess.Popen[Any], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()
