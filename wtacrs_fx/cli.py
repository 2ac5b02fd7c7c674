"""The command ``wtacrs-fx``.

A subcommand is a module with a docstring, its description; ``HELP``, one line; ``configure(parser)``, which adds its
options; ``run(args)``, which returns the exit code; and ``ERRORS``, exceptions of ``run`` whose text says enough.
"""

import argparse
import atexit
import gc
import sys
from collections.abc import Sequence

from wtacrs_fx import check_command, demo, report_command

COMMANDS = {"report": report_command, "check": check_command, "demo": demo}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="wtacrs-fx", description="Train transformers with sampled activations: less memory, unbiased gradients."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.configure(commands.add_parser(name, help=module.HELP, description=module.__doc__))
    args = parser.parse_args(argv)
    atexit.register(gc.freeze)  # seconds for large graphs, which need not be taken apart when the process ends
    command = COMMANDS[args.command]
    try:
        return command.run(args)
    except command.ERRORS as e:
        print(f"wtacrs-fx {args.command}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
