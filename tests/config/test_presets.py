"""Presets and upgrades: valid, comments kept, the difference is the change alone."""

from __future__ import annotations

import re
import subprocess
from itertools import product
from pathlib import Path

import pytest

from lesionsam.config.edit import difference, edit_text, fit, merge
from lesionsam.config.load import (
    Config,
    ConfigError,
    config_digest,
    default_text,
    default_values,
    flatten,
    known_keys,
    parse_yaml,
    to_values,
    validate,
)
from lesionsam.config.presets import READ_BY, about, apply_preset, preset_names, preset_values
from lesionsam.config.rules import UNREAD
from lesionsam.config.schema import CsvBoxes, FolderData, IsicData, SimulatedBoxes
from lesionsam.config.schema_method import BlocksEncoder, ContrastiveMethod, SupervisedMethod, TeacherTarget
from lesionsam.config.upgrade import upgrade
from lesionsam.errors import UserError

NAMES = preset_names()


def applied(*names: str) -> tuple[str, Config]:
    """Text and configuration after presets in turn, beginning with the default."""
    text, config = default_text(), validate(default_values())
    for name in names:
        text, config = apply_preset(name, text)
    return text, config


def test_params_yaml_is_the_demo_preset(root: Path) -> None:
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "params.yaml"], cwd=root, check=False).returncode
    if changed == 1:
        pytest.skip("params.yaml has changes of your own")
    assert (root / "params.yaml").read_text("utf-8") == default_text(), (
        "params.yaml and src/lesionsam/config/presets/demo.yaml differ; copy the one that is right over the other"
    )


def test_comments_of_the_default_are_the_schemas() -> None:
    known, path = known_keys(default_values()), []
    for line in default_text().splitlines():
        if match := re.match(r"( *)([\w+]+):[^#]*(?:# (.*))?$", line):
            path[len(match[1]) // 2 :] = [match[2]]
            assert (match[3] or "") == known[".".join(path)].description, ".".join(path)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        *(("demo", name) for name in NAMES),
        *product(["folder-csv"], NAMES),
        ("supervised", "published"),
        ("isic2016-vit-b", "folder"),
    ],
)
def test_every_preset_validates_after_every_other(first: str, second: str) -> None:
    text, config = applied(first, second)
    assert validate(parse_yaml(text, "params.yaml")) == config
    assert apply_preset(second, text)[0] == text, "a second time changes nothing"


@pytest.mark.parametrize("name", NAMES)
def test_demo_brings_every_comment_and_number_back(name: str) -> None:
    assert applied(name, "demo")[0] == default_text()


IMPOSSIBLE = {("edgetam", "supervised-adapter"), ("edgetam", "supervised-lora")}  # its backbone has no attention


@pytest.mark.parametrize("first", NAMES)
def test_declared_inputs_are_read_or_there_after_every_pair(first: str, root: Path) -> None:
    """DVC needs every `${inputs...}` of dvc.yaml to exist: one that is not read is the repository's own folder."""
    declared = set(re.findall(r"- \$\{inputs\.(\w+)\}", (root / "dvc.yaml").read_text("utf-8")))
    assert declared <= set(READ_BY) == set(default_values()["inputs"])
    assert (root / UNREAD).is_dir()
    for second in NAMES:
        values = preset_values(second, preset_values(first, default_values()))
        if (first, second) in IMPOSSIBLE:
            with pytest.raises(ConfigError, match=r"model\.encoder: expected none or blocks: edgetam has no attention"):
                validate(values, f"{first}, {second}")
            continue
        validate(values, f"{first}, {second}")
        for name, (key, words) in READ_BY.items():
            is_read = flatten(values)[key] in words
            assert is_read or values["inputs"][name] == UNREAD, f"{first}, {second}: inputs.{name}"


def test_masks_are_scored_again_after_a_preset_without_masks() -> None:
    assert applied("folder-csv")[1].train.select == "label_free"
    for name in ("folder", "coco"):
        assert applied("folder-csv", name)[1].train.select == "objective"


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_says_what_it_is(name: str) -> None:
    assert 20 < len(about(name)) < 140
    assert "\n" not in about(name)


