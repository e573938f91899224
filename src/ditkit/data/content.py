"""Digests of data by what they hold, however their path is written and wherever they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ditkit.core.errors import DataError
from ditkit.core.files import kind_of
from ditkit.data.fields import FieldSet
from ditkit.data.folder import walk
from ditkit.data.frames import is_in_memory


def content_digest(data: Any) -> str:
    """Return the SHA-256 of a file, of a folder's files with their names, or of a table in memory.

    Empty for a named set, which its name and options say, and for anything that is not there.

    Raises:
        DataError: a file cannot be read.
    """
    if is_in_memory(data):
        return _of_table(data)
    path = Path(data).expanduser()
    kind = kind_of(path)
    if kind == "file":
        return _of_file(path)
    if kind != "folder":
        return ""
    whole = hashlib.sha256()
    for file in sorted(walk(path)[1]):
        if kind_of(path / file) == "file":
            whole.update(f"{file.as_posix()}\0{_of_file(path / file)}\0".encode("utf8", "surrogateescape"))
    return whole.hexdigest()


def _of_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _of_table(data: Any) -> str:
    """Digest a table of pandas, a data set of xarray or fields by their names, times and values."""
    if isinstance(data, FieldSet):
        parts = {"names": np.array(data.variables), "times": data.times, "values": data.values.numpy()}
    elif hasattr(data, "to_xarray"):
        import pandas as pd

        frame = data if hasattr(data, "columns") else data.to_frame("value")
        rows = pd.util.hash_pandas_object(frame, index=True).to_numpy()
        parts = {"names": np.array([str(name) for name in frame.columns]), "rows": rows}
    else:
        found = data.to_dataset(name="value") if hasattr(data, "to_dataset") else data
        parts = {str(name): np.asarray(variable.values) for name, variable in found.variables.items()}
    whole = hashlib.sha256()
    for name, values in sorted(parts.items()):
        whole.update(f"{name} {values.dtype} {values.shape}\0".encode())
        whole.update(
            np.ascontiguousarray(values).tobytes()
            if values.dtype != object
            else repr(values.tolist()).encode()
        )
    return whole.hexdigest()
