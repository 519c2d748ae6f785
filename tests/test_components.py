import sys
import types

import pytest
from pydantic import ValidationError

from limbeck.components import Component, build, import_object, resolve
from limbeck.errors import InputError

CATALOGUE = {"frac": "fractions:Fraction", "path": "os.path:join", "number": "math:pi", "lost": "no_such_package:x"}


@pytest.fixture
def parts(monkeypatch):
    module = types.ModuleType("own_parts")

    def width(size: int, *, depth: int = 2, num_classes: int = 0) -> tuple[int, int, int]:
        if size < 0:
            raise ValueError("size is negative")
        return size, depth, num_classes

    def broken(size: int) -> int:
        return helper(size)

    def helper(size: int) -> int:
        raise RuntimeError(f"a fault inside at {size}")

    def anything(**knobs: int) -> dict[str, int]:
        return knobs

    for function in (width, broken, anything):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "own_parts", module)
    return {"width": "own_parts:width", "anything": "own_parts:anything", "broken": "own_parts:broken"}


def test_short_forms_say_the_same():
    assert Component.model_validate("mlp") == Component(name="mlp")
    assert Component.model_validate({"name": "mlp", "hidden": [3]}) == Component(name="mlp", args={"hidden": [3]})
    assert Component.model_validate({"name": "mlp", "args": {"hidden": [3]}}) == Component(name="mlp", args={"hidden": [3]})
    assert Component.model_validate({"name": "mlp", "args": {"hidden": [3]}, "width": 2}).args == {"hidden": [3], "width": 2}
    assert Component.model_validate("a.b:c") == Component(target="a.b:c")
    assert str(Component(name="mlp")) == "mlp"
    assert str(Component(target="a.b:c")) == "a.b:c"


@pytest.mark.parametrize(
    "value", [{}, {"args": {}}, {"name": "x", "target": "y:z"}, {"name": "x", "args": 3}, {"name": 3}, {"target": "a:b", "width": 3}, 5, None, []]
)
def test_what_is_no_component(value):
    with pytest.raises(ValidationError):
        Component.model_validate(value)


@pytest.mark.parametrize("path", ["", ":", "os", "os:", ":x", ".x:y", "no_such_package:x", "os.no_such:x"])
def test_what_is_no_import_path(path):
    with pytest.raises(InputError):
        import_object(path)


def test_an_attribute_that_is_not_there_gets_a_suggestion():
    assert import_object("os:path.join") is __import__("os").path.join
    with pytest.raises(InputError, match=r"'os.path' has no 'joim'.*Did you mean 'join'"):
        import_object("os.path:joim")


def test_a_module_that_fails_to_import_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_more.py").write_text("import no_such_thing_at_all\n")
    with pytest.raises(InputError, match=r"cannot import 'needs_more'.*no_such_thing_at_all"):
        import_object("needs_more:x")


def test_unknown_names_get_a_suggestion():
    with pytest.raises(InputError, match=r"^name: unknown model 'frak'\. Did you mean 'frac'\?$"):
        resolve(Component(name="frak"), CATALOGUE, "model")
    with pytest.raises(InputError, match=r"Known: frac, lost, number, path\."):
        resolve(Component(name="zzzzzz"), CATALOGUE, "model")
    with pytest.raises(InputError, match=r"^target: 'math:pi' is not callable"):
        resolve(Component(target="math:pi"), CATALOGUE, "model")
    with pytest.raises(InputError, match=r"^target: cannot import"):
        resolve(Component(target="no_such_package:x"), CATALOGUE, "model")


def test_build_fills_in_only_what_the_signature_takes_and_the_recipe_leaves_out(parts):
    assert build(Component(name="width", args={"size": 3}), parts, "model", num_classes=7, input_shape=(1, 2)) == (3, 2, 7)
    assert build(Component(name="width", args={"size": 3, "num_classes": 1}), parts, "model", num_classes=7) == (3, 2, 1)
    assert build(Component(name="anything", args={"a": 1}), parts, "model", num_classes=7) == {"a": 1}


def test_arguments_that_do_not_fit_are_named(parts):
    with pytest.raises(InputError, match=r"^args\.sise: model 'width' takes no argument 'sise'\. Did you mean 'size'\?$"):
        build(Component(name="width", args={"sise": 3}), parts, "model")
    with pytest.raises(InputError, match=r"^args: model 'width' needs the argument 'size'"):
        build(Component(name="width"), parts, "model")
    with pytest.raises(InputError, match=r"^args: model 'width' refused its arguments: size is negative"):
        build(Component(name="width", args={"size": -3}), parts, "model")
    with pytest.raises(InputError, match=r"refused its arguments"):
        build(Component(name="width", args={"size": "x"}), parts, "model")


def test_a_fault_in_a_persons_own_code_is_told_with_its_place(parts):
    with pytest.raises(InputError, match=r"a fault inside at 3 \(RuntimeError at .*\.py:\d+\)"):
        build(Component(target="own_parts:broken", args={"size": 3}), parts, "model")
