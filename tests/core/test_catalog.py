import sys
import types

import pytest

from ditkit.core.catalog import every, find
from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.core.policy import Policy
from ditkit.models.dit import DiT


@pytest.mark.parametrize("base", [Model, Policy])
def test_members_are_sorted_and_no_two_share_a_name(base):
    names = [cls.__name__.lower() for cls in every(base)]
    assert len(set(names)) == len(names)
    assert every(base) == sorted(every(base), key=lambda cls: cls.__name__)


def test_models_are_found_in_any_case():
    assert DiT in every(Model)
    assert find(Model, "DiT") is find(Model, "dit") is DiT


def test_an_unknown_name_quotes_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown model 'ditt'; did you mean 'dit'\? \(choose from: .*dit"):
        find(Model, "ditt")


def test_a_file_in_the_folder_is_enough(tmp_path, monkeypatch):
    package = tmp_path / "homely"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text("from homely_base import Base\nclass Two(Base):\n    def f(self): ...\n")
    (package / "other.py").write_text("from homely_base import Base\nclass Abstract(Base): ...\n")
    (tmp_path / "homely_base.py").write_text(
        "from abc import ABC, abstractmethod\n"
        "class Base(ABC):\n"
        "    homes = ('homely', 'ditkit.no_such_package')\n"
        "    @abstractmethod\n"
        "    def f(self): ...\n"
        "class NextDoor(Base):\n"
        "    def f(self): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from homely_base import Base  # type: ignore[import-not-found]

    assert [cls.__name__ for cls in every(Base)] == ["Two"]

    stranger = types.new_class("One", (Base,), exec_body=lambda body: body.update(f=lambda self: None))
    stranger.__module__ = "homely_too.one"
    assert [cls.__name__ for cls in every(Base)] == ["Two"]
    for name in ("homely_base", "homely", "homely.one", "homely.other"):
        monkeypatch.delitem(sys.modules, name)


def test_a_class_without_homes_has_no_members():
    class Lonely: ...

    assert every(Lonely) == []
