"""Training data that every Python carries: signature → docstring pairs of the interpreter's own standard library.

`stdlib-docs:GROUP` gives each device of a demonstration a text of its own kind without any download. The words differ a
little from one Python version to the next; on one interpreter they are always the same, in the same order.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from edge_runtime.errors import DataError, unknown_name

_log = logging.getLogger(__name__)

MAX_COMPLETION = 400
"""Characters of a docstring that are kept, at most."""
MIN_COMPLETION = 16
"""Characters below which a docstring says nothing worth learning."""
MAX_SIGNATURE = 240
"""Characters of a signature; longer ones are left out, for they would crowd the docstring out of a short sequence."""

# No module here is deprecated in Python 3.10 to 3.13, opens a window, a socket or a file when imported, or prints.
# `inspect` is not here because torch replaces one of its functions. One name per line would hide the table.
# fmt: off
GROUPS: dict[str, tuple[str, ...]] = {
    "networking": (
        "email.message", "email.utils", "ftplib", "http.client", "http.cookiejar", "http.cookies", "http.server",
        "imaplib", "ipaddress", "mailbox", "poplib", "select", "selectors", "smtplib", "socket", "socketserver", "ssl",
        "urllib.parse", "urllib.request", "urllib.robotparser", "wsgiref.util", "xmlrpc.client", "xmlrpc.server",
    ),
    "text": (
        "argparse", "cmd", "codecs", "difflib", "gettext", "html", "html.parser", "locale", "optparse", "pprint", "re",
        "reprlib", "shlex", "string", "textwrap", "tokenize", "unicodedata",
    ),
    "numbers": (
        "calendar", "cmath", "colorsys", "datetime", "decimal", "fractions", "itertools", "math", "numbers", "operator",
        "random", "secrets", "statistics", "time", "timeit", "zoneinfo",
    ),
    "files": (
        "bz2", "filecmp", "fileinput", "fnmatch", "glob", "gzip", "io", "linecache", "lzma", "mmap", "os", "os.path",
        "pathlib", "shutil", "stat", "tarfile", "tempfile", "zipfile", "zipimport",
    ),
    "concurrency": (
        "asyncio", "concurrent.futures", "contextvars", "multiprocessing.connection", "multiprocessing.context",
        "multiprocessing.managers", "multiprocessing.pool", "multiprocessing.shared_memory", "queue", "sched", "signal",
        "subprocess", "threading",
    ),
    "data": (
        "array", "base64", "binascii", "bisect", "collections", "configparser", "copy", "csv", "dataclasses", "enum",
        "functools", "hashlib", "heapq", "hmac", "json", "pickle", "plistlib", "shelve", "sqlite3", "struct", "types",
        "uuid", "xml.dom.minidom", "xml.etree.ElementTree", "xml.sax.saxutils", "zlib",
    ),
    "language": (
        "abc", "ast", "cProfile", "contextlib", "dis", "gc", "importlib", "importlib.metadata", "importlib.resources",
        "importlib.util", "logging", "logging.handlers", "pkgutil", "traceback", "tracemalloc", "typing",
        "unittest", "unittest.mock", "warnings", "weakref",
    ),
}
# fmt: on


@dataclass(frozen=True)
class DocPair:
    """One function of the standard library.

    Attributes:
        prompt: the request, with module, class and signature.
        completion: the beginning of the docstring, whitespace collapsed, at most `MAX_COMPLETION` characters.
    """

    prompt: str
    completion: str


def doc_pairs(group: str) -> list[DocPair]:
    """All pairs of one group, sorted by module and name; no prompt and no docstring appears twice.

    Modules that this interpreter was built without are left out, with a log line.

    Raises:
        DataError: no such group; lists the groups.
    """
    if group not in GROUPS:
        raise DataError(unknown_name("group of stdlib-docs", group, GROUPS))
    by_completion: dict[str, DocPair] = {}
    prompts: set[str] = set()
    # What a later Python deprecates should not warn whoever merely trains on its words.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name in sorted(GROUPS[group]):
            module = _import(name)
            for pair in _module_pairs(name, module) if module else ():
                if pair.prompt not in prompts and pair.completion not in by_completion:
                    prompts.add(pair.prompt)
                    by_completion[pair.completion] = pair
    return list(by_completion.values())


def first_words(docstring: str, name: str) -> str:
    """The first paragraphs of a docstring that fit into `MAX_COMPLETION` characters, or '' when nothing is left.

    Paragraphs become single lines. A leading `name(…)` line, which C functions carry, and everything from the first
    doctest on are left out; a first paragraph that is too long ends at its last whole sentence, or else word.
    """
    kept = ""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        if ">>>" in paragraph:
            break
        lines = [line for line in paragraph.splitlines() if not line.startswith(f"{name}(")]
        flat = " ".join(" ".join(lines).split())
        longer = f"{kept}\n\n{flat}" if kept and flat else kept or flat
        if len(longer) > MAX_COMPLETION:
            return kept or _cut(flat)
        kept = longer
    return kept


def _cut(text: str) -> str:
    head = text[:MAX_COMPLETION]
    sentence = max(head.rfind(mark) for mark in (". ", "! ", "? "))
    return head[: sentence + 1] if sentence > 0 else head.rsplit(" ", 1)[0]


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError as missing:
        _log.info("stdlib-docs: module %s is left out: %s", name, missing)
        return None


def _module_pairs(module_name: str, module: ModuleType) -> Iterator[DocPair]:
    for name, member in _public(module):
        if inspect.isclass(member):
            of_class = f"method of the class `{name}` from the module `{module_name}`"
            for method_name, method in sorted(vars(member).items()):
                if not method_name.startswith("_"):
                    yield from _pair(of_class, method_name, method)
        else:
            yield from _pair(f"function from the module `{module_name}`", name, member)


def _public(module: ModuleType) -> Iterator[tuple[str, object]]:
    listed = getattr(module, "__all__", None)
    for name in sorted(listed if listed is not None else dir(module)):
        member = getattr(module, name, None)
        own = listed is not None or getattr(member, "__module__", None) == module.__name__
        if own and not name.startswith("_"):
            yield name, member


def _of_stdlib(function: object) -> bool:
    # transformers, for one, adds methods to `logging.Logger`: what has been imported must not change the data.
    home = getattr(function, "__module__", None)
    return not isinstance(home, str) or home.partition(".")[0] in sys.stdlib_module_names


def _pair(where: str, name: str, member: object) -> Iterator[DocPair]:
    function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
    docstring = getattr(function, "__doc__", None)
    if not inspect.isroutine(function) or not isinstance(docstring, str) or not _of_stdlib(function):
        return
    try:
        signature = str(inspect.signature(function))
    except (ValueError, TypeError, AttributeError, NameError):
        # A C function without a text signature, or one whose defaults `inspect` cannot evaluate (in Python 3.13
        # `select.epoll.register`), has nothing that a prompt could show.
        return
    completion = first_words(docstring, name)
    # '<' is the repr of an object, often with its address: it would differ from one process to the next.
    if "<" in signature or len(signature) > MAX_SIGNATURE or len(completion) < MIN_COMPLETION:
        return
    yield DocPair(f"Write the docstring of this Python {where}:\ndef {name}{signature}:", completion)
