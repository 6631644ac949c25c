"""Prints the documentation of Python's standard library as JSON text.

corpora.py runs this script in an isolated interpreter (`python -I -S`). So installed packages and files in the current
directory cannot change the result.
"""

import importlib
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType

MAX_DOC_CHARS = 2000
MIN_DOC_WORDS = 3
GENERATED_DOC = re.compile(r"Alias for field number \d+$")

# Modules that do something when imported, have no useful documentation, or exist only on some platforms or builds.
SKIPPED_MODULES = set(
    """
    antigravity this idlelib lib2to3 turtle turtledemo tkinter ensurepip distutils pydoc_data rlcompleter site
    posix nt posixpath ntpath genericpath nturl2path msilib msvcrt winreg winsound ossaudiodev crypt curses
    fcntl grp nis pty pwd pyexpat readline resource spwd syslog termios tty asyncio.unix_events
    asyncio.windows_events asyncio.windows_utils ctypes.macholib ctypes.wintypes dbm.gnu dbm.ndbm dbm.sqlite3
    multiprocessing.popen_spawn_win32
    """.split()  # noqa: SIM905
)
NO_SUBMODULES = {"encodings"}


def stdlib_documents() -> Iterator[tuple[str, str]]:
    """Yield (qualified name, text) for each documented public object, sorted by name."""
    objects = dict(distinct(public_objects(import_stdlib())))
    for name in sorted(objects):
        yield name, document_text(name, objects[name])


def import_stdlib() -> dict[str, ModuleType]:
    """Import the public modules: first `builtins`, then the other top-level modules by name, then submodules level by
    level."""
    modules: dict[str, ModuleType] = {}
    waiting = ["builtins", *sorted(sys.stdlib_module_names - {"builtins"}), "os.path"]
    for name in waiting:  # the loop appends the submodules of packages to this list
        if name in SKIPPED_MODULES or name.rpartition(".")[2].startswith(("_", "test")):
            continue
        try:
            modules[name] = importlib.import_module(name)
        except Exception:  # not part of this build of Python
            continue
        if name not in NO_SUBMODULES:
            folders = getattr(modules[name], "__path__", [])
            waiting += sorted(f"{name}.{submodule.name}" for submodule in pkgutil.iter_modules(folders))
    return modules


def public_objects(modules: dict[str, ModuleType]) -> Iterator[tuple[str, object]]:
    """Yield (qualified name, object): modules, then what they define, then the members of their classes."""
    yield from modules.items()
    classes = []
    for module_name, module in modules.items():
        prefix = "" if module_name == "builtins" else f"{module_name}."
        for name, found in module_members(module):
            if is_defined_in(found, module_name, modules):
                yield prefix + name, found
                if inspect.isclass(found):
                    classes.append((prefix + name, found))
    # Base classes come before their subclasses, so that an inherited method gets the name of the class that defines it
    for class_name, found in sorted(classes, key=lambda item: (len(item[1].__mro__), len(item[0]), item[0])):
        yield from class_members(class_name, found)


def module_members(module: ModuleType) -> list[tuple[str, object]]:
    """List a module's public members as (name, object). An object's own name comes before its aliases."""
    names = getattr(module, "__all__", None) or vars(module)
    members = [(name, getattr(module, name, None)) for name in names if not name.startswith("_")]
    return sorted(members, key=lambda item: (getattr(item[1], "__name__", None) != item[0], item[0]))


def is_defined_in(found: object, module_name: str, modules: Iterable[str]) -> bool:
    """Tell whether an object belongs to a module: whether it is defined in the module, in a submodule, or in a module
    that is not public. All members of `builtins` belong to `builtins`. An imported module belongs to no other
    module."""
    if module_name == "builtins":
        return True
    home = getattr(found, "__module__", None)
    if inspect.ismodule(found) or not (home is None or isinstance(home, str)):
        return False
    return home not in modules or home == module_name or home.startswith(f"{module_name}.")


def class_members(class_name: str, found: type) -> Iterator[tuple[str, object]]:
    """Yield a class's public methods and properties, including inherited ones. `distinct` drops those that a base class
    has already yielded."""
    members = {name: member for base in reversed(found.__mro__) for name, member in vars(base).items()}
    for name in sorted(members):
        if not name.startswith("_"):
            yield f"{class_name}.{name}", members[name]


def distinct(objects: Iterable[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """Yield each documented object once. An object is dropped if an earlier object has the same docstring and the same
    last part of the name."""
    seen_objects: dict[int, object] = {}  # keeps the objects alive, since the id of a freed object may be used again
    seen_texts = set()
    for qualified_name, found in objects:
        found = getattr(found, "__func__", found)  # of a bound, static or class method
        text = docstring(found)
        named_text = qualified_name.rpartition(".")[2], text
        if text and id(found) not in seen_objects and named_text not in seen_texts:
            yield qualified_name, found
        seen_objects[id(found)] = found
        seen_texts.add(named_text)


def docstring(found: object) -> str:
    """Return an object's docstring. If a class has none, return that of its constructor. Return an empty string if the
    docstring is generated, or has fewer than MIN_DOC_WORDS words."""
    text = getattr(found, "__doc__", None)
    if inspect.isclass(found):
        constructor = vars(found).get("__init__")
        text = text or (inspect.isfunction(constructor) and constructor.__doc__)
    elif text == type(found).__doc__:  # a constant, for example, has the docstring of its class
        return ""
    text = inspect.cleandoc(text) if isinstance(text, str) else ""
    return "" if len(text.split()) < MIN_DOC_WORDS or GENERATED_DOC.match(text) else text


def document_text(qualified_name: str, found: object) -> str:
    return f"{qualified_name}{parameters(found)}\n{docstring(found)[:MAX_DOC_CHARS]}"


def parameters(found: object) -> str:
    """Return the names of a callable's parameters in parentheses. Defaults are left out, since their text may differ
    from run to run."""
    try:
        names = list(inspect.signature(found).parameters)
    except (AttributeError, TypeError, ValueError):  # some functions in C have no readable signature
        return ""
    return f"({', '.join(name for name in names if name not in ('self', 'cls'))})"


if __name__ == "__main__":
    print(json.dumps(list(stdlib_documents())))