def test_every_value_to_start_from_is_valid() -> None:
    for changes in ({"data": {"source": source}} for source in ("folder", "coco", "isic2017", "isic2018")):
        validate(fit(merge(default_values(), changes)))
    for kind in ("prior", "fused", "teacher", "ellipse"):
        values = fit(merge(default_values(), {"method": {"target": {"kind": kind}}}))
        assert validate(values).method.target.kind == kind  # pyright: ignore[reportAttributeAccessIssue]


def test_tiny_is_tiny() -> None:
    _, config = applied("tiny")
    images = [value for key, value in flatten(config).items() if key.startswith("data.num_")]
    assert sum(images) <= 24
    assert config.train.epochs <= 2


@pytest.mark.parametrize(
    ("name", "source"), [("isic2018-vit-b", "isic2018"), ("isic2017-vit-b", "isic2017"), ("isic2016-vit-b", "isic2016")]
)
def test_real_data_presets(name: str, source: str) -> None:
    _, config = applied(name)
    assert isinstance(config.data, IsicData)
    assert (config.data.source, config.data.base_url, config.data.subset) == (source, "", 0)
    assert (config.data.dev_fraction > 0) == (source == "isic2016"), "2016 has no validation split of its own"
    assert (config.model.name, config.model.checkpoint, config.model.image_size) == ("vit_b", "published", 0)
    assert config.train.lr_encoder <= 1e-5


def test_published_is_the_published_recipe() -> None:
    _, config = applied("isic2018-vit-b", "published")
    method, train, model = config.method, config.train, config.model
    assert isinstance(method, ContrastiveMethod)
    assert isinstance(model, BlocksEncoder)
    assert method.weights.model_dump() == {"contrast": 1.0, "distil": 0.1, "pseudo": 0.0, "projection": 0.0}
    assert (method.temperature, method.pos_samples, method.neg_samples, method.ema_decay) == (0.1, 256, 1024, 0.999)
    assert (method.num_points, method.teacher_prompt) == (10, "ring")
    assert (method.gate.region, method.gate.entropy_thresh, method.gate.trust_empty) == ("image", 0.2, True)
    assert (method.negatives.missed_core, method.negatives.random_fallback) == ("negative", True)
    assert not method.negatives.certain_background
    assert (method.head.norm, method.head.ema) == ("batch", False)
    assert isinstance(method.target, TeacherTarget)
    assert method.target.placebo == "none"
    assert method.prompts.shares() == {"ring": 1.0, "centre": 0.0, "box": 0.0, "box+core": 0.0, "none": 0.0}
    assert (train.lr_encoder, train.epochs, train.batch_size, train.clip) == (2e-6, 30, 4, 1.0)
    assert (model.unfreeze_last_k, model.train_decoder) == (0, False)
    assert config.data.source == "isic2018", "data and model stay as they were"
    assert model.name == "vit_b"


def test_published_tuned_differs_in_the_learning_rate_alone() -> None:
    plain, tuned = flatten(applied("published")[1]), flatten(applied("published-tuned")[1])
    changed = {key for key in plain if plain[key] != tuned[key]}
    assert changed == {"train.lr_encoder", "train.lr_decoder", "train.lr_head"}
    assert tuned["train.lr_encoder"] == 3e-4


def test_supervised_shares_budget_and_prompts_with_the_default() -> None:
    _, config = applied("supervised")
    default = validate(default_values())
    assert isinstance(config.method, SupervisedMethod)
    assert config.method.prompts.shares() == default.method.prompts.shares()
    assert config.method.prompts_per_image == default.method.prompts_per_image
    assert config_digest(config, ["data", "boxes", "model", "train"]) == config_digest(
        default, ["data", "boxes", "model", "train"]
    )


