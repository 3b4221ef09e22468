"""`python -m sprand` and the `sprand` command."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line given in `sys.argv`.

    Returns:
        The exit code.
    """
    from sprand.cli.main import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
