"""A pickle gone through instruction by instruction, building nothing but plain values and stand-ins.

Python's own unpickler, even with its look-up of names restricted, can be made to set aside memory for a memo entry
numbered 2**32, or to hash a tuple that holds itself a billion times over. This one takes a fixed set of instructions,
a fixed set of names, a limited number of steps, and only plain keys; what it costs is bounded by the file's length.
"""

from __future__ import annotations

import codecs
import struct
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

STEP_LIMIT = 500_000
"""Instructions in one pickle: some forty a tensor, and the largest checkpoints have a few thousand tensors."""
_PLAIN_KEYS = (str, bytes, int, float, bool, type(None))
_KEY_RANGE = 2**62  # wider whole numbers can be chosen to share one hash, which makes a dictionary quadratic


class RefusedError(Exception):
    """The content is nothing that may be read; the text is a clause that says what it is."""


class StandIn(ABC):
    """Something that a pickle makes first and fills in afterwards."""

    def __init__(self) -> None:
        self.memo_places: list[int] = []

    @abstractmethod
    def build(self, state: object) -> object:
        """Fill in; what comes back takes this object's place."""


class Name:
    """A name that stands in the pickle: what may be called (or not) under it, and what it stands for."""

    def __init__(self, make: Callable[..., object] | None = None, value: object = None, by_new: bool = False) -> None:
        self.make = make
        self.value = value
        self.by_new = by_new


