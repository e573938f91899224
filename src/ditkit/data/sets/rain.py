"""Hourly rain of hurricane Florence by radar and gauges (NCEP Stage IV), as Debian's `r-cran-stars` ships it.

North Carolina and its coast, 13 September 2018 19:00 to 14 September 17:00 UTC; cells of about 4 km, rows from
north to south, columns from west to east. Freely available.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ditkit.data.fields import FieldSet, load_pinned

DEBIAN_FILE = Path("/usr/lib/R/site-library/stars/nc/test_stageiv_xyt.nc")
SHA256 = "51952a496e69e2f0cf36fa14947adac6db4a78bb8b9c4dd146e15636aee89586"
INSTALL = (
    "`apt-get install --no-install-recommends r-cran-stars`, or without R "
    "`apt-get download r-cran-stars && dpkg -x r-cran-stars_*.deb stars`"
)


def load(size: int | None = None) -> FieldSet:
    """23 hours of rain in mm/h (1 kg/m2 of water is 1 mm) on 118 x 87 cells.

    Raises:
        DataError: the file is not found, or is not the pinned one.
        ConfigError: a size is given, or the package netCDF4 is not installed.
    """
    fields = load_pinned("rain", DEBIAN_FILE, SHA256, INSTALL, size)
    return replace(fields, variables=("rain",), units=("mm/h",))
