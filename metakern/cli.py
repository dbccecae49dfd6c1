"""The command line: `metakern train l2rw --data digits-4v9 --majority 0.9`, `metakern --help` for the rest."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 2, with a line that says why, for input that cannot be used."""
    try:
        from metakern.trainers.parser import parser
    except ModuleNotFoundError as missing:
        print(f"metakern: {missing.name} is not installed; try: pip install -e '.[train]'", file=sys.stderr)
        return 2
    options = parser().parse_args(arguments)
    try:
        status = options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return 141  # as a shell says of a process that ended by this
    except (ValueError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
        print("\n".join([f"metakern: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("metakern: stopped; finished runs and written checkpoints are kept", file=sys.stderr)
        return 130
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