class Replay:
    """One pass over the pickle that starts at ``start``.

    Args:
        data: the bytes.
        names: all that the pickle may name, as ``module.name``.
        start: where in ``data`` the pickle begins.
        protocols: the newest pickle protocol whose instructions are taken. With 2, only those that PyTorch takes.
        persistent: makes what a persistent id stands for; without it there may be none.
        text: how byte strings of Python 2 become text.
    """

    def __init__(
        self,
        data: bytes,
        names: Mapping[str, Name],
        start: int = 0,
        protocols: int = 2,
        persistent: Callable[[object], object] | None = None,
        text: str = "utf-8",
    ) -> None:
        self.data = data
        self.position = start
        """Behind the pickle, once it is replayed."""
        self._names = names
        self._persistent = persistent
        self._text = text
        self._steps = _PROTOCOL_2 if protocols == 2 else _PROTOCOLS_0_TO_4
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._encoded = 0

    def run(self) -> Any:
        """The pickled value.

        Raises:
            RefusedError: a name, an instruction or a value that is not taken.
            ValueError, LookupError, TypeError, AttributeError, struct.error: the pickle is damaged.
        """
        steps, data, stop = self._steps, self.data, ord(".")
        for _ in range(STEP_LIMIT):
            code = data[self.position]
            self.position += 1
            if code == stop:
                return self._stack.pop()
            step = steps.get(code)
            if step is None:
                raise RefusedError(f"it is pickled in a way that is not read here (instruction {code:#04x})")
            step(self)
        raise RefusedError(f"its pickle has more than {STEP_LIMIT} instructions")

    def encode(self, text: object, encoding: object = "latin1") -> bytes:
        """``_codecs.encode``, which is how protocol 2 writes bytes; never more of them than the file has."""
        if type(text) is not str or encoding not in ("latin1", "latin-1"):
            raise RefusedError("it holds text in an encoding that is not read here")
        self._encoded += len(text)
        if self._encoded > len(self.data):
            raise RefusedError("it holds bytes that would unfold to more than the file")
        return text.encode("latin1")

    # ---- reading the instructions' arguments

    def take(self, count: int) -> bytes:
        """The next bytes, all of them or an error."""
        end = self.position + count
        if count < 0 or end > len(self.data):
            raise ValueError("the pickle is cut short")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def line(self) -> bytes:
        """The bytes up to the next line feed."""
        return self.take(self.data.index(b"\n", self.position) - self.position + 1)[:-1]

    def number(self, form: str) -> Any:
        """One number in the notation of ``struct``."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    # ---- the instructions

    def push(self, value: object) -> None:
        self._stack.append(value)

    def mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def since_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marked.pop()
        return items

    def tuple_of(self, count: int) -> None:
        if count > len(self._stack):
            raise IndexError("the pickle's stack is empty")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def append(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise TypeError("appends to what is no list")
        self._stack[-1].extend(items)

    def add(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not set:
            raise TypeError("adds to what is no set")
        self._stack[-1].update(map(plain_key, items))

    def set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in (dict, OrderedDict) or len(items) % 2:
            raise TypeError("sets items of what is no dictionary")
        for place in range(0, len(items), 2):
            target[plain_key(items[place])] = items[place + 1]

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self.set_items([key, value])

    def dict_since_mark(self) -> None:
        items = self.since_mark()
        self.push({})
        self.set_items(items)

    def get(self, place: int) -> None:
        self.push(self._memo[place])

    def put(self, place: int) -> None:
        value = self._stack[-1]
        if isinstance(value, StandIn):
            value.memo_places.append(place)
        self._memo[place] = value

    def name(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in self._names:
            shown = "".join(letter if letter.isprintable() else "?" for letter in full[:80])
            if module.partition(".")[0] == "torch":
                raise RefusedError(f"it holds {shown}, and only dense tensors and plain values are read")
            raise RefusedError(f"it holds {shown}, and reading that could run a program")
        self.push(self._names[full])

    def call(self, by_new: bool = False) -> None:
        arguments, name = self._stack.pop(), self._stack.pop()
        if not isinstance(name, Name) or name.make is None or name.by_new is not by_new:
            raise RefusedError("it calls what is not called when reading a file")
        if type(arguments) is not tuple:
            raise TypeError("calls with what is no tuple")
        # The one function that needs to know the file's length is a method of this class.
        self.push(self.encode(*arguments) if name is ENCODE else name.make(*arguments))

    def build(self) -> None:
        state, built = self._stack.pop(), self._stack[-1]
        if type(built) is OrderedDict:  # a state dict and the versions of its modules, which stay unread
            if type(state) is not dict or list(state) != ["_metadata"]:
                raise RefusedError("it holds a dictionary with attributes")
        elif isinstance(built, StandIn):
            filled = built.build(state)
            self._stack[-1] = filled
            for place in built.memo_places:
                if self._memo[place] is built:
                    self._memo[place] = filled
        else:
            raise RefusedError(f"it fills in a {type(built).__name__} with attributes")

    def persistent(self) -> None:
        if self._persistent is None:
            raise RefusedError("it refers to something outside of itself")
        self.push(self._persistent(self._stack.pop()))

    def integer_line(self) -> object:
        line = self.line()
        return line == b"01" if line in (b"00", b"01") else int(line)

    def quoted_line(self) -> str:
        line = self.line()
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
            raise ValueError("a text without quotes")
        return codecs.escape_decode(line[1:-1])[0].decode(self._text)

    def byte_string(self, form: str) -> str:
        return self.take(self.number(form)).decode(self._text)

    def utf8(self, form: str) -> str:
        return self.take(self.number(form)).decode("utf-8", "surrogatepass")


ENCODE = Name(make=Replay.encode)
"""What ``_codecs.encode`` is replaced by."""


def plain_key(key: object) -> object:
    """``key``, if it is of a kind whose hash costs nothing.

    Raises:
        RefusedError: it is not.
    """
    if type(key) not in _PLAIN_KEYS:
        raise RefusedError(f"it holds a dictionary or set with a {type(key).__name__} as a key")
    if isinstance(key, int) and abs(key) >= _KEY_RANGE:
        raise RefusedError("it holds a dictionary or set with a huge number as a key")
    return key


_Step = Callable[[Replay], None]

_PROTOCOL_2: dict[int, _Step] = {
    ord("("): Replay.mark,
    ord(")"): lambda self: self.push(()),
    ord("]"): lambda self: self.push([]),
    ord("}"): lambda self: self.push({}),
    ord("N"): lambda self: self.push(None),
    0x88: lambda self: self.push(True),
    0x89: lambda self: self.push(False),
    ord("K"): lambda self: self.push(self.number("<B")),
    ord("M"): lambda self: self.push(self.number("<H")),
    ord("J"): lambda self: self.push(self.number("<i")),
    ord("G"): lambda self: self.push(self.number(">d")),
    0x8A: lambda self: self.push(int.from_bytes(self.take(self.number("<B")), "little", signed=True)),
    ord("U"): lambda self: self.push(self.byte_string("<B")),
    ord("X"): lambda self: self.push(self.utf8("<I")),
    ord("t"): lambda self: self.push(tuple(self.since_mark())),
    0x85: lambda self: self.tuple_of(1),
    0x86: lambda self: self.tuple_of(2),
    0x87: lambda self: self.tuple_of(3),
    ord("a"): lambda self: self.append([self._stack.pop()]),
    ord("e"): lambda self: self.append(self.since_mark()),
    ord("s"): Replay.set_item,
    ord("u"): lambda self: self.set_items(self.since_mark()),
    ord("h"): lambda self: self.get(self.number("<B")),
    ord("j"): lambda self: self.get(self.number("<I")),
    ord("q"): lambda self: self.put(self.number("<B")),
    ord("r"): lambda self: self.put(self.number("<I")),
    ord("c"): lambda self: self.name(self.line().decode(), self.line().decode()),
    ord("R"): Replay.call,
    0x81: lambda self: self.call(by_new=True),
    ord("b"): Replay.build,
    ord("Q"): Replay.persistent,
    0x80: lambda self: _protocol(self, 2),
}
"""The instructions of protocol 2, which PyTorch writes, and all of them are among those that its reader takes."""


def _protocol(replay: Replay, newest: int) -> None:
    if replay.number("<B") > newest:
        raise RefusedError(f"it is pickled with a protocol newer than {newest}")


def _stacked_name(replay: Replay) -> None:
    name, module = replay._stack.pop(), replay._stack.pop()
    if type(name) is not str or type(module) is not str:
        raise TypeError("a name that is no text")
    replay.name(module, name)


_PROTOCOLS_0_TO_4: dict[int, _Step] = _PROTOCOL_2 | {
    0x80: lambda self: _protocol(self, 4),
    0x95: lambda self: self.take(8) and None,  # the length of a frame, which is of no use in memory
    ord("I"): lambda self: self.push(self.integer_line()),
    ord("L"): lambda self: self.push(int(self.line().removesuffix(b"L"))),
    ord("F"): lambda self: self.push(float(self.line())),
    ord("S"): lambda self: self.push(self.quoted_line()),
    ord("T"): lambda self: self.push(self.byte_string("<i")),
    ord("V"): lambda self: self.push(self.line().decode("raw_unicode_escape")),
    ord("B"): lambda self: self.push(self.take(self.number("<I"))),
    ord("C"): lambda self: self.push(self.take(self.number("<B"))),
    0x8E: lambda self: self.push(self.take(self.number("<Q"))),
    0x8C: lambda self: self.push(self.utf8("<B")),
    0x8D: lambda self: self.push(self.utf8("<Q")),
    ord("l"): lambda self: self.push(self.since_mark()),
    ord("d"): Replay.dict_since_mark,
    0x8F: lambda self: self.push(set()),
    0x90: lambda self: self.add(self.since_mark()),
    ord("g"): lambda self: self.get(int(self.line())),
    ord("p"): lambda self: self.put(int(self.line())),
    0x94: lambda self: self.put(len(self._memo)),
    0x93: _stacked_name,
}
