"""The strict reader of flat YAML: values stay text, everything malformed is named with its place."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from locft_jax.errors import UserError
from locft_jax.rules import is_null, read_yaml, shown, split_override


def read(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_yaml(path)


def message(call, *args):
    """The one message of a `UserError`, which must fit a screen."""
    with pytest.raises(UserError) as error:
        call(*args)
    assert len(str(error.value)) < 600 and str(error.value).count("\n") == 0
    return str(error.value)


def test_values_stay_text(tmp_path):
    text = "lr: 5e-4\ncache: off\nmodel: 0123  # a comment\nlayer: [1, ~]\nmesh: {data: -1}\nnone:\n"
    assert read(tmp_path, text) == {
        "lr": "5e-4",
        "cache": "off",
        "model": "0123",
        "layer": ["1", "~"],
        "mesh": {"data": "-1"},
        "none": "",
    }
    assert read(tmp_path, '{"lr": 1e-3, "names": ["a", "b"]}') == {"lr": "1e-3", "names": ["a", "b"]}


@pytest.mark.parametrize("text", ["", "# only a comment\n", "null\n", "~"])
def test_a_file_without_values_is_empty(tmp_path, text):
    assert read(tmp_path, text) == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model_name_or_path: m\nlr: [1\n", "line 3, column 1"),
        ("lr: 1\n  batch_size: 2\n", "line 2, column 13"),
        ("lr: 1\nlr: 2\n", "line 2, column 1: malformed YAML: the key `lr` appears twice"),
        ("mesh: {data: 1, data: 2}\n", "line 1, column 17"),
        ("lr: 1\n--- \nlr: 2\n", "line 2"),
        ("lr: &a 1\nweight_decay: *a\n", "line 1, column 5"),
        ("lr: *a\n", "anchors"),
        ("lr: !!python/object/apply:os.system [ls]\n", "tags"),
        ("lr: !!float 1\n", "tags"),
        ("? [a]\n: 1\n", "line 1, column 3"),
        ("lr: 1\ndata_path: a\x00b\n", "line 2, column 13"),
        ('data_path: "\\U00110000"\n', "malformed YAML"),
        ("[" * 20_000, "nested too deeply"),
        ("- lr\n- 1\n", "`key: value`"),
        ("just text\n", "`key: value`"),
        ("a: 1\n" * 20_000, "too large"),
        (b"lr: \xff\n", "byte 4"),
        (b"\xff\xfel\x00r\x00", "byte 0"),
    ],
)
def test_a_malformed_file_says_where(tmp_path, text, says):
    got = message(read, tmp_path, text)
    assert str(tmp_path / "run.yaml") in got and says in got


def test_a_byte_order_mark_is_no_error(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbfmodel: m\n") == {"model": "m"}


def test_an_unreadable_file_is_named(tmp_path):
    assert "nope.yaml: cannot read" in message(read_yaml, tmp_path / "nope.yaml")
    assert f"{tmp_path}: cannot read" in message(read_yaml, tmp_path)


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("lr=5e-4", ("lr", "5e-4")),
        (" lr = ", ("lr", "")),
        ("a=b=c", ("a", "b=c")),
        ("path=a b#c: &d=e.json", ("path", "a b#c: &d=e.json")),
        ("layer=[1, 2]", ("layer", ["1", "2"])),
        ("mesh={data: 2}", ("mesh", {"data": "2"})),
        ('path="a # b"', ("path", "a # b")),
    ],
)
def test_an_override_is_a_key_and_a_value(text, pair):
    assert split_override(text) == pair


@pytest.mark.parametrize("text", ["lr", "=5", "", "lr:5"])
def test_an_override_without_key_or_value_says_what_is_expected(text):
    assert "expected key=value" in message(split_override, text)


def test_a_malformed_override_names_its_key():
    assert message(split_override, "layer=[1").startswith("layer: line 1")
    assert "nested too deeply" in message(split_override, "layer=" + "[" * 20_000)
    assert "quotes" in message(split_override, "names=[a.{}.b, a.{}.c]")
    assert split_override('names=["a.{}.b"]') == ("names", ["a.{}.b"])


def test_null_and_shown():
    assert all(is_null(v) for v in (None, "", " ", "~", "Null"))
    assert not any(is_null(v) for v in (0, False, [], "none"))
    assert [shown(v) for v in (None, True, (1, 2), "a\nb")] == ["null", "true", "[1, 2]", r"'a\nb'"]
    assert shown("x" * 99) == "x" * 80 + "…" and "long" in shown(10**5000)


PIECES = st.sampled_from(
    ["lr", "layer", "mesh", ": ", ":", " ", "\n", "  ", "- ", "[", "]", "{", "}", ",", "&a", "*a"]
    + ["!!int", "|", ">", "#", "%YAML 1.1\n", "---", "...", '"', "'", "\\x", "\\U00110000", "5e-4"]
    + ["\t", "\x00", "é", "\ud800", "? ", "<<", "null", "9" * 400, "~", "@", "`"]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=40))
@example("%YAML " + "9" * 5000 + ".1\n--- a")
@example('"\\UFFFFFFFF"')
def test_any_text_gives_values_or_one_message(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for call in (
        lambda: read_yaml(path),
        lambda: dict([split_override(text)]),
        lambda: dict([split_override("mesh=" + text)]),
        lambda: dict([split_override("layer=[" + text)]),
    ):
        try:
            assert isinstance(call(), dict)
        except UserError as error:
            assert str(error)
