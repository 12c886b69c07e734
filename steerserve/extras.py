"""Optional dependencies: what to say, and how soon, where one of them is not installed."""

import importlib.util
from pathlib import Path

from steerserve.errors import SteerserveError

_CHECKOUT = Path(__file__).parents[1]


def require_extra(extra: str, *modules: str) -> None:
    """Raise SteerserveError where a module of an optional extra is missing, with the command that installs it.

    A command calls it before anything slow, so that nobody waits for minutes to be told.
    """
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise SteerserveError(f"this command needs {', '.join(missing)}: {install_command(extra)}")


def install_command(extra: str) -> str:
    """The command that installs an extra: from a checkout with the versions it was tested with, else by name."""
    if (_CHECKOUT / "constraints.txt").is_file():
        return f"pip install -e '.[{extra}]' -c constraints.txt"
    return f"pip install 'steerserve[{extra}]'"
