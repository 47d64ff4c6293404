"""params.yaml's schema: every mistake is one line that names its key, and limits, digests and rules hold."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lesionsam.config.edit import fit
from lesionsam.config.limits import Limits
from lesionsam.config.load import (
    Config,
    ConfigError,
    config_digest,
    default_text,
    default_values,
    describe,
    flatten,
    known_keys,
    load_config,
    parse_yaml,
    to_values,
    unflatten,
    validate,
    with_values,
    yaml_text,
)
from lesionsam.config.summary import summary, trained_parts
from lesionsam.errors import UserError

DEFAULT = validate(default_values())
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "folder": {"data": {"source": "folder"}},
    "coco": {"data": {"source": "coco"}},
    "isic": {
        "data": {"source": "isic2018"},
        "model": {"encoder": "none"},
        "method": {"weights": {"contrast": 0.0, "distil": 0.0}, "target": {"kind": "teacher"}},
    },
    "csv": {"boxes": {"source": "csv"}, "method": {"target": {"kind": "ellipse"}}},
    "prior": {"method": {"target": {"kind": "prior"}}},
    "fused": {"method": {"target": {"kind": "fused"}}},
    "supervised": {"method": {"name": "supervised"}},
    "lora, prompts from masks": {
        "model": {"encoder": "lora"},
        "method": {"name": "supervised", "prompts": {"source": "masks"}, "weighting": {"kind": "learned"}},
    },
    "adapter": {"model": {"encoder": "adapter"}},
}


@cache
def _values_of(variant: str) -> dict[str, Any]:
    values = default_values()
    for section, changes in VARIANTS[variant].items():
        for key, change in changes.items():
            held = values[section].get(key)
            values[section][key] = {**held, **change} if isinstance(held, dict) else change
    return fit(values)


def values_of(variant: str) -> dict[str, Any]:
    """Nested values with a variant of some sections."""
    return copy.deepcopy(_values_of(variant))


LEAVES = [
    (variant, key)
    for variant in VARIANTS
    for key, limits in known_keys(values_of(variant)).items()
    if limits.kind != "section"
]


def changed(values: Mapping[str, Any], key: str, value: object) -> dict[str, Any]:
    return unflatten({key: value}, values)


def without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    values, (*path, leaf) = copy.deepcopy(dict(values)), key.split(".")
    held = values
    for name in path:
        held = held[name]
    del held[leaf]
    return values


def issues_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Key -> line of every issue; fails where there is none."""
    with pytest.raises(ConfigError) as caught:
        validate(values)
    assert all("\n" not in line for line in caught.value.lines)
    assert len({issue.key for issue in caught.value.issues}) == len(caught.value.issues), "one line a key"
    return {issue.key: issue.message for issue in caught.value.issues}


def train_text(key: str, line: str) -> str:
    """The default file with a key's line in the section `train` replaced up to its comment."""
    head, mark, tail = default_text().partition("\ntrain:\n")
    old = f"  {key}: {yaml_text(default_values()['train'][key])}"
    assert mark
    assert old in tail
    return head + mark + tail.replace(old, f"  {line}", 1)


def wrong_type(limits: Limits) -> st.SearchStrategy[object]:
    """Values of a type that the key does not take."""
    wrong: dict[str, list[object]] = {
        "integer": [1.5, True, "3", None, [1], {"a": 1}],
        "number": [True, "1e-3", None, [1.0], {"a": 1.0}],
        "boolean": [1, 0, "true", None, []],
        "text": [1, True, None, ["a"]],
        "choice": [1, True, None, "nonesuch", []],
        "list": [1, "ring", None, [None], [{"a": 1}]],
    }
    return st.sampled_from([value for value in wrong[limits.kind] if str(value) not in limits.choices])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_validates(variant: str) -> None:
    config = validate(values_of(variant))
    assert to_values(config) == values_of(variant)
    assert summary(config)[0].split()[1] == config.data.source


@given(st.sampled_from(LEAVES))
def test_a_missing_key_is_named(leaf: tuple[str, str]) -> None:
    variant, key = leaf
    issues = issues_of(without(values_of(variant), key))
    assert issues[key].startswith("missing, expected ")
    if not key.endswith((".source", ".encoder", ".kind", ".name")):
        assert list(issues) == [key]


