"""Export SAM as two ONNX graphs, an encoder and a decoder. Only this module imports onnx and onnxruntime.

The decoder has the inputs and outputs of segment_anything's own ONNX export (boxes are points with labels 2 and 3); in
addition it takes several prompts, and several images with one prompt each. The encoder takes pixels: normalisation and
padding are in the graph, so that a caller only resizes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from lesionsam.boxes.geometry import to_model_frame
from lesionsam.errors import UserError
from lesionsam.export.base import Format, Subject
from lesionsam.export.compare import Prompt, PromptOutput, Segment
from lesionsam.models.sam1 import Sam1
from lesionsam.models.transforms import resize_to_frame
from lesionsam.types import Frame

OPSET = 18
ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
INPUTS = ("image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input", "orig_im_size")
OUTPUTS = ("masks", "iou_predictions", "low_res_masks")
MAX_SIDE = 1 << 16  # of an original image, pixels
INLINE_BYTES = 1 << 30  # weights beyond this go into a file beside the graph: protobuf ends at 2 GiB


class EncoderGraph(nn.Module):
    """SAM's image encoder: (B, 3, h, w) float32 RGB of 0..255, longest side S -> image_embeddings (B, C, H', W')."""

    def __init__(self, sam: Sam1) -> None:
        super().__init__()
        self.encoder, self.side = sam.image_encoder, sam.side
        self.mean, self.std = (
            torch.nn.Parameter(value.detach().view(1, 3, 1, 1).clone(), requires_grad=False)
            for value in (sam.pixel_mean, sam.pixel_std)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise, pad and encode the images."""
        frames = (images - self.mean) / self.std
        return self.encoder(F.pad(frames, (0, self.side - frames.shape[-1], 0, self.side - frames.shape[-2])))


class DecoderGraph(nn.Module):
    """SAM's prompt encoder and mask decoder for B prompts, each of N points, without any branch.

    `forward` takes image_embeddings (E, C, H', W'), E = 1 or B; point_coords (B, N, 2) XY in the model frame;
    point_labels (B, N): 1 foreground, 0 background, 2 and 3 corners of a box, -1 padding; mask_input (M, 1, 4H', 4W'),
    M = 1 or B; has_mask_input (1,): 0 or 1; orig_im_size (2,) float32: H, W. It gives masks (B, 4, H, W) logits,
    iou_predictions (B, 4), low_res_masks (B, 4, 4H', 4W'); of the four, 0 is the single mask, 1 to 3 are the candidates
    of an ambiguous prompt.
    """

    def __init__(self, sam: Sam1) -> None:
        super().__init__()
        self.prompts, self.decoder, self.side = sam.prompt_encoder, sam.mask_decoder, sam.side

    def forward(
        self,
        image_embeddings: torch.Tensor,
        point_coords: torch.Tensor,
        point_labels: torch.Tensor,
        mask_input: torch.Tensor,
        has_mask_input: torch.Tensor,
        orig_im_size: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decode the prompts; shapes as in the class docstring."""
        p, d, count = self.prompts, self.decoder, point_coords.shape[0]
        kinds = point_labels.to(torch.int64)
        table = torch.cat([p.not_a_point_embed.weight, *[kind.weight for kind in p.point_embeddings]])  # by kind + 1
        places = p.pe_layer._pe_encoding((point_coords + 0.5) / self.side)
        sparse = torch.where((kinds < 0)[..., None], torch.zeros_like(places), places) + table[kinds + 1]
        masked = p.mask_downscaling(mask_input)
        dense = torch.where(has_mask_input.reshape(1, 1, 1, 1) > 0, masked, p.no_mask_embed.weight[:, :, None, None])
        tokens = torch.cat([d.iou_token.weight, d.mask_tokens.weight]).expand(count, -1, -1)
        source = _one_each(image_embeddings, point_coords) + _one_each(dense, point_coords)
        position = p.get_dense_pe().expand(count, -1, -1, -1)
        hidden, image = d.transformer(source, position, torch.cat([tokens, sparse], dim=1))
        upscaled = d.output_upscaling(image.transpose(1, 2).reshape(source.shape))
        weights = torch.stack([head(hidden[:, 1 + k]) for k, head in enumerate(d.output_hypernetworks_mlps)], dim=1)
        low_res = torch.einsum("bkc,bchw->bkhw", weights, upscaled)
        return self._enlarge(low_res, orig_im_size), d.iou_prediction_head(hidden[:, 0]), low_res

    def _enlarge(self, low_res: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        """Upscale as Sam.postprocess_masks, with sizes that are graph inputs."""
        masks = F.interpolate(low_res, (self.side, self.side), mode="bilinear", align_corners=False)
        scale = self.side / original.max().to(torch.float32)
        inside = torch.floor(original.to(torch.float32) * scale + 0.5).to(torch.int64)
        original = original.to(torch.int64)
        masks = masks[:, :, : _size(inside[0], self.side), : _size(inside[1], self.side)]
        return F.interpolate(
            masks, (_size(original[0], MAX_SIDE), _size(original[1], MAX_SIDE)), mode="bilinear", align_corners=False
        )


def _one_each(tensor: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """Expand (1 or B, ...) to (B, ...), B the number of prompts, without a branch in the graph.

    Any other number makes the index run out of bounds, an error of onnxruntime: clamped, the last image would be used
    for the prompts left over.
    """
    index = torch.arange(prompts.shape[0])
    last = torch.arange(tensor.shape[0])[-1]
    several = (last > 0).to(torch.int64)
    wrong = several * (last != index[-1]).to(torch.int64)
    return tensor[several * index + wrong * (last + 1)]


def _size(value: torch.Tensor, limit: int) -> int:
    """Return a size that is data, with bounds for the exporter."""
    number = value.item()  # no `int`, which would make it the example's
    torch._check(number >= 1)
    torch._check(number <= limit)
    return number  # pyright: ignore[reportReturnType]


def write(subject: Subject, folder: Path) -> None:
    """Write encoder.onnx and decoder.onnx, opset `OPSET`; large weights go into files beside them (.onnx.data)."""
    import onnx  # noqa: F401  # torch.onnx finds it by itself: named here so that its lack is one clear line
    import onnxscript  # noqa: F401

    sam, side = subject.original, subject.side
    channels, grid = subject.numbers["prompt_width"], side // subject.numbers["patch_size"]
    external = subject.num_bytes() > INLINE_BYTES
    count, points, height, width = Dim("prompts"), Dim("points"), Dim("height", max=side), Dim("width", max=side)
    shown = torch.zeros(2, 3, side - 1, side - 2)
    _export(
        EncoderGraph(sam),
        (shown,),
        folder / ENCODER,
        ("images",),
        INPUTS[:1],
        {"images": {0: Dim("images"), 2: height, 3: width}},
        external=external,
    )
    asked = (
        torch.zeros(2, channels, grid, grid),
        torch.zeros(3, 5, 2),
        torch.ones(3, 5),
        torch.zeros(2, 1, 4 * grid, 4 * grid),
        torch.zeros(1),
        torch.tensor([side - 1.0, side + 1.0]),
    )
    sizes = {
        "image_embeddings": {0: Dim("embeddings")},
        "point_coords": {0: count, 1: points},
        "point_labels": {0: count, 1: points},
        "mask_input": {0: Dim("mask_inputs")},
        "has_mask_input": {},
        "orig_im_size": {},
    }
    _export(DecoderGraph(sam), asked, folder / DECODER, INPUTS, OUTPUTS, sizes, external=external)


def _export(
    graph: nn.Module,
    example: tuple[torch.Tensor, ...],
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    sizes: dict[str, dict[int, Dim]],
    *,
    external: bool,
) -> None:
    chatter = logging.getLogger("torch.onnx")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # of torch and onnxscript about their own insides
            torch.onnx.export(
                graph.eval(),
                example,
                path,
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=OPSET,
                dynamic_shapes=sizes,
                external_data=external,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(f"torch cannot express {path.stem} in ONNX: {str(error).splitlines()[0]}") from None
    finally:
        chatter.setLevel(level)


def reload(subject: Subject, folder: Path) -> Segment:
    """Load both graphs in onnxruntime on the CPU; neither torch nor SAM takes part."""
    import onnxruntime

    encoder, decoder = (
        onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        for name in (ENCODER, DECODER)
    )
    side, grid = subject.side, subject.side // subject.numbers["patch_size"]
    no_mask = np.zeros((1, 1, 4 * grid, 4 * grid), np.float32)

    def segment(image: np.ndarray, prompts: Sequence[Prompt]) -> list[PromptOutput]:
        size = image.shape[0], image.shape[1]
        pixels = resize_to_frame(image, Frame(side)).astype(np.float32).transpose(2, 0, 1)[None]
        embeddings = encoder.run(None, {"images": pixels})[0]
        outputs = []
        for prompt in prompts:
            points = prompt_points(prompt, size, side)
            values = (embeddings, *points, no_mask, np.zeros(1, np.float32), np.array(size, np.float32))
            masks, predicted, low_res = decoder.run(None, dict(zip(INPUTS, values, strict=True)))
            outputs.append(PromptOutput(low_res[0, 0], masks[0, 0] > 0, float(predicted[0, 0])))
        return outputs

    return segment


def prompt_points(prompt: Prompt, size: tuple[int, int], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a prompt as the decoder's inputs: (1, N, 2) float32 in the model frame and (1, N) float32 labels.

    A box is two points with labels 2 and 3; without one, as in segment_anything, a point of label -1 takes its place.

    Args:
        size: (H, W) of the original image. side: S.
    """
    points, labels = [], []
    if prompt.points is not None and prompt.labels is not None:
        points, labels = [*np.asarray(prompt.points, float)], [*np.asarray(prompt.labels, float)]
    corners = np.zeros((1, 2)) if prompt.box is None else np.asarray(prompt.box, float).reshape(2, 2)
    framed = to_model_frame(np.array([*points, *corners]), size[1], size[0], Frame(side))
    kinds = [*labels, *([-1.0] if prompt.box is None else [2.0, 3.0])]
    return framed.astype(np.float32)[None], np.array([kinds], np.float32)


def _usage(subject: Subject) -> str:
    side, grid = subject.side, subject.side // subject.numbers["patch_size"]
    return f"""Two graphs, opset {OPSET}. `{ENCODER}` takes pixels, `{DECODER}` has the inputs (names, shapes, float32)
and outputs of segment_anything's own ONNX export.

```python
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

encoder, decoder = onnxruntime.InferenceSession("{ENCODER}"), onnxruntime.InferenceSession("{DECODER}")
image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")  # upright, as boxes are drawn
scale = {side} / max(image.size)
small = image.resize([int(side * scale + 0.5) for side in image.size], Image.Resampling.BILINEAR)
pixels = np.asarray(small, np.float32).transpose(2, 0, 1)[None]  # (1, 3, h, w) RGB of 0..255
embeddings = encoder.run(None, {{"images": pixels}})[0]

box = np.array([[x0, y0], [x1, y1]], np.float32) * np.array(small.size, np.float32) / np.array(image.size, np.float32)
masks, predicted_iou, low_res = decoder.run(None, {{
    "image_embeddings": embeddings,
    "point_coords": box[None],                               # (B, N, 2) XY, pixels of the resized image
    "point_labels": np.array([[2, 3]], np.float32),          # 2 and 3: corners of a box; 1, 0: points; -1: padding
    "mask_input": np.zeros((1, 1, {4 * grid}, {4 * grid}), np.float32), "has_mask_input": np.zeros(1, np.float32),
    "orig_im_size": np.array([image.height, image.width], np.float32)}})
mask = masks[0, 0] > 0   # of the four masks: 0 for boxes and several points, 1 to 3 are a single point's candidates
```

A prompt without a box needs one more point, (0, 0) with label -1. B prompts may go to one image, or one each to B
images; another number of images is an error. All prompts of a call have as many points, and one original size.

Other tools: code written for segment_anything's ONNX decoder (its notebook `onnx_model_example`) takes `{DECODER}` as
it is. samexporter and AnyLabeling feed an encoder of their own form (input `input_image`, height x width x 3), and
CVAT's interactor expects a decoder with four more outputs and runs SAM's encoder in PyTorch: give those tools the
weights of `--format pth` and let their exporter convert them.
"""


FORMAT = Format("onnx", f"onnxruntime, opset {OPSET}", ("onnx", "onnxscript", "onnxruntime"), write, reload, _usage)
