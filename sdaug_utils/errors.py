"""One exception for everything that the person at the keyboard can put right."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad input: one line that names the file, the key and what would be valid."""


def run_to_exit_code(program: str, run: Callable[[], int | None]) -> int:
    """Run a program; the exit code is 2 after an :class:`InputError`, 130 after Ctrl-C."""
    try:
        return run() or 0
    except InputError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