@given(st.sampled_from(LEAVES), st.integers(0, 3))
@example(("default", "train.lr_decoder"), 3)
@example(("default", "train.lr_encoder"), 4)
def test_a_misspelt_key_is_named_and_the_right_one_suggested(leaf: tuple[str, str], place: int) -> None:
    variant, key = leaf
    parent, _, name = key.rpartition(".")
    if len(name) < 4:
        return
    values, wrong = values_of(variant), f"{parent}.{name[:place]}{name[place + 1 :]}".lstrip(".")
    held = flatten(values)
    issues = issues_of(changed(without(values, key), wrong, held[key]))
    assert issues[wrong] == f"unknown key; did you mean {key}?"
    assert issues[key].startswith("missing")


@given(st.data(), st.sampled_from(LEAVES))
def test_a_wrong_type_is_named(data: st.DataObject, leaf: tuple[str, str]) -> None:
    variant, key = leaf
    values = values_of(variant)
    limits = known_keys(values)[key]
    issues = issues_of(changed(values, key, data.draw(wrong_type(limits))))
    assert issues[key].startswith(f"expected {limits.expected}, got ")


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        (variant, key)
        for variant, key in LEAVES
        if (limits := known_keys(values_of(variant))[key]).low is not None or limits.high is not None
    ],
)
def test_limits_are_where_they_are_said_to_be(variant: str, key: str) -> None:
    values = values_of(variant)
    limits = known_keys(values)[key]
    is_list = limits.kind == "list"
    for bound, outwards, is_open in ((limits.low, -1, limits.low_open), (limits.high, 1, limits.high_open)):
        if bound is None:
            continue
        exact = int(bound) if limits.kind == "integer" else float(bound)
        beyond = exact + outwards if limits.kind == "integer" else math.nextafter(exact, math.inf * outwards)
        for value, fits in ((exact, not is_open), (beyond, False)):
            try:
                validate(changed(values, key, [value] if is_list else value))
                refused = False
            except ConfigError as error:  # a rule between keys may refuse it too, in other words
                refused = any(issue.key == key and limits.expected in issue.message for issue in error.issues)
            assert refused != fits, f"{key}: {value}"


def test_every_issue_at_once_and_in_order() -> None:
    values = unflatten(
        {
            "boxes.margin_low": 0.3,
            "method.name": "contrstive",
            "method.gate.region": "big",
            "method.prompts.ring": -1.0,
            "train.epochs": 0,
            "train.temperature": 0.1,
            "evaluate.jitter": [0.1, 0.1],
            "runtime.device": "gpu",
            "quota": {"trials": 3},
        },
        default_values(),
    )
    issues = issues_of(values)
    assert list(issues) == [
        "boxes.margin_low",
        "method.name",
        "method.gate.region",
        "method.prompts.ring",
        "train.temperature",
        "train.epochs",
        "evaluate.jitter",
        "runtime.device",
        "quota",
    ]
    assert issues["method.name"].endswith("got the text 'contrstive'; did you mean contrastive?")
    assert issues["train.temperature"] == "unknown key; did you mean method.temperature?"
    assert issues["boxes.margin_low"] == "expected at most boxes.margin_high (0.2), got 0.3"


def test_an_old_name_of_a_weight_leads_to_the_new_one() -> None:
    issues = issues_of(changed(default_values(), "method.alpha", 0.1))
    assert issues == {"method.alpha": "unknown key; did you mean method.weights.contrast?"}
    issues = issues_of(changed(values_of("supervised"), "method.beta", 0.1))
    assert issues == {"method.beta": "unknown key; did you mean method.weights.iou?"}


def test_a_key_of_another_variant_says_when_it_is_read() -> None:
    issues = issues_of(changed(default_values(), "data.dev_fraction", 0.1))
    assert issues == {
        "data.dev_fraction": "read only when data.source is folder or coco or isic2016 or isic2017 or "
        "isic2018, got synthetic; remove it"
    }
    issues = issues_of(changed(values_of("csv"), "method.target.placebo", "other"))
    assert list(issues) == ["method.target.placebo"]
    assert issues["method.target.placebo"].startswith("read only when method.target.kind is prior or ")


