"""Run SAM's prompt encoder and mask decoder on batches of images with prompts of their own; segment_anything's weights.

MaskDecoder.forward takes one image and repeats it for every prompt. Here images and prompts are batched, prompts of
different lengths are decoded together (shorter ones are padded and masked), what depends on the image alone is computed
once for all of its prompts, and the transposed convolutions, whose kernels do not overlap, are products on the tokens.
Kirillov et al. 2023, arXiv:2304.02643, section 3 and appendix A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor

from lesionsam.types import Prompts, to_device

ABSENT = -1  # label of the point that stands where a prompt has no box


def decode_groups(
    sam: Sam, features: Tensor, groups: Sequence[tuple[Tensor | None, Prompts]], chosen: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Decode groups of prompts, each group of one kind, in one pass.

    The prompt encoder runs in full precision even under autocast: in bfloat16 a coordinate is off by a pixel.

    Args:
        features: (B, C, H', W') encoder output. groups: (G,) int64 images and their G prompt sets, model frame;
            an image may come several times, in any group. None: a single group, every image once and in order.
        chosen: which of the 4 tokens; token 0 is the single mask, 1 to 3 are the candidates of an ambiguous prompt.
    Returns:
        low-resolution logits (R, K, 4H', 4W') and predicted IoUs (R, K) of the K chosen tokens, R the sum of all G,
        group by group.
    """
    decoder, (height, width) = sam.mask_decoder, features.shape[-2:]
    rows = None if groups[0][0] is None else torch.cat([images for images, _ in groups if images is not None])
    sizes = [len(features) if images is None else len(images) for images, _ in groups]
    with torch.autocast(features.device.type, enabled=False):
        sparse = [
            embed_points_and_boxes(sam.prompt_encoder, prompts).expand(size, -1, -1)
            for size, (_, prompts) in zip(sizes, groups, strict=True)
        ]
        position = sam.prompt_encoder.get_dense_pe().flatten(2).transpose(1, 2).contiguous()  # (1, N, C)
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    longest = max(one.shape[1] for one in sparse)
    tokens = torch.cat([F.pad(one, (0, 0, 0, longest - one.shape[1])) for one in sparse])
    tokens = torch.cat([outputs.expand(len(tokens), -1, -1), tokens], dim=1)  # (R, T, C)
    present = None
    if any(one.shape[1] < longest for one in sparse):
        counts = [len(outputs) + one.shape[1] for one in sparse for _ in range(len(one))]
        number = torch.arange(tokens.shape[1], device=tokens.device)
        present = number < to_device(torch.tensor(counts), tokens.device)[:, None]
    image = features.flatten(2).transpose(1, 2).contiguous()  # (B, N, C)
    if any(prompts.masks is not None for _, prompts in groups):
        image = image if rows is None else image[rows]
        dense = [
            dense_of(sam.prompt_encoder, prompts).expand(size, -1, -1)
            for size, (_, prompts) in zip(sizes, groups, strict=True)
        ]
        image, rows = image + torch.cat(dense), None
    else:
        image = image + sam.prompt_encoder.no_mask_embed.weight
    hidden, keys = two_way(decoder.transformer, image, position, tokens, rows, present)
    heads = list(enumerate(decoder.output_hypernetworks_mlps))[chosen]
    weights = torch.stack([head(hidden[:, 1 + k]) for k, head in heads], dim=2)  # (R, C / 8, K)
    logits = output_upscaling(decoder.output_upscaling, keys) @ weights  # (R, N 4 4, K)
    logits = logits.view(len(tokens), height, width, 2, 2, 2, 2, -1).permute(0, 7, 1, 3, 5, 2, 4, 6)
    return (
        logits.reshape(len(tokens), -1, 4 * height, 4 * width),
        decoder.iou_prediction_head(hidden[:, 0])[:, chosen],
    )


def embed_points_and_boxes(encoder: Any, prompts: Prompts) -> Tensor:
    """Return PromptEncoder's sparse embeddings of one kind of prompt, without its boolean indexing, which blocks on a
    GPU.

    Returns:
        (B, T, C): points, then the point that stands for a missing box or the box's two corners; (1, 0, C) of neither.
    """
    parts = []
    if prompts.points is not None and prompts.labels is not None:
        points, labels = prompts.points + 0.5, prompts.labels.long()
        if prompts.boxes is None:
            points, labels = F.pad(points, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=ABSENT)
        places = encoder.pe_layer.forward_with_coords(points, encoder.input_image_size)
        table = torch.cat([encoder.not_a_point_embed.weight, *(e.weight for e in encoder.point_embeddings[:2])])
        parts.append(places.masked_fill((labels == ABSENT)[..., None], 0) + F.embedding(labels - ABSENT, table))
    if prompts.boxes is not None:
        corners = encoder.pe_layer.forward_with_coords(prompts.boxes.view(-1, 2, 2) + 0.5, encoder.input_image_size)
        parts.append(corners + torch.cat([e.weight for e in encoder.point_embeddings[2:4]]))
    return torch.cat(parts, 1) if parts else encoder.no_mask_embed.weight.new_zeros(1, 0, encoder.embed_dim)


