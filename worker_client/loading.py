"""From a name to a task, with an error that says what is wrong if it is none.

The name is ``package.module:attribute``, or what an installed package calls it (entry points ``fedmq.tasks``).
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from broker.errors import ConfigError, FedmqError, TaskError
from broker.parts import Parts, names_of, part_of
from worker_client.task import Task, place_of

__all__ = ["TASKS", "load_task"]

#: Tasks of other packages. Ours are named by their paths.
TASKS: Parts[Callable[[], Task]] = Parts("task", "fedmq.tasks", {})


def load_task(name: str) -> Task:
    """The task that ``name`` means: a Task, a subclass of it, or a function without arguments that gives one.

    The working directory is importable. Raises :class:`TaskError`.
    """
    found = _found(name)
    if isinstance(found, Task):
        return found
    if not callable(found):
        raise TaskError(f"task {name!r} is a {type(found).__name__}; it must be a Task, or something that gives one")
    try:
        task = found()
    except FedmqError:
        raise
    except Exception as error:
        raise TaskError(f"task {name!r} raised {type(error).__name__}: {error} ({place_of(error)})") from error
    if not isinstance(task, Task):
        raise TaskError(f"task {name!r} gave a {type(task).__name__}; it must give a Task")
    return task


def _found(name: str) -> object:
    module_name, colon, attribute = name.partition(":")
    if name in names_of(TASKS):
        try:
            return part_of(TASKS, name)
        except ConfigError as error:
            raise TaskError(str(error)) from error
    if not colon or not module_name or not attribute:
        installed = f", or by its name: {', '.join(names_of(TASKS))}" if names_of(TASKS) else ""
        raise TaskError(
            f"task {name!r}: name it as package.module:attribute, like worker_client.tasks.digits:Digits{installed}"
        )
    found: object = _import(module_name, name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise TaskError(f"task {name!r}: {module_name} has no attribute {part!r}{_nearest(part, dir(found))}")
        found = getattr(found, part)
    return found


def _import(module: str, name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module != missing and not module.startswith(f"{missing}."):
            # The module is there; something that it imports is not.
            raise TaskError(f"task {name!r}: {error} ({place_of(error)}); is it installed here?") from error
        raise TaskError(
            f"task {name!r}: there is no module {missing!r}{_nearest(missing.rpartition('.')[2], _siblings(missing))}"
        ) from None
    except Exception as error:
        raise TaskError(
            f"task {name!r}: importing {module} raised {type(error).__name__}: {error} ({place_of(error)})"
        ) from error


def _siblings(module: str) -> Iterable[str]:
    """Modules beside ``module``: those of its package, or what lies in the working directory."""
    parent, dot, _ = module.rpartition(".")
    if not dot:
        return [found.name for found in pkgutil.iter_modules([str(Path.cwd())])]
    path = getattr(sys.modules.get(parent), "__path__", [])
    return [found.name for found in pkgutil.iter_modules(path)]


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, [k for k in known if not k.startswith("__")], n=3)
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""
