"""Evaluation: rules of truth, independence of batches, baselines, tables, cache; a tiny SAM with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats

from lesionsam import metrics
from lesionsam.boxes.annotator import simulate_boxes
from lesionsam.boxes.geometry import box_slices, jitter_boxes, to_model_frame
from lesionsam.data.dataset import open_dataset
from lesionsam.errors import UserError
from lesionsam.evaluation import statistics
from lesionsam.evaluation import tables as results
from lesionsam.evaluation.baselines import evaluate_baselines
from lesionsam.evaluation.cases import build_case, measure
from lesionsam.evaluation.columns import Evaluation, concat
from lesionsam.evaluation.evaluate import consistency, evaluate_model
from lesionsam.evaluation.picks import disputed, pick_cases
from lesionsam.evaluation.pictures import write_pictures
from lesionsam.evaluation.selection import quick_evaluate
from lesionsam.inference.predictor import Predictor
from lesionsam.models.checkpoint import build_sam, save_sam
from lesionsam.models.compact import CompactArchitecture
from lesionsam.models.sam import Sam
from lesionsam.models.transforms import resize_to_frame
from lesionsam.types import Frame, Sample
from lesionsam.utils.images import read_image, read_mask

SIDE = 32
PROMPTS = ("ring", "centre", "box", "zoom", "box+core", "tight")
HOW = {"num_bootstrap": 200, "confidence": 0.95}


def ellipse_mask(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width] + 0.5
    centre = np.array([height, width]) * rng.uniform(0.45, 0.55, 2)
    radii = np.array([height, width]) * rng.uniform(0.15, 0.3, 2)
    return ((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2 < 1


def write_samples(folder: Path, sizes: list[tuple[int, int]]) -> list[Sample]:
    """Dark ellipses on light skin with some noise, and their masks."""
    samples = []
    for k, (width, height) in enumerate(sizes):
        rng = np.random.default_rng(k)
        mask = ellipse_mask(width, height, rng)
        image = np.where(mask[..., None], [110, 70, 50], [220, 180, 160]) + rng.normal(0, 4, (height, width, 3))
        paths = folder / f"{k}.png", folder / f"{k}_mask.png"
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(paths[0])
        Image.fromarray(mask.astype(np.uint8) * 255).save(paths[1])
        boxes = simulate_boxes(mask, rng, margin=(0.1, 0.2), core=(0.45, 0.55), jitter=0.03, min_area=4)
        assert boxes is not None
        samples.append(Sample(f"00{k}", "0", "test", *paths, width, height, *boxes))
    return samples


def load_image(sample: Sample) -> np.ndarray:
    return read_image(sample.image_path)


def load_mask(sample: Sample) -> np.ndarray | None:
    return read_mask(sample.mask_path, (sample.width, sample.height)) if sample.mask_path else None


def true_mask(sample: Sample) -> np.ndarray:
    mask = load_mask(sample)
    assert mask is not None
    return mask


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return write_samples(
        tmp_path_factory.mktemp("images"), [(60, 40), (44, 70), (50, 50), (64, 48), (80, 60), (40, 40)]
    )


@pytest.fixture(scope="module")
def sam() -> Sam:
    torch.manual_seed(0)
    return build_sam(
        "compact",
        architecture=CompactArchitecture(
            image_size=SIDE, patch_size=8, width=16, depth=1, num_heads=2, prompt_width=16, decoder_mlp=16
        ),
    )


def evaluated(sam: Sam, samples: list[Sample], **changes: object) -> Evaluation:
    settings = {"prompts": PROMPTS, "seed": 0, "batch_size": 4, "num_points": 10, "jitter": (0.0, 0.2)} | changes
    return evaluate_model(sam, samples, load_image, load_mask, **settings)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def evaluation(sam: Sam, samples: list[Sample]) -> Evaluation:
    return evaluated(sam, samples)


def test_one_row_per_lesion_and_prompt_and_one_jitter_row_per_share(evaluation, samples):
    assert len(evaluation.rows) == len(samples) * len(PROMPTS)
    assert len(evaluation.jitter) == len(samples) * 2 * 2
    assert evaluation.rows.drop(columns="lesion_id").notna().all(axis=None)
    at_rest = evaluation.jitter[(evaluation.jitter["share"] == 0) & (evaluation.jitter["prompt"] == "box")]
    own = evaluation.rows[evaluation.rows["prompt"] == "box"]
    np.testing.assert_allclose(at_rest["iou"], own["iou"])


def test_batch_size_and_order_of_samples_change_nothing(sam, samples, evaluation):
    other = evaluated(sam, samples[::-1], batch_size=1)
    key = ["image_id", "prompt"]
    first, second = (e.rows.sort_values(key).reset_index(drop=True) for e in (evaluation, other))
    for name in ("iou", "dice", "predicted_iou", "entropy", "core_coverage", "leakage"):
        np.testing.assert_allclose(first[name], second[name], atol=2e-3, err_msg=name)


def test_another_seed_draws_other_points_and_the_same_boxes(sam, samples, evaluation):
    other = evaluated(sam, samples, seed=1, jitter=()).rows
    for prompt, same in (("box", True), ("centre", True), ("ring", False), ("box+core", True)):
        first, second = (rows.loc[rows["prompt"] == prompt, "entropy"].to_numpy() for rows in (evaluation.rows, other))
        assert np.allclose(first, second, atol=1e-7) == same, prompt


def test_rows_equal_a_plain_recomputation(sam, samples):
    """segment_anything's own forward of one image with its big box, measured with the plain metrics."""
    sample = samples[0]
    row = evaluated(sam, [sample], prompts=("box",), jitter=()).rows.iloc[0]
    small = resize_to_frame(load_image(sample), Frame(SIDE))
    pixels = torch.from_numpy(small.copy()).permute(2, 0, 1)
    box = torch.from_numpy(to_model_frame(sample.big_box, sample.width, sample.height, Frame(SIDE)))[None].float()
    with torch.no_grad():
        low_res = sam(
            [{"image": pixels, "original_size": (sample.height, sample.width), "boxes": box}], multimask_output=False
        )[0]
    prediction = low_res["masks"][0, 0].numpy()
    truth = true_mask(sample)
    assert row["iou"] == pytest.approx(metrics.iou(prediction, truth), abs=2e-3)
    assert row["hd95"] == pytest.approx(metrics.hd95(prediction, truth), abs=1.0)
    assert row["predicted_iou"] == pytest.approx(low_res["iou_predictions"].item(), abs=1e-4)


