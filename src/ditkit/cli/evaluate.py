"""`ditkit evaluate`: the figures of a trained model on data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ditkit.api.evaluate import DEFAULT, trained_on
from ditkit.api.evaluate import evaluate as measured
from ditkit.cli.options import (
    DataName,
    ModelName,
    Number,
    Options,
    load_trained,
    options_of,
    with_training_options,
    words_of,
    writable,
)
from ditkit.cli.placing import on_device
from ditkit.cli.sampling import Flattened, SamplingFlags
from ditkit.core.checkpoint import write_json
from ditkit.core.task import Evaluation, task_of
from ditkit.core.terminal import progress

FLAGS = SamplingFlags(batch_size=DEFAULT.batch_size)


@on_device
def evaluate(
    model: ModelName,
    *,
    data: DataName = None,
    option: Options = (),
    count: Number = None,
    flags: Flattened = FLAGS,
    neighbours: Number = None,
    max_bad: Number = None,
    real_count: Number = None,
    out: Path = Path("outputs/evaluate"),
) -> None:
    """Measure a trained model on data: pictures, clips or forecasts.

    Of pictures: KID, FID, precision and recall against the real ones. Of clips: each kind of mask on held-out
    clips, with PSNR, SSIM and temporal error (ditkit video has more flags). Of forecasts: the error by lead time
    (ditkit forecast has more flags). Of an image codec: PSNR and SSIM of what it decodes.

    Examples:
        ditkit evaluate emoji
        ditkit evaluate emoji --count 200 --policy taylorseer:interval=4
        ditkit evaluate runs/mine/model --data photos --out outputs/mine
        ditkit evaluate digits --data moving-digits --steps 25
        ditkit evaluate runs/predformer/model --data moving-digits

    Writes into the folder of --out:
        evaluation.json    every number; of pictures, each one's nearest real one
        sheet.png, neighbours.png, MASK.mp4, leadtime.png ...
                           pictures, films and plots, as the task has them

    Args:
        model: A shipped model (emoji), a folder, or owner/name on the Hugging Face hub.
        data: A named set, or a folder or file of the kind that the model takes. Default: the one it was trained on.
        option: Option of the loader of --data, such as split=test of fashion. Repeat it for several. Default,
            where the model was trained on these data: as it was.
        count: Samples, with seeds 0, 1, 2 ...; pictures have classes as often as the data. Default: 1000 pictures,
            8 clips, 64 forecasts.
        neighbours: Pictures that are shown beside their nearest real ones, at most --count. Default: 16.
        max_bad: Damaged files of a folder to leave out; more is an error. Default: 10.
        real_count: Real pictures to measure against, from all over the set. Default: all.
        out: Folder to write to.
    """
    network = load_trained(model)
    data = trained_on(network) if data is None else data
    option = with_training_options(data, option, network)
    own = {"neighbours": neighbours, "real_count": real_count, "count": count}
    settings: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    given = {"data": data, "option": list(option), "max_bad": max_bad, **own}
    if flags != FLAGS or task_of(network).generates:
        sampling = flags.make(DEFAULT.seeds)
        settings["sampling"] = sampling.resolved(network) if task_of(network).generates else sampling
        given |= flags.as_dict(settings["sampling"])
    options = options_of(data, option, max_bad)
    with writable(out), progress() as advance:
        found = measured(network, data, options=options, progress=advance, **settings)
        save(found, out, "evaluation.json", ["evaluate", model], given, settings={"model": model, **given})


def save(
    found: Evaluation,
    out: Path,
    name: str,
    command: list[str],
    given: Mapping[str, Any],
    **described: Any,
) -> None:
    """Write figures, pictures and films into `out`, and print the table and the names of the files.

    Args:
        name: of the file of figures. command: words before the flags that `given` becomes.
        described: what stands in the file beside the figures.
    """
    words = shlex.join(["ditkit", *command, *words_of(given)])
    write_json(out / name, {"command": words, **described, **found.as_dict()})
    first, *others = found.save(out)
    if (table := found.table()) is not None:
        Console().print(table)
    for line in found.remarks():
        print(line)
    print("\n  ".join([f"wrote {out}: {', '.join([name, *first])}", *map(", ".join, others)]))
