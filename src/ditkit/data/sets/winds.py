"""Monthly mean surface winds of the globe, 1982-1992 (US Navy FNOC), as Debian's `ferret-datasets` ships them.

2.5 degrees; rows from 90 N to 90 S, columns from 20 E eastward round the globe. Free to use (NOAA/PMEL).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ditkit.data.fields import FieldSet, load_pinned

DEBIAN_FILE = Path("/usr/share/ferret-vis/data/monthly_navy_winds.cdf")
SHA256 = "225a9e4fed7bb1a7b558afb662abbe2dc5e3d3db4100fa019cb994f10b115faa"
INSTALL = "`apt-get install --no-install-recommends ferret-datasets`"


def load(size: int | None = None) -> FieldSet:
    """132 months of eastward and northward wind in m/s on 73 x 144 cells.

    Raises:
        DataError: the file is not found, or is not the pinned one.
        ConfigError: a size is given, or the package netCDF4 is not installed.
    """
    fields = load_pinned("winds", DEBIAN_FILE, SHA256, INSTALL, size)
    return replace(fields, variables=("eastward", "northward"), units=("m/s", "m/s"))
