"""A donor: a class-conditional video DiT of a moving digit, the clip model that methods start from."""

from __future__ import annotations

from dataclasses import replace

from ditkit.recipes.vdt import vdt
from ditkit.recipes.video_dit import video_dit
from ditkit.tasks.video.recipe import VideoRecipe
from ditkit.train.ema import Power


def digits_video_dit() -> VideoRecipe:
    """1.9 M parameters, 16 frames of 32 x 32 in 1,024 tokens that all see each other; one slow digit, by its class.

    298 TMAC in all. What ships as `digits-video-dit` (see its card). Its snapshots at 25, 50 and 75 % are
    `benchmarks/donors/digits-video-dit`. The label is dropped more often than usual because guidance also takes away
    what is given, and both are absent in few samples.
    """
    like, of_one_digit = video_dit(), vdt()
    return replace(
        like,
        options={**of_one_digit.options, "labels": True},
        model=replace(like.model, label_dropout=0.2),
        settings=replace(like.settings, steps=4400, averages=(Power(0.10),), snapshot_every=550),
        objective=of_one_digit.objective,
    )
