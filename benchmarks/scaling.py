"""Cost of training in several processes: bytes synchronised per step, expected and measured scaling.

    python benchmarks/scaling.py            # the cost model alone
    python benchmarks/scaling.py --measure  # and one process beside two on this machine's CPU, same batch
    python benchmarks/scaling.py --measure --write

The cost model counts trained parameters on the meta device and takes the link speeds of `LINKS` and the arithmetic
speed of `GPU_FLOPS`, which are assumptions. A ring all-reduce sends 2 (N - 1) / N times the gradient's bytes from each
of N processes (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002). No overlap with the backward pass is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from lesionsam.cli.smoke import generated_samples
from lesionsam.config.edit import fit
from lesionsam.config.load import default_values, validate
from lesionsam.data.dataset import open_dataset
from lesionsam.experiment.build import build_method, prepare_sam
from lesionsam.experiment.launch import is_joining, joined
from lesionsam.models.finetuned import Strategy, attach
from lesionsam.models.sam1 import build_registered
from lesionsam.models.trainable import select_trainable, trained_parameters
from lesionsam.parallel.collectives import barrier, is_main, rank, world_size
from lesionsam.training.gradients import Part, add_gradients, forward_module, gradients_stay
from lesionsam.types import Frame
from record import ROOT, multiplications, provenance, record, table

MODELS = {"vit_b": "ViT-B", "vit_l": "ViT-L", "vit_h": "ViT-H"}
STRATEGIES = {
    "decoder": Strategy("none"),
    "last 2 blocks, decoder": Strategy("blocks", last_k=2),
    "LoRA, decoder": Strategy("lora", last_k=0, lora_rank=8, lora_alpha=8.0, lora_dropout=0.0),
    "everything": Strategy("blocks", last_k=0),
}
GPU_FLOPS = 1.0e14  # sustained in bf16: a third of an A100's peak of 312e12
LINKS = {"8 GPUs, NVLink": (8, 200e9), "4 x 8 GPUs, 200 Gb/s": (32, 20e9), "4 x 8 GPUs, 10 Gb/s": (32, 1e9)}  # bytes/s
PASSES = 4  # forward and backward of the student (3 times a forward pass) and forward of the teacher
STEPS, BATCH_SIZE, SIDE = 6, 8, 128


def cost_model() -> str:
    """Return the table of bytes and expected times, and how many images per GPU keep nine tenths of the speed."""
    rows = []
    for name, title in MODELS.items():
        with torch.device("meta"):
            sam = build_registered(name)
        blocks = len(sam.blocks)
        pixels = torch.empty(1, 3, sam.side, sam.side, device="meta")
        whole = multiplications(lambda sam=sam, pixels=pixels: sam.image_encoder(pixels))
        for what, strategy in STRATEGIES.items():
            with torch.device("meta"):
                sam = build_registered(name)
            attach(sam, strategy, seed=0)
            k = strategy.last_k if strategy.encoder == "blocks" else 0
            select_trainable(sam, encoder=strategy.encoder, unfreeze_last_k=k, train_decoder=True)
            trained = sum(p.numel() for p in trained_parameters(sam))
            share = 0.0 if strategy.encoder == "none" else (k or blocks) / blocks
            compute = PASSES * share * whole / GPU_FLOPS
            cells = [f"{title}, {what}", f"{trained / 1e6:.1f}", f"{4 * trained / 1e6:.0f}", f"{1000 * compute:.1f}"]
            for count, speed in LINKS.values():
                sync = 2 * (count - 1) / count * 4 * trained / speed
                least = f"; {max(1, -(-9 * sync // compute)):.0f}" if compute else ""
                cells.append(f"{1000 * sync:.2f}{least}")
            rows.append(cells)
    columns = ["trained", "parameters (M)", "gradient (MB)", "arithmetic of an image (ms)"]
    return table([*columns, *(f"all-reduce over {link} (ms); images per GPU" for link in LINKS)], rows)


def work(batch_size: int) -> dict[str, Any]:
    """Time steps of the default method with the compact model in this process, one of several or alone."""
    changes = {"train": {"batch_size": batch_size}, "method": {"gate": {"entropy_thresh": 0.6931}}}
    values = default_values()
    for section, keys in changes.items():
        values[section] = {**values[section], **keys}
    values["method"]["gate"] = {"region": "big_box", "trust_empty": False} | changes["method"]["gate"]
    config, weights = validate(fit(values)), ROOT / "foundation" / "compact.safetensors"
    with joined(config) if is_joining() else nullcontext():
        torch.set_num_threads(1)
        device = torch.device("cpu")
        sam = prepare_sam(config, weights, device)
        with tempfile.TemporaryDirectory() as folder:
            samples = generated_samples(Path(folder) / "images", batch_size, 0)
            data = open_dataset(samples, Frame(SIDE), Path(folder) / "frames", with_masks=True)
            whole = data.batch(range(batch_size))
            method, _ = build_method(config, sam, weights, data, device)
        count = batch_size // world_size()
        batch = whole[rank() * count : (rank() + 1) * count]
        forward, sent = forward_module(method, "fp32"), [0]
        if isinstance(forward, DistributedDataParallel):
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            def counted(group, bucket):  # torch refuses other annotations than its own
                sent[0] += bucket.buffer().nbytes
                return allreduce_hook(group, bucket)

            forward.register_comm_hook(None, counted)
        scaler = torch.amp.GradScaler("cpu", enabled=False)

        def step(synchronise: bool) -> float:
            for p in trained_parameters(method.model):
                p.grad = None
            barrier()
            begun = time.perf_counter()
            apart = isinstance(forward, DistributedDataParallel) and not synchronise
            with gradients_stay(forward) if apart else nullcontext():
                add_gradients(method, [Part(batch, 0)], precision="fp32", scaler=scaler, forward=forward)
            method.after_step()
            return time.perf_counter() - begun

        found: dict[str, Any] = {"synchronised": [], "apart": []}
        step(True)
        sent[0] = 0
        for _ in range(STEPS):
            found["synchronised"].append(step(True))
            found["apart"].append(step(False))
        found |= {"bytes": sent[0] / STEPS, "gradient": 4 * sum(p.numel() for p in trained_parameters(method.model))}
        return found if is_main() else {}


def measured() -> str:
    """Return how two processes do beside one on the same batch."""
    script, found = Path(__file__), {}
    for count in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        done = subprocess.run(
            [sys.executable, *launcher, str(script), "--worker"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
            capture_output=True,
            text=True,
            check=True,
        )
        found[count] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    one, two, apart = (min(times) for times in (found[1]["apart"], found[2]["synchronised"], found[2]["apart"]))
    megabytes = [found[2][name] / 1e6 for name in ("bytes", "gradient")]
    rows = [
        ["one process", f"{one:.3f}", "", ""],
        ["two processes", f"{two:.3f}", f"{one / two:.2f}", f"{one / (2 * two):.0%}"],
        ["two processes, gradients not averaged", f"{apart:.3f}", f"{one / apart:.2f}", f"{one / (2 * apart):.0%}"],
    ]
    return (
        f"Least of {STEPS} steps, wall-clock; compact SAM, {SIDE} px, {BATCH_SIZE} images in all, one thread per "
        f"process, gloo; {provenance(torch.device('cpu'))}.\n\n"
        + table(["", "seconds per step", "times faster", "efficiency"], rows)
        + f"\n\nBytes given to the all-reduce per step and process: {megabytes[0]:.3f} MB measured, "
        f"{megabytes[1]:.3f} MB by the cost model. GPUs: not measured."
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="time one process beside two")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="put the tables on top of benchmarks/results.md")
    a = parser.parse_args()
    if a.worker:
        if found := work(BATCH_SIZE):
            print(json.dumps(found))
        return
    text = (
        f"Cost model, bf16 arithmetic at {GPU_FLOPS / 1e12:.0f} TFLOP/s per GPU, frozen prefix cached, encoder alone "
        "(assumptions in the script); after the semicolon: images per GPU and step at which averaging the gradients "
        f"takes a tenth of the arithmetic's time or less.\n\n{cost_model()}\n"
    )
    if a.measure:
        text += f"\n{measured()}\n"
    print(text)
    if a.write:
        record("Training in several processes", text)


if __name__ == "__main__":
    main()