def test_the_zoom_is_that_of_predict_and_changes_no_other_prompt(sam, samples, evaluation, tmp_path):
    save_sam(sam, tmp_path / "weights.safetensors", name="compact")
    predictor = Predictor(tmp_path / "weights.safetensors")
    rows = evaluation.rows[evaluation.rows["prompt"] == "zoom"].set_index(["image_id", "lesion_id"])
    for sample in samples:
        (one,) = predictor.predict(load_image(sample), boxes=sample.big_box, zoom=True)
        assert rows.loc[(sample.image_id, sample.lesion_id), "iou"] == pytest.approx(
            metrics.iou(one.mask, true_mask(sample)), abs=2e-3
        )
    without = evaluated(sam, samples, prompts=[each for each in PROMPTS if each != "zoom"])
    others = evaluation.rows[evaluation.rows["prompt"] != "zoom"].reset_index(drop=True)
    pd.testing.assert_frame_equal(without.rows, others)


def test_perfect_empty_and_full_masks_have_the_figures_of_the_definition(samples):
    case = build_case(samples[0], load_mask(samples[0]), [])
    truth = true_mask(samples[0]).astype(np.float32)
    perfect = measure(truth * 2 - 1, case, 0.01)
    assert (perfect["iou"], perfect["boundary_f1"], perfect["hd95"]) == (1.0, 1.0, 0.0)
    assert perfect["core_coverage"] == 1.0  # the small box lies inside the lesion
    assert perfect["leakage"] == 0.0  # the lesion lies inside the big box
    empty = measure(np.full(truth.shape, -1.0, np.float32), case, 0.01)
    assert (empty["iou"], empty["core_coverage"], empty["leakage"]) == (0.0, 0.0, 0.0)
    assert empty["hd95"] == pytest.approx(np.hypot(*truth.shape))
    full = measure(np.ones(truth.shape, np.float32), case, 0.01)
    box = np.zeros(truth.shape, bool)
    box[case.big] = True
    assert full["leakage"] == pytest.approx(1 - box.mean())