def test_the_message_of_several_issues_has_a_line_each(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(train_text("epochs", "epochs: x").replace("patience: 0 ", "patence: 0 "), "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    first, *lines = str(caught.value).splitlines()
    assert first == "params.yaml: 3 issues"
    assert [line.split(":")[0].strip() for line in lines] == ["train.patence", "train.epochs", "train.patience"]
    assert "add `patience: 0`" in lines[2]


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"boxes.core_low": 0.9}, "boxes.core_low", "boxes.core_high"),
        (
            {
                "model.encoder": "none",
                "model.train_decoder": False,
                "model.train_prompt_encoder": False,
                "method.weights.contrast": 0.0,
            },
            "model.train_decoder",
            "nothing trains",
        ),
        ({"model.encoder": "none", "method.weights.contrast": 1.0}, "method.weights.contrast", "model.encoder is none"),
        (
            {"model.encoder": "none", "method.weights.contrast": 0.0, "method.weights.distil": 1.0},
            "method.weights.distil",
            "model.encoder is none",
        ),
        ({"model.checkpoint": "published"}, "model.checkpoint", "compact"),
        ({"model.name": "vit_b", "model.unfreeze_last_k": 13}, "model.unfreeze_last_k", "12"),
        ({"model.image_size": 20}, "model.image_size", "32"),
        ({"model.name": "vit_b", "model.image_size": 1000}, "model.image_size", "expected a multiple of 16"),
        ({"model.name": "vit_b", "model.encoder": "lora", "model.lora_last_k": 13}, "model.lora_last_k", "12"),
        ({"model.name": "vit_b", "model.encoder": "adapter", "model.adapter_last_k": 13}, "model.adapter_last_k", "12"),
        (
            {"model.encoder": "lora", "model.lora_rank": 0},
            "model.lora_rank",
            "expected an integer from 1 to 1024, got 0",
        ),
        (
            {"method.weights.contrast": 0.0, "method.weights.pseudo": 0.0, "method.weights.projection": 0.0},
            "method.weights.contrast",
            "nothing is learnt",
        ),
        (
            {f"method.prompts.{kind}": 0.0 for kind in ("ring", "centre", "box", "box+core")},
            "method.prompts",
            "above 0",
        ),
        ({"data.source": "isic2016", "data.dev_fraction": 0.0}, "data.dev_fraction", "above 0"),
        ({"data.source": "folder", "data.test_split": "val"}, "data.dev_fraction", "data.test_split is val"),
        ({"evaluate.prompts": ["ring", "ring"]}, "evaluate.prompts", "once"),
    ],
)
def test_rules_between_keys(changes: dict[str, Any], key: str, words: str) -> None:
    issues = issues_of(fit(unflatten(changes, default_values())))
    assert list(issues) == [key]
    assert words in issues[key]


@pytest.mark.parametrize(
    ("variant", "key", "message"),
    [
        ("default", "model.lora_rank", "read only when model.encoder is lora, got blocks; remove it"),
        ("default", "model.adapter_dim", "read only when model.encoder is adapter, got blocks; remove it"),
        ("adapter", "model.unfreeze_last_k", "read only when model.encoder is blocks, got adapter; remove it"),
        (
            "supervised",
            "method.prompts.max_points",
            "read only when method.prompts.source is masks, got boxes; remove it",
        ),
        (
            "supervised",
            "method.weighting.learning_rate",
            "read only when method.weighting.kind is learned, got fixed; remove it",
        ),
        ("default", "method.corrections", "read only when method.name is supervised, got contrastive; remove it"),
    ],
)
def test_a_strategys_option_under_another_strategy_is_one_line(variant: str, key: str, message: str) -> None:
    assert issues_of(changed(values_of(variant), key, 1)) == {key: message}


def test_what_trains_in_words() -> None:
    words = {
        variant: trained_parts(values_of(variant)["model"])
        for variant in ("default", "lora, prompts from masks", "adapter")
    }
    assert words["default"] == "the whole encoder, the decoder, the prompt encoder"
    assert words["lora, prompts from masks"].startswith("low-rank updates (rank 8) of the whole encoder, the decoder")
    frozen = {**default_values()["model"], "encoder": "none", "train_prompt_encoder": False}
    assert trained_parts(frozen) == "the decoder"
    last = {**values_of("adapter")["model"], "adapter_last_k": 2}
    assert trained_parts(last).startswith("adapters of 32 units of the last 2 encoder blocks")


def test_options_of_another_strategy_go_when_the_strategy_changes() -> None:
    """`fit`, behind presets and upgrade: also inside a section that both methods have."""
    masks = values_of("lora, prompts from masks")
    back = fit(unflatten({"method.name": "contrastive", "model.encoder": "blocks"}, masks))
    assert not set(back["model"]) - set(default_values()["model"])
    assert set(back["method"]["prompts"]) == {"ring", "centre", "box", "box+core", "none"}
    validate(back)


def test_supervised_needs_no_contrastive_term_and_a_frozen_encoder_is_fine() -> None:
    values = fit(unflatten({"method.name": "supervised", "model.encoder": "none"}, default_values()))
    assert validate(values).model.encoder == "none"


