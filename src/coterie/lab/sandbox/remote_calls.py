"""Lets tests call the functions of a program that runs in another process.

Only plain data crosses. The process of the tests never runs the program's code, so the program
cannot change what a test compares. An object that is no data stays in the program's process, and
the tests hold its number.
"""

import builtins
import os
import sys
from types import CodeType, ModuleType

DICT_VIEWS = (type({}.keys()), type({}.items()))  # equal to sets
# By tag: types, and the conversion to bytes and back. An object crosses as the first type that it
# is an instance of: a named tuple as a tuple.
SCALARS = {
    "n": (type(None), lambda value: b"", lambda data: None),
    "t": (bool, lambda value: b"1" if value else b"", bool),
    "i": (int, lambda value: b"%x" % value, lambda data: int(data, 16)),
    "f": (float, lambda value: float.__repr__(value).encode(), float),
    "s": (
        str,
        lambda value: str.encode(value, "utf-8", "surrogatepass"),
        lambda data: str(data, "utf-8", "surrogatepass"),
    ),
    "b": ((bytes, bytearray), bytes, bytes),
    "c": (complex, lambda value: b"%r" % value, lambda data: complex(data.decode())),
}
CONTAINERS = {
    "l": (list, list),
    "u": (tuple, tuple),
    "e": ((set, *DICT_VIEWS), set),
    "z": (frozenset, frozenset),
    "d": (dict, dict),
}
DATA_TYPES = (object, type(None), bool, int, float, str, bytes, complex, list, tuple, set, dict)


def _forward(operation: str):
    return lambda self, *args, **kwargs: self.connection.request(operation, self, *args, **kwargs)


class RemoteObject:
    """An object of the program that is no data. The tests can use it and pass it back."""

    def __init__(self, connection: "Connection", number: int) -> None:
        vars(self).update(connection=connection, number=number)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.connection.request("getattr", self, name)

    __setattr__, __call__, __getitem__ = map(_forward, ("setattr", "call", "getitem"))
    __iter__, __next__, __len__, __bool__ = map(_forward, ("iter", "next", "len", "bool"))


class ProgramError(Exception):
    """The program raised an error that is not a builtin one."""


class Connection:
    """One end of two pipes. Each message is eight bytes of length, then one encoded value."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd, self.write_fd = read_fd, write_fd

    def send(self, message: bytes) -> None:
        rest = memoryview(len(message).to_bytes(8, "big") + message)
        while rest:
            rest = rest[os.write(self.write_fd, rest) :]

    def receive(self) -> bytes:
        return self._read(int.from_bytes(self._read(8), "big"))

    def request(self, operation: str, *args: object, **kwargs: object):
        """Returns what the program returns, or raises its error."""
        self.send(encode((operation, args, kwargs), _remote_number))
        succeeded, value, *error = decode(self.receive(), lambda n: RemoteObject(self, n))
        if succeeded is True:
            return value
        kind = getattr(builtins, value, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise kind(*error)
        raise ProgramError(value, *error)

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            chunk = os.read(self.read_fd, min(size - len(data), 1 << 20))
            if not chunk:
                raise EOFError("the program ended before its tests")
            data += chunk
        return bytes(data)


def run_tests(source: str, connection: Connection) -> None:
    """Runs tests. A name that they use and do not define comes from the program.

    So does a builtin one if there is no other: a program may have to define ``sum``.
    """
    tests = compile(source, "tests", "exec")
    used = _used_names(tests)
    names = connection.request("start", used - set(dir(builtins)) or used)
    exec(tests, {"__name__": "__main__", **names})


def serve(source: str, connection: Connection) -> None:
    """Runs the program at the first request, and executes requests until the tests end."""
    module = sys.modules["__main__"] = ModuleType("__main__")
    objects: list[object] = []

    def start(names: set[str]) -> dict[str, object]:
        exec(compile(source, "program", "exec"), vars(module))
        return {name: value for name, value in vars(module).items() if name in names}

    def object_number(value: object) -> int:
        objects.append(value)
        return len(objects) - 1

    operations = {
        **{function.__name__: function for function in (getattr, setattr, iter, next, len, bool)},
        "call": lambda function, *args, **kwargs: function(*args, **kwargs),
        "getitem": lambda value, key: value[key],
        "start": start,
    }
    while True:
        try:
            operation, args, kwargs = decode(connection.receive(), objects.__getitem__)
        except EOFError:
            return
        try:
            reply = encode((True, operations[operation](*args, **kwargs)), object_number)
        except BaseException as error:
            reply = encode((False, type(error).__name__, *error.args), object_number)
        connection.send(reply)


def encode(value, object_number) -> bytes:
    """A tag, a length and the bytes of a value.

    ``object_number`` gives the number of an object that is no data, or raises TypeError.
    """
    for tag, (kinds, to_bytes, _) in SCALARS.items():
        if isinstance(value, kinds):
            return _tagged(tag, to_bytes(value))
    for tag, (kinds, _) in CONTAINERS.items():
        if isinstance(value, kinds):
            items = value.items() if tag == "d" else value
            return _tagged(tag, b"".join(encode(item, object_number) for item in items))
    if isinstance(value, type) and value in DATA_TYPES:
        return _tagged("k", b"%d" % DATA_TYPES.index(value))
    if hasattr(type(value), "as_integer_ratio"):  # Fraction, Decimal
        return _tagged("q", encode(tuple(value.as_integer_ratio()), object_number))
    return _tagged("o", b"%d" % object_number(value))


def _tagged(tag: str, data: bytes) -> bytes:
    return b"%s%d:%s" % (tag.encode(), len(data), data)


def decode(data: bytes, object_of):
    """Builds only the types above; ``object_of`` maps a number to an object."""
    (value,) = _items(data, object_of)
    return value


def _items(data: bytes, object_of):
    """The values that are encoded one after the other."""
    start = 0
    while start < len(data):
        colon = data.index(b":", start)
        stop = colon + 1 + int(data[start + 1 : colon])
        if not colon < stop <= len(data):
            raise ValueError("a value exceeds its message")
        yield _value(chr(data[start]), data[colon + 1 : stop], object_of)
        start = stop


def _value(tag: str, data: bytes, object_of):
    if tag in SCALARS:
        return SCALARS[tag][2](data)
    if tag in CONTAINERS:
        return CONTAINERS[tag][1](_items(data, object_of))
    if tag == "k":
        return DATA_TYPES[int(data)]
    if tag == "q":
        from fractions import Fraction

        return Fraction(*decode(data, object_of))
    if tag == "o":
        return object_of(int(data))
    raise ValueError(f"no value has the tag {tag!r}")


def _remote_number(value: object) -> int:
    if isinstance(value, RemoteObject):
        return value.number
    raise TypeError(f"a test passes a value of type {type(value).__name__}, which is no data")


def _used_names(code: CodeType) -> set[str]:
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return set(code.co_names).union(*map(_used_names, inner))