def test_of_several_lesions_each_is_held_against_the_mask_in_its_own_big_box(samples):
    mask = np.zeros((40, 60), bool)
    mask[5:15, 5:15] = mask[20:35, 30:50] = mask[18, 2] = True
    first = replace(samples[0], lesion_id="a", big_box=np.array([3.0, 3, 17, 17]), small_box=np.array([8.0, 8, 12, 12]))
    second = replace(
        samples[0], lesion_id="b", big_box=np.array([28.0, 18, 52, 37]), small_box=np.array([35.0, 24, 42, 30])
    )
    case = build_case(first, mask, [second])
    assert case.truth is not None
    assert case.valid is not None
    assert case.truth.sum() == 100
    assert not case.valid[25, 40]
    assert case.valid[10, 10]
    logits = np.where(mask, 1.0, -1.0).astype(np.float32)
    logits[18, 2] = -1
    assert measure(logits, case, 0.01)["iou"] == 1.0  # the other lesion, predicted too, counts for nothing
    assert build_case(first, mask, []).truth.sum() == mask.sum()  # type: ignore[union-attr]


def test_box_slices_hold_the_pixels_whose_centres_are_inside_and_never_none():
    assert box_slices(np.array([1.5, 2.4, 3.5, 5.6]), (10, 10)) == (slice(2, 6), slice(1, 3))
    assert box_slices(np.array([4.1, 4.1, 4.2, 4.2]), (10, 10)) == (slice(4, 5), slice(4, 5))


def jittered(sample: Sample, share: float) -> tuple[np.ndarray, np.ndarray]:
    size = sample.height, sample.width
    return jitter_boxes(sample.big_box, sample.small_box, size, share=share, key=sample.image_id)


def test_jittered_boxes_stay_in_the_frame_with_the_core_inside_and_zero_is_no_jitter(samples):
    for sample in samples:
        big, small = jittered(sample, 0.0)
        np.testing.assert_allclose([big, small], [sample.big_box, sample.small_box])
        for share in (0.1, 0.3, 0.9):
            big, small = jittered(sample, share)
            assert (big[:2] >= 0).all()
            assert (big[2:] <= [sample.width, sample.height]).all()
            assert (small[:2] >= big[:2] - 1e-9).all()
            assert (small[2:] <= big[2:] + 1e-9).all()
            assert (big[2:] - big[:2] > 0).all()
            assert (small[2:] - small[:2] > 0).all()
        moved = np.abs(jittered(sample, 0.1)[0][:2] - sample.big_box[:2]) / (sample.big_box[2:] - sample.big_box[:2])
        assert (moved <= 0.1 + 0.05 + 1e-9).all()  # centre by 10 %, half the side by 5 %


def test_without_masks_the_label_free_figures_remain(sam, samples, tmp_path):
    bare = [replace(sample, mask_path=None) for sample in samples]
    prompts = ("ring", "box")
    model = evaluate_model(
        sam, bare, load_image, None, prompts=prompts, seed=0, batch_size=4, num_points=10, jitter=(0.1,)
    )
    baselines, _ = evaluate_baselines(bare, load_image, None, looseness=0.15)
    both = results.arranged(concat([model.labelled("zero-shot", "0"), baselines, model.labelled("adapted", "0")]))
    assert both.rows["iou"].isna().all()
    table, numbers = results.write_results(tmp_path, both, **HOW, settings={})
    assert "miou" not in table
    assert numbers["adapted.ring.core_coverage"] == pytest.approx(
        model.rows.query("prompt == 'ring'")["core_coverage"].mean(), abs=1e-6
    )
    assert "adapted.box.consistency" in numbers
    assert "No masks" in (tmp_path / "table.md").read_text()
    assert len(results.read_csv(tmp_path / "jitter.csv")) == 0


def test_baselines_find_an_ellipse_of_another_colour(samples):
    baselines, outline = evaluate_baselines(samples, load_image, load_mask, looseness=0.15)
    means = baselines.rows.groupby("model")["iou"].mean()
    assert means["ellipse"] > 0.85
    assert means["box prior"] > means["ellipse"]
    assert means["box prior + offset"] > 0.85, "these outlines are smooth, the offset is made for ragged ones"
    assert -0.8 <= outline.offset <= 1.0
    assert outline.tightness == 1
    _, found = evaluate_baselines(samples, load_image, load_mask, looseness=None)
    assert found.tightness != 1, "by colour"
    assert set(baselines.rows.loc[baselines.rows["model"] == "ellipse", "prompt"]) == {"box", "box+core"}


