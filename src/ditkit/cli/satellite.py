"""`ditkit satellite`: a trained network at work on a folder of GeoTIFFs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import tyro

from ditkit.cli.options import ModelName, for_stage, load_of, words_of, writable
from ditkit.cli.placing import on_device
from ditkit.cli.sampling import Flattened, SamplingFlags
from ditkit.core.errors import ConfigError
from ditkit.core.terminal import progress
from ditkit.tasks.remote_sensing.own import process
from ditkit.tasks.remote_sensing.task import RemoteSensingTask

FLAGS = SamplingFlags()
Days = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[DAY ...]")]
Scale = Annotated[float | None, tyro.conf.arg(metavar="NUMBER")]


@on_device
def satellite(
    model: ModelName,
    *,
    data: Annotated[Path, tyro.conf.arg(metavar="FOLDER")],
    dates: Days = (),
    scale: Scale = None,
    seed: int = 0,
    flags: Flattened = FLAGS,
    out: Path = Path("outputs/satellite"),
) -> None:
    """Fill clouds, remove them, map land cover or forecast, in a folder of dated GeoTIFFs.

    The network does what it was trained for. Held-out data are measured by ditkit evaluate.

    Examples:
        ditkit satellite runs/units/model --data farm
        ditkit satellite runs/units/model --data farm --scale 10000 --policy taylorseer:interval=4
        ditkit satellite runs/units-forecast/model --data farm --dates 2024-06-15 2024-07-01

    FOLDER holds an image a date, and clouds/ with masks that are not 0 where something hides the ground; radar/ holds a
    second sensor in decibels, if the network takes one. Dates stand in the files' names or tags; all lie on one grid.

    Writes into the folder of --out:
        DAY.tif           each date on the same grid, of the files' own type;
                          of a reconstruction only the masked pixels are new
        strip.png         given, filled, and dates
        satellite.json    settings, grid, and shares of cloud

    Args:
        model: A folder that ditkit train wrote, or owner/name on the Hugging Face hub.
        data: The folder of one place.
        dates: Days to forecast, of a network that was trained to.
        scale: The number that stands for a reflectance of 1. Default: 10000 of 16-bit integers, 255 of bytes, else 1.
        seed: Of the first crop; further ones follow.
        out: Folder to write to.
    """
    network = load_of(model, RemoteSensingTask.name)
    if out.resolve() == data.resolve():
        raise ConfigError(f"--out {out} is the folder of the data, expected another")
    sampling = RemoteSensingTask().settle(flags.make((seed,)).resolved(network))
    given: dict[str, Any] = {"data": str(data), "dates": tuple(dates) or None, "scale": scale, "seed": seed}
    given |= flags.as_dict(sampling)
    with writable(out), progress() as advance:
        stage = for_stage(advance, "making series")
        found = process(network, data, sampling=sampling, scale=scale, dates=dates, progress=stage)
        words = shlex.join(["ditkit", "satellite", model, *words_of(given)])
        files = found.save(out, {"command": words})
    print(f"wrote {out}: {', '.join(files)}")
