"""Check, before anything is installed, what an installation needs; one line and exit code 1 where it is not there.

Older versions of Python read this file as well: no newer syntax.
"""

import shutil
import sys

NEEDS = (3, 11)
SPACE_GB = 4  # torch for processors, and what the demo needs; torch for CUDA takes more


def main():  # type: ignore[no-untyped-def]
    if sys.version_info < NEEDS:
        found = ".".join(str(part) for part in sys.version_info[:2])
        sys.exit("ditkit needs Python 3.11 or newer, this is " + found + "; try make PYTHON=python3.11")
    free = shutil.disk_usage(".").free / 1e9
    if free < SPACE_GB:
        sys.exit(f"ditkit needs about {SPACE_GB} GB of disk here, and {free:.1f} GB are free")


if __name__ == "__main__":
    main()
