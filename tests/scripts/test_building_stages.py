"""Build the objects that a configuration describes."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from settings import build

from rag.types import UserError
from tests.scripts.launch_settings import Stage


def composed(conf: Path, *overrides: str):
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("tiny", list(overrides)).stage


def test_build_makes_plain_objects(conf):
    inner = Stage(size=1)
    stage = build(
        composed(conf, "stage.ratio=1", "+stage.words=[a,b]", "+stage.parts=[c]"), name="x", inner=inner
    )
    assert stage == Stage(128, 1, "x", inner, ["a", "b"], ["c"])
    assert stage.inner is inner  # handed on, not copied
    assert type(stage.words) is list
    assert build(composed(conf, "+stage.inner._target_=tests.scripts.launch_settings.Stage")).inner == Stage()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stage.size=many", "stage.size=many is not valid: it must be a whole number"),
        ("stage.size=1.5", "stage.size=1.5 is not valid: it must be a whole number"),
        ("stage.size=true", "stage.size=true is not valid: it must be a whole number"),
        ("stage.size=null", "stage.size=null is not valid: it must be a whole number"),
        ("stage.ratio=x", "stage.ratio=x is not valid: it must be a number"),
        ("+stage.name=3", "stage.name=3 is not valid: it must be text or null"),
        ("+stage.order=up", "stage.order=up is not valid: it must be score or reverse"),
        ("+stage.colour=red", r"no setting 'stage\.colour': .*Stage takes size, ratio"),
        (
            "+stage.inner={_target_:tests.scripts.launch_settings.Stage,sise:1}",
            r"no setting 'stage\.inner\.sise'",
        ),
        (
            "+stage.inner={_target_:tests.scripts.launch_settings.Stage,size:-1}",
            "stage.size must be 0 or more",
        ),
        ("stage.size=-1", "stage.size must be 0 or more"),
    ],
)
def test_build_names_the_wrong_setting(conf, override, sentence):
    with pytest.raises(UserError, match=sentence):
        build(composed(conf, override))
