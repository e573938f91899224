"""Weights taken from a model of another class or size, or a refusal that names the tensor."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from ditkit.compress import Kept
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.inherit import Inherit, inherit
from ditkit.models.dit import DiT
from ditkit.models.vdt import VDT, VDTConfig
from rig import TINY, tiny_dit


def test_a_shallow_student_is_its_teacher_cut():
    teacher, student = tiny_dit(), DiT(replace(TINY, depth=2)).eval()
    rule = Inherit(map=(("blocks.1.*", "blocks.2.*"),))
    report = inherit(student, teacher, rule)
    assert report["fresh"] == 0 and report["left"] == 10
    cut = tiny_dit()
    cut.transform(Kept(blocks=(0, 2)))
    x = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.7]), Cond(label=torch.tensor([0, 1]))
    assert torch.equal(student(*x), cut(*x))


def test_a_video_model_begins_as_an_image_model():
    image = tiny_dit()
    given = {name: value for name, value in asdict(TINY).items() if name in VDTConfig.__dataclass_fields__}
    video = VDT(VDTConfig(**{**given, "convention": TINY.convention, "frames": 3}))
    report = inherit(video, image, Inherit(skip=("blocks.*.temporal_attn.*",)))
    assert report["left"] == 0 and report["taken"] == len(image.state_dict())
    assert torch.equal(video.blocks[2].mlp.inner.weight, image.blocks[2].mlp.inner.weight)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Inherit(), r"DiT has no tensor 'blocks.0.temporal_attn.norm.weight' for .*; map it, or skip it"),
        (Inherit(skip=("blocks.*.temporal.*",)), r"no tensor of the model matches 'blocks.\*.temporal.\*'"),
        (
            Inherit(skip=("blocks.*.temporal_attn.*",), map=(("embed.weight", "head.out.weight"),)),
            r"'head.out.weight' is \[12, 32\], expected \[32, 12\] for 'embed.weight'",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused_and_nothing_is_copied(rule, message):
    given = {name: value for name, value in asdict(TINY).items() if name in VDTConfig.__dataclass_fields__}
    video = VDT(VDTConfig(**{**given, "convention": TINY.convention, "frames": 3}))
    before = {k: v.clone() for k, v in video.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        inherit(video, tiny_dit(), rule)
    assert all(torch.equal(v, before[k]) for k, v in video.state_dict().items())
    with pytest.raises(ConfigError, match="expected as many stars in both"):
        Inherit(map=(("blocks.*.a", "blocks.1.a"),))
