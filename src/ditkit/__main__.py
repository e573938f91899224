"""`ditkit`, `python -m ditkit`, and `torchrun -m ditkit`."""

import sys


def main() -> int:
    """Run the command line; an interrupt while it is being imported is a line as well."""
    try:
        from ditkit.cli.main import main as run
    except KeyboardInterrupt:
        print("ditkit: interrupted", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