def test_quick_figures_equal_the_full_ones_where_model_and_original_frame_are_one(sam, tmp_path):
    same = write_samples(tmp_path, [(SIDE, SIDE)] * 3)
    dataset = open_dataset(same, Frame(SIDE), tmp_path / "cache", with_masks=True)
    prompts = ("ring", "centre", "box")
    quick = quick_evaluate(sam, dataset, prompts=prompts, seed=0, batch_size=2, device="cpu")
    full = evaluated(sam, same, prompts=prompts, jitter=()).rows
    for prompt in prompts:
        assert quick[prompt] == pytest.approx(full.loc[full["prompt"] == prompt, "iou"].mean(), abs=5e-3)
    assert quick["objective"] == pytest.approx(np.mean([quick[prompt] for prompt in prompts]))
    assert quick["core_coverage"] == pytest.approx(full["core_coverage"].mean(), abs=5e-3)
    assert quick["leakage"] == pytest.approx(full["leakage"].mean(), abs=5e-3)
    assert 0 <= quick["label_free"] <= 1
    bare = open_dataset([replace(s, mask_path=None) for s in same], Frame(SIDE), tmp_path / "cache", with_masks=True)
    assert "objective" not in quick_evaluate(sam, bare, prompts=prompts, seed=0, batch_size=2, device="cpu")


def test_an_image_of_another_size_than_the_csv_says_is_refused(sam, samples):
    wrong = replace(samples[0], width=61)
    with pytest.raises(UserError, match="expected 61x40 px"):
        evaluate_model(sam, [wrong], load_image, None, prompts=("box",), seed=0, batch_size=1, num_points=10)


def test_consistency_is_the_mean_over_pairs():
    a, b, c = np.array([[1, 1, 0, 0]], bool), np.array([[1, 0, 0, 0]], bool), np.array([[0, 0, 0, 1]], bool)
    assert consistency([a, b, c]) == pytest.approx((0.5 + 0 + 0) / 3)
    assert np.isnan(consistency([a]))


# ---- statistics and tables


