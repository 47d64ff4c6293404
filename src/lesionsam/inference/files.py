"""`lesionsam predict` on image files: the options, and all images in one process or a shard of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lesionsam.errors import UserError
from lesionsam.inference.arguments import Source, check_options, find_images
from lesionsam.inference.auto import AUTO_DEFAULTS, AutoMaskOptions
from lesionsam.inference.decode import DecodeOptions
from lesionsam.inference.jobs import plan
from lesionsam.inference.outputs import PredictionFolder, make_folder
from lesionsam.inference.run import PredictOptions, PredictRun, print_marked, print_problems
from lesionsam.inference.shards import Shard, predict_shard, refuse_shards
from lesionsam.inference.sheet import write_sheet
from lesionsam.models.checkpoint import load_sam, weights_metadata
from lesionsam.models.sam import Sam
from lesionsam.prompts import ZOOM
from lesionsam.utils.locks import folder_lock
from lesionsam.utils.progress import working
from lesionsam.utils.weights import weights_sha256


def predict_files(
    images: Sequence[str | Path],
    *,
    model: Path,
    out: Path,
    boxes: Path | None = None,
    points: Path | None = None,
    auto: bool = False,
    everything: bool = False,
    prompt: str = "box",
    ensemble: int = 1,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
    overlays: bool = True,
    shapes: bool = True,
    dicom_seg: bool = False,
    threshold: float = 0.5,
    options: AutoMaskOptions = AUTO_DEFAULTS,
    zoom: bool = False,
    mm_per_pixel: float | None = None,
    shard: Shard | None = None,
) -> int:
    """Segment the lesions of image files from boxes, points or without a prompt.

    Writes, each file completely or not at all: masks/<image_id>.png (<image_id>_<lesion_id>.png if an image has several
    rows, <image_id>/<number>.png for `everything`) of 0 and 255 at the image's original size, overlays/ and polygons/
    (GeoJSON) of the same names, predictions.csv, and coco.json of all rows of that table. Masks
    of an earlier call with the same model, prompts, threshold and image are kept; its other masks of these images are
    removed, those of other images stay in the table.

    Args:
        images: files, folders, patterns. model: SAM's weights or this project's; the file says which model it holds.
        boxes: CSV with image_id, [lesion_id], big_x0 to big_y1 and, where the prompt needs the core, small_x0 to
            small_y1; points: CSV with image_id, [lesion_id], x, y, [label]; original pixels. auto: the one lesion of
            each image. everything: all automatic masks. Exactly one of these four.
        prompt: made from the boxes, of `prompts.KINDS`. ensemble: decodings of each box, all but one jittered.
        batch_size: images per encoder pass and lesions per decoder pass. overlays: pictures. shapes: polygons and COCO.
        dicom_seg: DICOM segmentations, of DICOM images alone.
        threshold: probability above which a pixel is lesion. options: of the automatic masks. zoom: enlarge the
            surroundings of each box to the model's whole input; prompt `box` only. mm_per_pixel: of all images, for
            areas in mm2. shard: predict a part of the images, see `inference.shards`.
    Returns:
        exit code: 0, or 1 if an image or a row gave no mask; each is named on stderr.
    Raises:
        UserError: nothing can be predicted at all.
    """
    source = Source.of(boxes=boxes, points=points, auto=auto, everything=everything, prompt=prompt)
    check_options(
        source, threshold=threshold, ensemble=ensemble, zoom=zoom, batch_size=batch_size, mm_per_pixel=mm_per_pixel
    )
    paths, problems = find_images(images)
    if not paths:
        raise UserError(problems[0] if problems else "no images given; name files, folders or patterns")
    with working("loading the model"):
        sam = load_sam(None, model)
    decoding = DecodeOptions.of_metadata(weights_metadata(model), options)
    decoding = replace(decoding, kind=ZOOM if zoom else source.decoded_as, num_members=ensemble)
    how = PredictOptions(
        weights_sha256(model),
        source,
        threshold,
        decoding,
        batch_size,
        device,
        overlays=overlays,
        shapes=shapes,
        dicom_seg=dicom_seg,
        mm_per_pixel=mm_per_pixel,
    )
    if shard is None:
        return _predict_all(paths, problems, sam, out, how)
    return predict_shard(paths, problems, sam, out, how, shard)


def _predict_all(paths: Sequence[Path], problems: list[str], sam: Sam, out: Path, how: PredictOptions) -> int:
    """Segment all images in this process, see `predict_files`; problems: one line for each argument without images."""
    jobs, unmatched, unused = plan(paths, how.source)
    problems = problems + unmatched
    print_problems(problems, unused, how.source)
    print_marked(paths, how.source)
    make_folder(out)
    with folder_lock(out, "wait for it, or choose another --out"):  # the last to end would drop the other's rows
        refuse_shards(out)
        folder = PredictionFolder(out, overlays=how.overlays, shapes=how.shapes, segmentations=how.dicom_seg)
        run = PredictRun(sam, how, folder)
        try:
            run.work(jobs)
        finally:
            run.save()
        folder.save_coco({job.image_id: job.path.name for job in jobs})
        if how.overlays:
            write_sheet(out, lambda: iter(folder.rows.values()))
    run.counts.faults += len(problems)
    print(run.counts.summary(out))
    return 1 if run.counts.faults else 0