def write_params(folder: Path, values: Mapping[str, Any]) -> Path:
    path = folder / "params.yaml"
    path.write_text("\n".join(f"{name}: {yaml_text(held)}" for name, held in values.items()), "utf-8")
    return path


@pytest.mark.parametrize(("word", "meant"), [("yes", "true"), ("off", "false")])
def test_a_switch_of_yaml_1_1_is_explained(word: str, meant: str) -> None:
    text = default_text().replace("augment: true", f"augment: {word}")
    issues = issues_of(parse_yaml(text, "params.yaml"))
    assert issues == {"train.augment": f"expected true or false, got the text '{word}'; did you mean {meant}?"}


def test_an_input_that_is_watched_but_not_read_must_be_there(tmp_path: Path) -> None:
    path = write_params(tmp_path, unflatten({"inputs.boxes": "mine.csv"}, default_values()))
    with pytest.raises(ConfigError, match=r"inputs.boxes: expected own where it is not read .* got mine.csv$"):
        load_config(path)
    (tmp_path / "mine.csv").touch()
    assert load_config(path).inputs.boxes == "mine.csv"


def test_files_that_parameters_name(tmp_path: Path) -> None:
    path = write_params(tmp_path, values_of("csv"))
    with pytest.raises(ConfigError, match=r"inputs.boxes: expected a CSV file .* got none at own"):
        load_config(path)
    assert load_config(path, check_files=False).boxes.source == "csv"
    (tmp_path / "own").write_text("image_id", "utf-8")
    assert load_config(path).boxes.source == "csv"


def test_folders_that_parameters_name(tmp_path: Path) -> None:
    mine = {"data.source": "folder", "inputs.folder": "mine", "inputs.boxes": "mine/boxes.csv"}
    values = fit(unflatten(mine, default_values()))
    path = write_params(tmp_path, values)
    with pytest.raises(ConfigError, match=r"inputs.folder: .* holds images/train, images/test, images/val, got"):
        load_config(path)
    for split in ("train", "val", "test"):
        (tmp_path / "mine" / "images" / split).mkdir(parents=True)
    (tmp_path / "mine" / "boxes.csv").touch()
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert [issue.key for issue in caught.value.issues] == [*["boxes.source"] * 3, "train.select"]
    write_params(tmp_path, fit(unflatten({"boxes.source": "csv", "train.select": "label_free"}, values)))
    assert load_config(path).train.select == "label_free"
    write_params(
        tmp_path,
        fit(unflatten({"boxes.source": "csv", "train.select": "label_free", "method.name": "supervised"}, values)),
    )
    with pytest.raises(ConfigError, match=r"method.name: expected contrastive when mine has no masks"):
        load_config(path)
    for split in ("train", "val", "test"):
        (tmp_path / "mine" / "masks" / split).mkdir(parents=True)
    assert load_config(path).method.name == "supervised"