def long_rows(ious: dict[tuple[str, str], list[float]]) -> pd.DataFrame:
    """Rows of prompt `box` from (model, run) -> IoU per image."""
    rows = [
        {
            "model": model,
            "run": run,
            "prompt": "box",
            "image_id": f"{k:03d}",
            "lesion_id": "0",
            "iou": value,
            "dice": value,
            "boundary_f1": value,
            "hd95": 1.0,
            "thresholded_jaccard": value,
            "lesion_share": k / 10,
            "entropy": 0.1,
        }
        for (model, run), values in ious.items()
        for k, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_interval_of_many_values_is_near_the_normal_one_and_collapses_for_equal_ones():
    values = np.random.default_rng(0).normal(0.8, 0.1, 400)
    low, high = statistics.interval(values, num_bootstrap=4000, confidence=0.95)
    half = 1.96 * values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert statistics.interval(np.full(5, 0.7), **HOW) == pytest.approx((0.7, 0.7))
    assert np.isnan(statistics.interval(np.array([]), **HOW)).all()


def test_seeds_are_averaged_per_image_before_images_are_resampled():
    """Two runs that err in opposite directions on every image: their mean is constant, so the interval has no width."""
    rows = long_rows({("adapted", "0"): [0.6, 0.8, 0.6, 0.8], ("adapted", "1"): [0.9, 0.7, 0.9, 0.7]})
    row = statistics.table(rows, reference=None, **HOW).iloc[0]
    assert (row["miou"], row["low"], row["high"]) == pytest.approx((0.75, 0.75, 0.75))
    assert row["runs_sd"] == pytest.approx(np.std([0.7, 0.8], ddof=1))
    assert row["num_images"] == 4
    assert row["failure_rate"] == pytest.approx(0.25)


def test_paired_difference_and_p_are_those_of_scipy_on_the_common_images():
    rng = np.random.default_rng(1)
    before = rng.uniform(0.4, 0.8, 40)
    after = before + rng.normal(0.05, 0.05, 40)
    rows = long_rows({("zero-shot", "0"): before.tolist(), ("adapted", "0"): after.tolist()})
    row = statistics.table(rows, reference="zero-shot", **HOW).iloc[1]
    assert row["difference"] == pytest.approx((after - before).mean())
    assert row["p"] == pytest.approx(stats.wilcoxon(after - before).pvalue)
    assert row["difference_low"] < row["difference"] < row["difference_high"]
    assert statistics.wilcoxon(np.zeros(5)) == 1.0


def test_strata_are_tertiles_of_the_lesions_share():
    rows = long_rows({("adapted", "0"): [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]})
    strata = statistics.strata(rows, **HOW).set_index("stratum")
    assert strata["miou"].to_dict() == pytest.approx({"small": 0.15, "medium": 0.35, "large": 0.55})
    assert strata["num_images"].tolist() == [2, 2, 2]


def test_files_of_an_evaluation_agree_with_each_other(sam, samples, evaluation, tmp_path):
    adapted = evaluated(sam, samples, seed=3)
    baselines, _ = evaluate_baselines(samples, load_image, load_mask, looseness=0.15)
    everything = results.arranged(
        concat([evaluation.labelled("zero-shot", "0"), baselines, adapted.labelled("adapted", "0")])
    )
    table, numbers = results.write_results(tmp_path, everything, **HOW, settings={"seed": 0})
    written = results.read_csv(tmp_path / "per_image.csv")
    assert set(written["image_id"]) == {s.image_id for s in samples}  # `000` stays text
    ring = written[(written["model"] == "adapted") & (written["prompt"] == "ring")]
    assert numbers["adapted.ring.miou"] == pytest.approx(ring["iou"].mean(), abs=1e-5)
    objective = np.mean([numbers[f"adapted.{name}.miou"] for name in ("ring", "centre", "box")])
    assert numbers["adapted.objective"] == pytest.approx(objective, abs=1e-5)
    text = (tmp_path / "table.md").read_text()
    assert f"{numbers['adapted.ring.miou']:.3f} [" in text
    assert "leaks the label" in text
    assert table["model"].drop_duplicates().tolist() == [
        "ellipse",
        "box prior",
        "box prior + offset",
        "zero-shot",
        "adapted",
    ]
    calibration = results.read_csv(tmp_path / "calibration.csv")
    pixels = calibration.query("model == 'adapted' and prompt == 'box' and region == 'image'")["count"].sum()
    assert pixels == sum(s.width * s.height for s in samples)
    results.print_tables(table)


def test_pictures_show_best_median_and_worst_each_once(sam, samples, evaluation, tmp_path):
    rows = evaluation.rows[evaluation.rows["prompt"] == "box"]
    picks = pick_cases(rows, 2)
    ranked = rows.sort_values(["iou", "image_id"], ascending=[False, True])["image_id"].tolist()
    assert [pick.image_id for pick in picks] == [*ranked[:4], ranked[5], ranked[4]]
    written = write_pictures(
        tmp_path,
        sam,
        samples,
        evaluation.rows,
        load_image,
        load_mask,
        prompt="box",
        model="model",
        count=1,
        seed=0,
        batch_size=4,
        num_points=10,
        device="cpu",
    )
    doubtful = disputed(evaluation.rows, 1)
    groups = ["best", "median", "worst", *["disputed"] * len(doubtful), "sheet.png"]
    assert [path.name.split("_")[0] for path in written] == groups
    assert all(min(read_image(path).shape[:2]) > 30 for path in written)


def test_disputed_are_lesions_on_which_all_answers_agree_and_none_the_mask():
    columns = ["prompt", "image_id", "lesion_id", "consistency", "iou"]
    rows = pd.DataFrame(
        [
            ("box", "wide", "0", 0.95, 0.40),
            ("ring", "wide", "0", 0.95, 0.50),
            ("tight", "wide", "0", 0.95, 0.90),
            ("box", "near", "0", 0.90, 0.85),
            ("ring", "near", "0", 0.90, 0.30),  # one prompt reaches the mask
            ("box", "narrow", "1", 0.90, 0.70),
            ("ring", "narrow", "1", 0.90, 0.60),
            ("box", "unsure", "0", 0.60, 0.10),
            ("ring", "unsure", "0", 0.60, 0.20),
            ("box", "no mask", "0", 0.95, np.nan),
        ],
        columns=columns,
    )
    found = disputed(rows, 5)
    assert found["image_id"].tolist() == ["wide", "narrow"]
    assert found[["consistency", "iou"]].to_numpy().tolist() == [[0.95, 0.50], [0.90, 0.70]]
    assert len(disputed(rows, 1)) == 1
    assert disputed(rows.assign(iou=np.nan), 5).empty