def dense_of(encoder: Any, prompts: Prompts) -> Tensor:
    """Return PromptEncoder's dense embeddings of G prompt sets, (G, N, C); (1, N, C) without a mask prompt."""
    if prompts.masks is not None:
        with torch.autocast(prompts.masks.device.type, enabled=False):
            return encoder.mask_downscaling(prompts.masks).flatten(2).transpose(1, 2)
    height, width = encoder.image_embedding_size
    return encoder.no_mask_embed.weight.expand(1, height * width, -1)


def two_way(
    transformer: Any, image: Tensor, position: Tensor, tokens: Tensor, rows: Tensor | None, present: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run TwoWayTransformer.forward for tokens of several lengths, several of them for an image.

    Args:
        image: (B, N, C). position: (1, N, C). tokens: (R, T, C). rows: (R,) image of each, None where R = B in order.
        present: (R, T) bool, False on tokens that fill up the shorter ones; None where all are as long.
    Returns:
        tokens (R, T, C) and image (R, N, C) after the transformer.
    """
    queries, keys = tokens, image
    for layer in transformer.layers:
        one_each = rows if keys is image else None  # the first layer sees the images, the next ones what each row made
        if layer.skip_first_layer_pe:
            queries = attend(layer.self_attn, queries, queries, queries, present)
        else:
            with_place = queries + tokens
            queries = queries + attend(layer.self_attn, with_place, with_place, queries, present)
        queries = layer.norm1(queries)
        placed = keys + position
        from_image = attend(layer.cross_attn_token_to_image, queries + tokens, placed, keys, key_rows=one_each)
        queries = layer.norm2(queries + from_image)
        queries = layer.norm3(queries + layer.mlp(queries))
        from_tokens = attend(
            layer.cross_attn_image_to_token, placed, queries + tokens, queries, present, query_rows=one_each
        )
        keys = layer.norm4((keys if one_each is None else keys.index_select(0, one_each)) + from_tokens)
    final = attend(transformer.final_attn_token_to_image, queries + tokens, keys + position, keys)
    return transformer.norm_final_attn(queries + final), keys


def attend(
    attention: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    present: Tensor | None = None,
    *,
    query_rows: Tensor | None = None,
    key_rows: Tensor | None = None,
) -> Tensor:
    """Apply the decoder's Attention; written out, as torch's fused kernels are slow backward on so few tokens.

    Args:
        q: (R, Q, C), k and v: (R, T, C). present: (R, T) bool, keys that take part; None = all.
        query_rows, key_rows: (R,) which of fewer queries, or of fewer keys and values, belong to each of R rows; they
            are projected before they are repeated.
    """
    parts = []
    for project, x, rows in (
        (attention.q_proj, q, query_rows),
        (attention.k_proj, k, key_rows),
        (attention.v_proj, v, key_rows),
    ):
        part = project(x)
        part = part if rows is None else part.index_select(0, rows)
        parts.append(part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2))
    logits = parts[0] @ parts[1].transpose(2, 3) / parts[0].shape[-1] ** 0.5
    if present is not None:
        logits = logits.masked_fill(~present[:, None, None], float("-inf"))
    return attention.out_proj((logits.softmax(-1) @ parts[2]).transpose(1, 2).flatten(2))


def output_upscaling(layers: Any, tokens: Tensor) -> Tensor:
    """Apply MaskDecoder.output_upscaling: two transposed convolutions of stride and kernel 2 with a norm in between.

    Args:
        tokens: (R, N, C), the feature grid row by row.
    Returns:
        (R, N 4 4, C / 8): for each token its four quarters row by row, for each of these its four.
    """
    first, norm, activation, second, last = layers
    tokens = transposed_convolution(first, tokens)
    tokens = F.layer_norm(tokens, tokens.shape[-1:], norm.weight, norm.bias, norm.eps)
    return last(transposed_convolution(second, activation(tokens)))


def transposed_convolution(convolution: Any, tokens: Tensor) -> Tensor:
    """Apply a ConvTranspose2d of kernel and stride 2 to tokens, (R, N, C) -> (R, 4 N, C')."""
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (2 2 C', C)
    return F.linear(tokens, weight, convolution.bias.repeat(4)).view(len(tokens), 4 * tokens.shape[1], -1)