def test_numbers_as_people_write_them() -> None:
    text = default_text().replace("lr_encoder: 1.0e-3", "lr_encoder: 2e-3").replace("clip: 1.0", "clip: 1")
    config = validate(parse_yaml(text, "params.yaml"))
    assert (config.train.lr_encoder, config.train.clip) == (0.002, 1.0)
    assert isinstance(config.train.lr_encoder, float)
    assert isinstance(config.train.clip, float)


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf"])
def test_numbers_that_are_none(number: str) -> None:
    values = parse_yaml(default_text().replace("lr_encoder: 1.0e-3", f"lr_encoder: {number}"), "params.yaml")
    assert list(issues_of(values)) == ["train.lr_encoder"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected sections, got nothing"),
        ("- 1\n- 2\n", "expected sections, got the list"),
        ("version: 1\nversion: 1\n", "line 2: found duplicate key"),
        ("train:\n  epochs: 1\n  epochs: 2\n", "line 3: found duplicate key"),
        ("train: [1, 2\n", "expected YAML"),
        ("train:\n\tepochs: 1\n", "line 2: expected YAML"),
        ("a: *nothing\n", "expected YAML"),
        (
            "a: 1\n<<<<<<< HEAD\nb: 1\n=======\nb: 2\n>>>>>>> other\n",
            "line 2: expected YAML, got the marker <<<<<<< of a",
        ),
        ("a: 1\n>>>>>>> other\n", "line 2: expected YAML, got the marker >>>>>>> of a merge conflict; keep one of"),
    ],
)
def test_files_that_are_no_parameters(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found none; `lesionsam preset demo` writes one"):
        load_config(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_config(tmp_path / "params.yaml")
    with pytest.raises(UserError, match="text file"):
        load_config(tmp_path)


def test_describe() -> None:
    limits = describe("method.gate.entropy_thresh", DEFAULT)
    assert (limits.kind, limits.low, limits.high, limits.low_open) == ("number", 0, 0.6932, False)
    assert "nats" in limits.description
    assert describe("method.temperature", DEFAULT).low_open
    assert describe("data.source", DEFAULT).choices == (
        "synthetic",
        "folder",
        "coco",
        "isic2016",
        "isic2017",
        "isic2018",
    )
    offset = describe("method.target.offset", DEFAULT)
    assert (offset.kind, offset.choices, offset.low, offset.high) == ("number", ("boxes", "none"), -3, 3)
    jitter = describe("evaluate.jitter", DEFAULT)
    assert (jitter.kind, jitter.low, jitter.high) == ("list", 0, 0.9)
    with pytest.raises(UserError, match=r"^method.temprature: unknown key; did you mean method.temperature\?$"):
        describe("method.temprature", DEFAULT)
    with pytest.raises(UserError, match=r"read only when method.name is contrastive, got supervised"):
        describe("method.temperature", values_of("supervised"))


def test_with_values() -> None:
    config = with_values(DEFAULT, {"method.temperature": 0.2, "method.prompts.box+core": 1})
    assert config.method.name == "contrastive"
    assert (config.method.temperature, config.method.prompts.box_core) == (0.2, 1.0)
    assert to_values(DEFAULT) == default_values(), "the old one stays as it was"
    with pytest.raises(ConfigError, match=r"trial 3: method.temperature: expected a number above 0"):
        with_values(DEFAULT, {"method.temperature": 0.0}, "trial 3")
    with pytest.raises(UserError, match=r"did you mean train.epochs\?"):
        with_values(DEFAULT, {"train.epoch": 3})


def test_shares_sum_to_one() -> None:
    config = with_values(
        DEFAULT,
        {
            "method.prompts.ring": 1,
            "method.prompts.box": 3,
            "method.prompts.centre": 0,
            "method.prompts.box+core": 0,
            "method.prompts.none": 0,
        },
    )
    assert config.method.prompts.shares() == {"ring": 0.25, "centre": 0.0, "box": 0.75, "box+core": 0.0, "none": 0.0}


def test_flatten_has_scalars_under_the_files_own_names() -> None:
    flat = flatten(DEFAULT)
    assert flat["method.prompts.box+core"] == default_values()["method"]["prompts"]["box+core"]
    assert flat["evaluate.prompts"] == ", ".join(default_values()["evaluate"]["prompts"])
    assert all(isinstance(value, str | int | float | bool) for value in flat.values())
    assert unflatten({"a.b": 1, "a.c.d": 2}) == {"a": {"b": 1, "c": {"d": 2}}}


def digest_after(key: str, value: object) -> str:
    return config_digest(with_values(DEFAULT, {key: value}))


def test_digest_knows_what_a_result_depends_on() -> None:
    same, values = config_digest(DEFAULT), default_values()
    assert same == config_digest(validate(dict(reversed(values.items()))))
    assert same == config_digest(validate(changed(values, "train.clip", 1)))
    for key, value in (("runtime.device", "cpu"), ("runtime.num_threads", 2), ("tracking.enabled", False)):
        assert digest_after(key, value) == same
    for key, value in (("train.seed", 1), ("method.temperature", 0.2), ("evaluate.num_bootstrap", 100)):
        assert digest_after(key, value) != same
    train = config_digest(DEFAULT, ["train", "model"])
    assert train == config_digest(with_values(DEFAULT, {"evaluate.seed": 1}), ["train", "model"])
    for wrong in ("runtime", "tracking", "nonesuch"):
        with pytest.raises(ValueError, match=wrong):
            config_digest(DEFAULT, ["train", wrong])


def test_config_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        DEFAULT.train.epochs = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(DEFAULT, Config)


PRINTABLE = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\x85\u2028\u2029\ufeff\ufffe\uffff")


@given(
    st.one_of(
        st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.booleans(), st.none(), st.text(PRINTABLE)
    )
)
def test_values_are_written_so_that_they_are_read_back(value: object) -> None:
    read = parse_yaml(f"a: {yaml_text(value)}  # comment", "text")["a"]
    assert read == value
    assert type(read) is type(value)


def test_a_placebo_needs_another_image_in_the_batch() -> None:
    values = default_values()
    values["method"]["target"]["placebo"] = "warped"
    values["train"]["batch_size"] = 1
    with pytest.raises(ConfigError, match=r"train\.batch_size: expected 2 or more when method\.target\.placebo"):
        validate(values)