def test_own_images() -> None:
    _, config = applied("folder")
    assert isinstance(config.data, FolderData)
    assert isinstance(config.boxes, SimulatedBoxes)
    _, config = applied("folder-csv")
    assert isinstance(config.boxes, CsvBoxes)
    assert (config.inputs.boxes, config.train.select) == ("own/boxes.csv", "label_free")


def test_what_is_yours_stays() -> None:
    text = default_text()
    for old, new in (
        ("device: auto ", "device: cuda:1 "),
        ("experiment: lesionsam", "experiment: mine"),
        ("train:\n", "# my own remark\ntrain:\n"),
        (f"\n  epochs: {default_values()['train']['epochs']}\n", "\n  epochs: 7  # as agreed on Monday\n"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    new, config = apply_preset("isic2018-vit-b", text)
    assert (config.runtime.device, config.tracking.experiment, config.train.epochs) == ("cuda:1", "mine", 10)
    assert "# my own remark\ntrain:\n  seed: 0\n  epochs: 10 # as agreed on Monday\n" in new


def test_only_values_differ() -> None:
    new, _ = apply_preset("published-tuned", default_text())
    before, after = default_text().splitlines(), new.splitlines()
    comments = [line.partition("#")[2] for line in before if "#" in line]
    gone = {"offset", "looseness", "softness", "teacher_weight", "teacher_ramp"}  # not read by the teacher's target
    assert [line.partition("#")[2] for line in after if "#" in line] == [
        comment
        for line, comment in zip([line for line in before if "#" in line], comments, strict=True)
        if line.split(":")[0].strip() not in gone
    ]
    lines = difference(default_text(), new, "params.yaml")
    assert lines[:2] == ["--- params.yaml (now)", "+++ params.yaml (new)"]
    assert any(line.startswith("+  lr_encoder: 0.0003 ") for line in lines)


def test_columns_of_comments_stay() -> None:
    new, _ = apply_preset("isic2018-vit-b", default_text())
    assert {line.index(" #") for line in new.splitlines() if re.match(r" +\w{1,26}: [^#]{1,18} +#", line)} == {30}


def test_the_default_text_takes_all_values() -> None:
    text, config = applied("isic2016-vit-b", "published")
    assert edit_text(default_text(), default_values()) == default_text()
    assert validate(parse_yaml(edit_text(default_text(), to_values(config)), "params.yaml")) == config
    assert set(edit_text(default_text(), to_values(config)).splitlines()) == set(text.splitlines())


def test_unknown_preset_and_broken_file() -> None:
    with pytest.raises(UserError, match="preset nonesuch: expected one of demo, coco, edgetam, folder"):
        apply_preset("nonesuch", default_text())
    broken = default_text().replace("patience: 0", "patiense: 0")
    with pytest.raises(ConfigError, match=r"params.yaml with preset supervised: train.patiense: unknown key"):
        apply_preset("supervised", broken)
    assert apply_preset("demo", broken)[0] == default_text(), "a whole preset repairs what it replaces"


def test_upgrade_adds_what_an_older_file_lacks() -> None:
    removed = (
        "temperature",
        "gate",
        "region",
        "entropy_thresh",
        "trust_empty",
        "min_area",
        "system_metrics",
        "box+core",
    )
    lines = default_text().splitlines(keepends=True)
    older = "".join(line for line in lines if line.split(":")[0].strip() not in removed)
    older = older.replace("seed: 0                      # random seed of the prompts", "seed: 5  # mine")
    with pytest.raises(ConfigError) as caught:
        validate(parse_yaml(older, "params.yaml"))
    wanted = "method.temperature: missing, expected a number above 0 and of at most 10; add `temperature: 0.1`"
    assert wanted in str(caught.value)
    new, config = upgrade(older)
    assert config.evaluate.seed == 5
    assert new.replace("seed: 5  # mine", "seed: 0                      # random seed of the prompts") == default_text()
    assert upgrade(new)[0] == new


def test_upgrade_after_a_change_of_variant_by_hand() -> None:
    new, config = upgrade(default_text().replace("source: synthetic", "source: folder"))
    assert isinstance(config.data, FolderData)
    assert "num_train" not in new
    assert "  dev_fraction: 0.0            # share of the training images" in new


def test_upgrade_leaves_unknown_keys_to_their_owner() -> None:
    with pytest.raises(ConfigError, match=r"train.epohcs: unknown key; did you mean train.epochs\?"):
        upgrade(default_text().replace("  epochs:", "  epohcs:"))


@pytest.mark.parametrize(
    "text",
    [
        "version: 1\nprompts: {ring: 1.0, box: 2}  # flow\nlist:\n  - 1\n  - 2\nlast: x",
        "version: 1\nprompts:\n    ring: 1.0\n    box: 2\nlist: [1,\n  2]  # two lines\nlast: x\n",
        "# first\n\nversion: 1\nprompts:\nlist:\nlast:\n",
    ],
)
def test_edits_of_other_spellings(text: str) -> None:
    values = {"version": 2, "prompts": {"ring": 1.0, "centre": 0.5}, "list": [1, 2, 3], "last": "y", "new": {"a": True}}
    new = edit_text(text, values)
    assert parse_yaml(new, "text") == values
    assert ("# first" in new) == ("# first" in text)


@pytest.mark.parametrize(
    "space",
    [
        {},
        {"train.lr_encoder": {"low": 1e-5, "high": 1e-3, "log": True}, "method.gate.region": ["image", "big_box"]},
        {"method.temperature": [0.05, 0.1], "model.unfreeze_last_k": {"low": 0, "high": 2}},
        {"method.temperature": {"low": 0.05, "high": 1.0}, "method.weights.contrast": {"low": 0.0, "high": 0.1}},
    ],
)
def test_names_with_dots_of_a_search_space(space: dict[str, object]) -> None:
    values = default_values()
    values["sweep"]["space"] = space
    new = edit_text(default_text(), values)
    assert parse_yaml(new, "text") == values
    changed = [line[1:] for line in difference(default_text(), new, "params.yaml")[2:] if line[0] in "+-"]
    assert all(re.match(r"    [a-z_]+\.[a-z_.]+: [{[].+[]}]$|  space:", line) for line in changed), "one line a key"
    back = edit_text(new, default_values())
    assert parse_yaml(back, "text") == default_values()
    assert sorted(back.splitlines()) == sorted(default_text().splitlines()), "with every comment"


def test_a_whole_section_comes_back_where_it_stood() -> None:
    head, mark, rest = default_text().partition("\nsweep: ")
    older = head + rest[rest.index("\ntracking:") :]
    assert mark
    assert upgrade(older)[0] == default_text()


def test_anchors_are_kept_or_refused_rather_than_spoilt() -> None:
    text = "a: &x {c: 1}\nb: *x\n"
    assert parse_yaml(text, "text") == {"a": {"c": 1}, "b": {"c": 1}}
    assert parse_yaml(edit_text(text, {"a": {"c": 1}, "b": 2}), "text") == {"a": {"c": 1}, "b": 2}
    values = {"a": {"c": 1}, "b": {"c": 2, "d": 3}}
    assert parse_yaml(edit_text("a: &x {c: 1}\nb:\n  <<: *x\n", values), "text") == values
    with pytest.raises(UserError, match="text: expected plain values, got anchors"):
        edit_text(text, values, "text")


def test_lines_between_keys_stay_when_their_neighbours_go() -> None:
    text = default_text().replace("  offset: boxes ", "  # mine, of offset\n    offset: boxes ")
    text = text.replace("  placebo: none", "  placebo: none", 1).replace("\ntrain:\n", "\n# mine, of train\ntrain:\n")
    text += "\n# the end\n"
    new, _ = apply_preset("published", text)
    assert "# mine, of offset\n    placebo: none" in new
    assert "\n\n# mine, of train\ntrain:\n" in new
    assert new.endswith("\n\n# the end\n")
    back, _ = apply_preset("demo", new)
    assert sorted(back.splitlines()) == sorted(text.splitlines())


OLD_METHOD = """\
  alpha: 0.5                   # mine
  beta: 0.5                    # of the printed total
  gamma: 0.1                   # weight of the distillation to the pretrained features
  # why there is no delta
  delta: 0.0
  epsilon: 0.25
"""


def first_version(method: str, name: str = "contrastive") -> str:
    """Return a params.yaml of version 1: other names of the weights and of the prompt `zoom`."""
    text = default_text() if name == "contrastive" else applied(name)[0]
    text = text.replace("version: 2\n", "version: 1\n").replace("box, zoom, box+core", "box, nearer, box+core")
    return re.sub(r"  weights:.*\n(    .*\n)+", method, text, count=1)


def test_upgrade_from_version_1_renames_and_keeps_comments() -> None:
    old = first_version(OLD_METHOD).replace(
        "method.temperature: {", "method.alpha: {low: 0.1, high: 1.0} # why\n    method.beta: {"
    )
    new, config = upgrade(old)
    assert isinstance(config.method, ContrastiveMethod)
    assert config.method.weights.model_dump() == {"contrast": 0.5, "distil": 0.1, "pseudo": 0.0, "projection": 0.25}
    assert "zoom" in config.evaluate.prompts
    assert new.startswith(old[: old.index("version")])
    method = new[new.index("\nmethod:") :]
    assert re.search(r"  weights:\n    contrast: 0.5 +# mine\n    distil: 0.1 +# weight of the distillation", method)
    assert "    projection: 0.25\n  # why there is no delta\n  temperature: 0.1" in method
    assert "    method.weights.contrast: {low: 0.1, high: 1.0} # why\n" in new
    assert "beta: 0.5" not in new
    assert "method.beta" not in new
    assert upgrade(new)[0] == new
    same = {
        key: value for key, value in flatten(config).items() if not key.startswith(("method.weights", "sweep.space"))
    }
    assert same.items() <= flatten(default_values()).items()


@pytest.mark.parametrize("version", [1, 2])
def test_upgrade_drops_the_keys_of_removed_cache_tiers(version: int) -> None:
    old = default_text() if version == 2 else first_version(OLD_METHOD)
    new, config = upgrade(f"{old.rstrip()}\n  cache_memory_gb: 1.0 # mine\n  cache_gpu_gb: 0.0\n")
    assert new == upgrade(old)[0]
    assert config.runtime.cache_gb == 20


def test_upgrade_of_the_supervised_method_keeps_its_weight() -> None:
    new, config = upgrade(first_version("  beta: 0.7 # mine\n", "supervised"))
    assert isinstance(config.method, SupervisedMethod)
    assert config.method.weights.iou == 0.7
    assert re.search(r"  weights:\n    iou: 0.7 +# mine\n", new)


def test_an_older_file_names_the_command() -> None:
    old = first_version(OLD_METHOD)
    for call in (lambda: validate(parse_yaml(old, "params.yaml")), lambda: apply_preset("no-prompt", old)):
        with pytest.raises(
            ConfigError, match=r"version: expected .* got 1, an older format; run `lesionsam params upg"
        ) as e:
            call()
        assert len(e.value.issues) == 1
    assert apply_preset("demo", old)[1].version == 2


def test_upgrade_of_a_newer_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"version: expected an integer \(2\), got 3"):
        upgrade(default_text().replace("version: 2", "version: 3"))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("vit-b-")])
@pytest.mark.parametrize("edition", ["isic2016", "isic2018"])
def test_presets_for_memory_change_how_eight_images_are_computed_and_not_how_many(edition: str, name: str) -> None:
    _, before = applied(f"{edition}-vit-b")
    _, after = applied(f"{edition}-vit-b", name)
    t = after.train
    assert t.batch_size * t.accumulate == before.train.batch_size * before.train.accumulate == 8
    side = before.model.image_size
    assert after.model.model_copy(update={"image_size": side}) == before.model
