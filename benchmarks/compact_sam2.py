"""Pretrain a small SAM 2 on the generated shapes, as the compact SAM was: does the method need one architecture?

    python benchmarks/compact_sam2.py --minutes 10 --out models/compact-sam2.safetensors

The weights can then be adapted like any others: `model.name: compact-sam2/small`, `model.checkpoint` the file. Figures:
docs/log.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers

from lesionsam.models.checkpoint import save_sam
from lesionsam.models.sam2 import Sam2, quiet
from lesionsam.pretraining.run import pretrain

NAME = "compact-sam2/small"
SIDE, WIDTH = 128, 64  # of the input and of the image embedding: pixels, channels


def small_sam2(seed: int) -> Sam2:
    """Build a SAM 2 of 0.6 million parameters with random weights."""
    torch.manual_seed(seed)
    with quiet():
        backbone = transformers.Sam2HieraDetConfig(
            hidden_size=16,
            image_size=[SIDE, SIDE],
            patch_kernel_size=[3, 3],
            patch_stride=[2, 2],
            patch_padding=[1, 1],
            blocks_per_stage=[1, 1, 3, 1],
            embed_dim_per_stage=[16, 32, 64, 128],
            num_attention_heads_per_stage=[1, 1, 2, 4],
            window_size_per_stage=[8, 4, 8, 4],
            global_attention_blocks=[3, 4],
            window_positional_embedding_background_size=[8, 8],
        )
        vision = transformers.Sam2VisionConfig(
            backbone_config=backbone,
            backbone_channel_list=[128, 64, 32, 16],
            backbone_feature_sizes=[[SIDE // 2] * 2, [SIDE // 4] * 2, [SIDE // 8] * 2],
            fpn_hidden_size=WIDTH,
        )
        config = transformers.Sam2Config(
            vision_config=vision,
            prompt_encoder_config=transformers.Sam2PromptEncoderConfig(
                hidden_size=WIDTH, image_size=SIDE, patch_size=8
            ),
            mask_decoder_config=transformers.Sam2MaskDecoderConfig(
                hidden_size=WIDTH, mlp_dim=256, num_attention_heads=4, iou_head_hidden_dim=64
            ),
        )
        return Sam2(transformers.Sam2Model(config), NAME)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="by the clock (10)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, shapes, batches and prompts (0)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--out", type=Path, default=Path("models/compact-sam2.safetensors"), help="weights to write")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    state = a.out.with_suffix(".state.pt")
    sam, progress = pretrain(
        minutes=a.minutes,
        seed=a.seed,
        state_path=state,
        sam=small_sam2(a.seed),
        resume=True,
        bfloat16=False,
        log=lambda line: print(line, flush=True),
    )
    save_sam(sam, a.out, name=NAME)
    print(f"wrote {a.out}: {sum(p.numel() for p in sam.parameters()):,} parameters, {progress.step} steps")


if __name__ == "__main__":
    main()
