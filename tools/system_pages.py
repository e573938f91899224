"""Fill the marked part of docs/systems/*.md from the rows and their claims; what is written by hand is kept.

python tools/system_pages.py              # every page that exists
python tools/system_pages.py 12 ras       # these, made where they do not exist yet
"""

from __future__ import annotations

import sys
from pathlib import Path

from ditkit.core.errors import DitkitError
from ditkit.systems.pages import page_of, write_page
from ditkit.systems.rows import find, load

ROOT = Path(__file__).parents[1]


def main(names: list[str]) -> None:
    """Write the pages of the systems called `names`, or all that exist."""
    rows = [find(name) for name in names] or [row for row in load() if (ROOT / page_of(row)).is_file()]
    for row in rows:
        if write_page(row, ROOT):
            print(f"wrote {page_of(row)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DitkitError as error:
        sys.exit(f"system_pages: {error}")
