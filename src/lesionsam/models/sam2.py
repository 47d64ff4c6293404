"""SAM 2.1, EdgeTAM and the SAM 3 tracker on transformers' modules, for still images.

The three share prompt encoder and mask decoder, and take images squashed to a square. Ravi et al. 2024,
arXiv:2408.00714; Zhou et al. 2025, arXiv:2501.07256; Carion et al. 2025, arXiv:2511.16719.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lesionsam.models.sam import PromptGroups, Sam
from lesionsam.types import Frame, Prompts


@dataclass(frozen=True)
class Family:
    """Describe one family of transformers' models.

    Attributes:
        model: class of transformers; `config` and `processor` follow its name.
        mean, std: of RGB in 0..255, per channel.
        blocks: attribute of the backbone that lists its blocks; empty = the backbone is a single block.
        lora_targets, adapted_parts: see `Sam`.
    """

    model: str
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    blocks: str = ""
    lora_targets: tuple[str, ...] = ()
    adapted_parts: tuple[str, ...] = ()


SAM2 = Family("Sam2Model", blocks="blocks", lora_targets=("attn.qkv", "attn.proj"), adapted_parts=("attn", "mlp"))
EDGETAM = Family("EdgeTamModel")
SAM3 = Family(
    "Sam3TrackerModel",
    mean=(127.5, 127.5, 127.5),
    std=(127.5, 127.5, 127.5),
    blocks="layers",
    lora_targets=("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
    adapted_parts=("mlp",),
)
# By the model_type of a config.json; checkpoints for video hold the image model.
FAMILIES = {
    "sam2": SAM2,
    "sam2_video": SAM2,
    "edgetam": EDGETAM,
    "edgetam_video": EDGETAM,
    "sam3_tracker": SAM3,
    "sam3_video": SAM3,
}
NUM_MAPS = 3  # feature maps that the decoder takes
NO_POINT = -1  # label


class Sam2(Sam):
    """A Sam2Model, EdgeTamModel or Sam3TrackerModel behind the interface.

    The keys of its state dict are those of the model on the Hub. The 1x1 convolutions that reduce the fine maps for the
    decoder (`mask_decoder.conv_s0`, `conv_s1`) count as part of the neck: they run once per image and train with it.

    Args:
        model: of transformers; its modules are shared. name: model.name of params.yaml.
    """

    vision_encoder: Any
    shared_image_embedding: Any
    no_memory_embedding: nn.Parameter
    family: Family
    config: Any

    def __init__(self, model: Any, name: str) -> None:
        super().__init__()
        self.name, self.config = name, model.config
        for child, module in model.named_children():  # vision_encoder, prompt_encoder, mask_decoder, ...
            self.add_module(child, module)
        self.no_memory_embedding = model.no_memory_embedding
        self.family = FAMILIES[self.config.model_type]
        self.lora_targets, self.adapted_parts = self.family.lora_targets, self.family.adapted_parts
        self.register_buffer("pixel_mean", torch.tensor(self.family.mean), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(self.family.std), persistent=False)
        self.eval()

    @property
    def frame(self) -> Frame:
        """Return the frame: squashed to S x S."""
        return Frame(int(self.prompt_encoder.input_image_size), squash=True)

    @property
    def grid(self) -> int:
        """Return H' = W'."""
        return int(self.prompt_encoder.image_embedding_size[0])

    @property
    def embed_dim(self) -> int:
        """Return the channels of the image embedding."""
        return int(self.prompt_encoder.hidden_size)

    @property
    def encoder(self) -> nn.Module:
        """Return the image encoder."""
        return self.vision_encoder

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Return Hiera's or the ViT's blocks; EdgeTAM's backbone is a single block."""
        backbone = self.vision_encoder.backbone
        return getattr(backbone, self.family.blocks) if self.family.blocks else [backbone]

    def stem(self) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
        """Yield patch and position embeddings."""
        backbone = self.vision_encoder.backbone
        if self.family == SAM2:
            yield "patch_embed", backbone.patch_embed
            yield "pos_embed", backbone.pos_embed
            yield "pos_embed_window", backbone.pos_embed_window
        elif self.family == SAM3:
            yield "embeddings", backbone.embeddings
            yield "layer_norm", backbone.layer_norm

    def neck(self) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
        """Yield the feature pyramid, the convolutions of the fine maps and the embedding of an empty memory."""
        yield "neck", self.vision_encoder.neck
        yield "conv_s0", self.mask_decoder.conv_s0
        yield "conv_s1", self.mask_decoder.conv_s1
        yield "no_memory_embedding", self.no_memory_embedding

    def train(self, mode: bool = True) -> Sam2:
        """Set the mode; batch norms keep their statistics, which frozen features must not change."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    # ---- size --------------------------------------------------------------------------------------------------------

    @property
    def multiple(self) -> int:
        """Return what the side must be a multiple of: the ViT's patch, or the coarsest level and Hiera's windows."""
        if self.family == SAM3:
            return int(self.config.vision_config.backbone_config.patch_size)
        return 32

    @property
    def stride(self) -> int:
        """Return the pixels per cell of the image embedding."""
        return self.side // self.grid

    def architecture(self) -> dict:
        """Return the configuration of transformers, at the present side of the input."""
        config, grid = copy.deepcopy(self.config), self.grid
        config.prompt_encoder_config.image_size = self.side
        vision = config.vision_config
        vision.backbone_feature_sizes = [[4 * grid, 4 * grid], [2 * grid, 2 * grid], [grid, grid]]
        if self.family == SAM2:
            vision.backbone_config.image_size = [self.side, self.side]
        elif self.family == SAM3:
            vision.backbone_config.image_size = self.side
        return {"transformers": config.to_diff_dict()}

    def resize_input(self, side: int) -> None:
        """Set the sizes that the modules keep; position embeddings are interpolated or tiled as the model runs."""
        grid = side // self.stride
        prompts = self.prompt_encoder
        prompts.input_image_size, prompts.image_embedding_size = side, (grid, grid)
        prompts.mask_input_size = (4 * grid, 4 * grid)
        if self.family == SAM3:
            config = self.config.vision_config.backbone_config
            config = type(config).from_dict(config.to_dict() | {"image_size": side})
            layers: Sequence[Any] = self.blocks
            for layer in layers:
                places = layer.precompute_positions(config, layer.window_size)
                layer.position_ids = places.to(layer.position_ids.device)

    # ---- encode ------------------------------------------------------------------------------------------------------

    def run_stem(self, pixels: Tensor) -> Tensor:
        """Return patch embeddings with positions, packed; see `run_blocks`. EdgeTAM: the pixels."""
        backbone = self.vision_encoder.backbone
        if self.family == SAM2:
            tokens = backbone.patch_embed(pixels)
            tokens = tokens + backbone._get_pos_embed(tokens.shape[1:3])
        elif self.family == SAM3:
            tokens = backbone.layer_norm(backbone.embeddings(pixels))
        else:
            tokens = pixels
        return tokens.flatten(1)

    def run_blocks(self, tokens: Tensor, start: int, stop: int | None = None) -> Tensor:
        """Run blocks `start` to `stop`.

        Args:
            tokens: (B, N), the maps that later parts read, each flattened: outputs of the finished stages that the neck
                takes, and of the last block where it ends no stage.
        Returns:
            (B, N'), the same after `stop` blocks.
        """
        stop = len(self.blocks) if stop is None else min(stop, len(self.blocks))
        if stop <= start:
            return tokens
        maps = self._unpack(tokens, start)
        if self.family == EDGETAM:
            maps = list(self.blocks[0](maps[0]).last_hidden_state)
            return torch.cat([one.permute(0, 2, 3, 1).flatten(1) for one in maps], 1)
        ends = self._stage_ends()
        current = maps[-1]
        if start - 1 not in ends:
            maps.pop()
        for k in range(start, stop):
            current = self.blocks[k](current)
            if k in ends:
                maps.append(current)
        if stop - 1 not in ends:
            maps.append(current)
        return torch.cat([one.flatten(1) for one in maps], 1)

    def run_neck(self, tokens: Tensor) -> Tensor:
        """Run the neck; equals get_image_embeddings of transformers, the maps folded into one tensor."""
        maps = self._unpack(tokens, len(self.blocks))
        if self.family == SAM3:
            levels = list(self.vision_encoder.neck(maps[-1].permute(0, 3, 1, 2))[0])
        else:
            count = self.vision_encoder.num_feature_levels
            levels = list(self.vision_encoder.neck(maps)[0][-count:][::-1])
        levels[0], levels[1] = self.mask_decoder.conv_s0(levels[0]), self.mask_decoder.conv_s1(levels[1])
        levels[-1] = levels[-1] + self.no_memory_embedding.view(1, -1, 1, 1)
        fine, middle, coarse = levels[:NUM_MAPS]
        return torch.cat([coarse, F.pixel_unshuffle(fine, 4), F.pixel_unshuffle(middle, 2)], 1)

    def _stage_ends(self) -> list[int]:
        return self.vision_encoder.backbone.stage_ends if self.family == SAM2 else [len(self.blocks) - 1]

    def _map_shapes(self, num_blocks: int) -> list[tuple[int, int]]:
        """Return (side, channels) of the maps that `run_blocks` keeps after so many blocks."""
        if self.family == SAM3:
            config = self.config.vision_config.backbone_config
            return [(self.side // self.multiple, config.hidden_size)]
        if self.family == EDGETAM:
            convolutions = self.vision_encoder.neck.convs
            channels = [convolution.in_channels for convolution in reversed(convolutions)]
            return (
                [(self.side // (4 << k), width) for k, width in enumerate(channels)] if num_blocks else [(self.side, 3)]
            )
        config, ends = self.vision_encoder.backbone.config, self._stage_ends()
        side, width = self.side // int(config.patch_stride[0]), int(config.hidden_size)
        shapes: list[tuple[int, int]] = []
        blocks: Sequence[Any] = self.blocks
        for k, block in enumerate(blocks[:num_blocks]):
            side, width = side // (block.query_stride[0] if block.query_stride else 1), block.dim_out
            if k in ends:
                shapes.append((side, width))
        return shapes if num_blocks - 1 in ends else [*shapes, (side, width)]

    def _unpack(self, tokens: Tensor, num_blocks: int) -> list[Tensor]:
        """Return the maps (B, h, w, C) of packed tokens; the pixels (B, 3, S, S) before EdgeTAM's backbone."""
        shapes = self._map_shapes(num_blocks)
        parts = tokens.split([side * side * width for side, width in shapes], 1)
        if self.family == EDGETAM and num_blocks == 0:
            return [parts[0].view(-1, 3, self.side, self.side)]
        return [part.reshape(-1, side, side, width) for part, (side, width) in zip(parts, shapes, strict=True)]

    # ---- decode ------------------------------------------------------------------------------------------------------

    def decode_groups(
        self, features: Tensor, groups: PromptGroups, chosen: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Decode each group with transformers' modules; see `Sam.decode_groups`.

        In eval mode the single mask is chosen by stability, as in SAM 2: where the first token's mask is unstable, the
        best candidate takes its place.
        """
        logits, predicted = zip(*(self._decode(features, *group, chosen) for group in groups), strict=True)
        return torch.cat(logits), torch.cat(predicted)

    def _decode(self, features: Tensor, rows: Tensor | None, prompts: Prompts, chosen: slice) -> tuple[Tensor, Tensor]:
        decoder, features = self.mask_decoder, features if rows is None else features.index_select(0, rows)
        with torch.autocast(features.device.type, enabled=False):  # in bfloat16 a coordinate is off by a pixel
            sparse, dense = self._embed_prompts(prompts, len(features))
            position = self._position()
        coarse, fine, middle = features.split([self.embed_dim, self.embed_dim * 2, self.embed_dim], 1)
        outputs = torch.cat([decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([outputs.expand(len(features), 1, -1, -1), sparse], 2)
        hidden, image = decoder.transformer(
            point_embeddings=tokens,
            image_embeddings=coarse + dense,
            image_positional_embeddings=position.expand(len(features), -1, -1, -1),
            attention_similarity=None,
            target_embedding=None,
        )
        image = image.transpose(2, 3).reshape(coarse.shape)
        up = decoder.upscale_conv1(image) + F.pixel_shuffle(middle, 2)
        up = decoder.activation(decoder.upscale_layer_norm(up))
        up = decoder.activation(decoder.upscale_conv2(up) + F.pixel_shuffle(fine, 4))
        heads = enumerate(decoder.output_hypernetworks_mlps)
        weights = torch.stack([head(hidden[:, 0, 2 + k]) for k, head in heads], 1)  # (R, K, C / 8)
        masks = (weights @ up.flatten(2)).view(len(up), -1, *up.shape[-2:])
        predicted = decoder.iou_prediction_head(hidden[:, 0, 1])
        if chosen == slice(0, 1) and decoder.dynamic_multimask_via_stability and not decoder.training:
            one, score = decoder._dynamic_multimask_via_stability(masks[:, None], predicted[:, None])
            return one[:, 0], score[:, 0]
        return masks[:, chosen], predicted[:, chosen]

    def _embed_prompts(self, prompts: Prompts, count: int) -> tuple[Tensor, Tensor]:
        """Return sparse (R, 1, T, C) and dense (R, C, H', W') embeddings; no prompt is a point that is none."""
        device = self.no_memory_embedding.device
        points = None if prompts.points is None else prompts.points[:, None].expand(count, -1, -1, -1)
        labels = None if prompts.labels is None else prompts.labels[:, None].expand(count, -1, -1)
        boxes = None if prompts.boxes is None else prompts.boxes[:, None].expand(count, -1, -1)
        if points is None and boxes is None:
            points = torch.zeros(count, 1, 1, 2, device=device)
            labels = torch.full((count, 1, 1), NO_POINT, device=device)
        sparse, dense = self.prompt_encoder(points, labels, boxes, prompts.masks)
        return sparse, dense

    def _position(self) -> Tensor:
        """Return the position embedding of the feature grid, (1, C, H', W')."""
        table = self.shared_image_embedding
        places = (torch.arange(self.grid, device=self.no_memory_embedding.device) + 0.5) / self.grid
        rows, columns = torch.meshgrid(places, places, indexing="ij")
        return table(torch.stack([columns, rows], -1)).permute(2, 0, 1)[None]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and notes inside the block; they would break into ours."""
    from transformers.utils import logging

    was_on, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_on:
            logging.enable_progress_bar()


@contextmanager
def no_random_weights() -> Iterator[None]:
    """Build models of transformers without drawing their weights, which a file will fill; buffers are computed."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


def build_sam2_model(values: Mapping[str, Any]) -> Any:
    """Build a model of transformers from the values of its config.json, with random weights.

    Raises:
        ValueError: another model_type than those of `FAMILIES`.
    """
    if values.get("model_type") not in FAMILIES:
        raise ValueError(f"model_type {values.get('model_type')!r}, expected one of {', '.join(FAMILIES)}")
    import transformers  # here, as it takes seconds to import

    kind = FAMILIES[values["model_type"]].model
    with quiet():
        config = getattr(transformers, kind.removesuffix("Model") + "Config").from_dict(dict(values))
        return getattr(transformers, kind)(config)
