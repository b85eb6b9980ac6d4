"""What each of two processes does in test_distributed.py; the name of a task is the first argument."""

import copy
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dinov3geo.backbones.card import Normalization
from dinov3geo.backbones.variants import build_vit
from dinov3geo.cli import main as command_line
from dinov3geo.data.crops import CropBatch, CropMaker, CropSettings, Share
from dinov3geo.data.masking import MaskSettings
from dinov3geo.data.mixture import MixedChips
from dinov3geo.training.distiller import distill
from dinov3geo.training.distributed import World, open_world, whole
from dinov3geo.training.optimizer import OptimizerSettings, build_optimizer, clip_per_module, set_rates
from dinov3geo.training.parallel import ParallelSettings, StudentCall, prepare
from dinov3geo.training.projection import ProjectionSettings
from dinov3geo.training.settings import DistillSettings, TrainSettings
from dinov3geo.training.ssl import GramSettings, LossSettings, SelfSupervisedRecipe
from dinov3geo.training.trainer import pretrain

RGB = Normalization(("red", "green", "blue"), (1 / 255,) * 3, (0.0,) * 3, (0.4,) * 3, (0.2,) * 3)
HEAD = ProjectionSettings(hidden=32, bottleneck=16, prototypes=24, prototype_std=0.25)
WEIGHTS = {"dino_global": 0.25, "dino_local": 0.75, "ibot": 1.0, "koleo": 0.1, "gram": 2.0}


def crops(seed: int, share: Share | None = None) -> CropBatch:
    """The crops of 8 images with holes, or of this process's half of them."""
    maker = CropMaker(
        CropSettings(global_size=64, local_size=32, local_count=3, gram_size=96),
        MaskSettings(),
        RGB,
        patch_size=16,
        nadir=True,
    )
    generator = torch.Generator().manual_seed(seed)
    chips = torch.randint(0, 256, (8, 3, 80, 80), dtype=torch.uint8, generator=generator)
    valid = torch.ones(8, 80, 80, dtype=torch.bool)
    valid[::3, :30] = False
    share = share or Share()
    return maker(share.of(chips), share.of(valid), seed=seed, share=share)


def build(world: World | None = None) -> SelfSupervisedRecipe:
    torch.manual_seed(0)
    backbone = build_vit("vit_tiny", layer_scale=0.1)
    del backbone.blocks[2:]
    anchor = copy.deepcopy(backbone)
    torch.nn.init.normal_(anchor.register_tokens)
    recipe = SelfSupervisedRecipe(
        backbone,
        LossSettings(dino_head=HEAD, ibot_head=HEAD),
        GramSettings(refresh_every=2, max_refreshes=1),
        anchor=anchor,
        group=None if world is None else world.group,
    )
    return recipe.train()


def backward(
    recipe: SelfSupervisedRecipe, call: StudentCall, batch: CropBatch, *, parts: int = 1, koleo: float = 0.1
) -> dict[str, torch.Tensor]:
    targets = recipe.targets(batch, teacher_temperature=0.05, parts=parts)
    size = batch.global_crops.shape[1] // parts
    sums: dict[str, torch.Tensor] = {}
    for part in range(parts):
        rows = slice(part * size, (part + 1) * size)
        torch.manual_seed(7)
        with call.gathering(last=part == parts - 1):
            terms = call(batch.of_images(rows), targets.of_images(rows, batch.patch_masks))
            loss = sum(value * (WEIGHTS | {"koleo": koleo})[name] for name, value in terms.items())
            (loss / parts).backward()
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value.detach() / parts
    return sums


def gradients(recipe: SelfSupervisedRecipe) -> dict[str, torch.Tensor]:
    return {n: whole(p.grad) for n, p in recipe.student.named_parameters() if p.grad is not None}


def assert_near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        difference = float((value - other[name]).abs().max())
        # The mask token is zero at first, so that a norm makes its gradient hundreds of times larger.
        allowed = tolerance * max(1.0, float(value.abs().max()))
        assert difference <= allowed, f"{name}: {difference:g} > {allowed:g}"


def losses_and_gradients(world: World) -> None:
    """Two processes with half of the images each against one with all, in both layouts."""
    alone = build()
    expected = backward(alone, StudentCall(alone.student_pass), crops(3))
    for layout, parts in (("replicate", 1), ("shard", 1), ("replicate", 2), ("shard", 2)):
        recipe = build(world)
        call = prepare(recipe, ParallelSettings(layout=layout), world, precision="float32")
        if parts == 2:  # neighbours of KoLeo are sought within a part
            alone.zero_grad()
            expected = backward(alone, StudentCall(alone.student_pass), crops(3), koleo=0.0)
        own = crops(3, world.share)
        terms = backward(recipe, call, own, parts=parts, koleo=0.1 if parts == 1 else 0.0)
        means = {name: world.mean(value) for name, value in terms.items()}
        if parts == 2:
            del means["koleo"], expected["koleo"]
        assert_near(means, expected, 1e-6)
        assert_near(gradients(recipe), gradients(alone), 1e-6)


def five_steps(world: World) -> None:
    """Shards against replicas, with clipping, moving average and renewed anchor."""
    results = {}
    for layout in ("replicate", "shard"):
        recipe = build(world)
        call = prepare(recipe, ParallelSettings(layout=layout, recompute="full"), world, precision="float32")
        optimizer = build_optimizer(recipe.student, OptimizerSettings(clip_norm=0.5))
        for step in range(5):
            set_rates(optimizer, lr=1e-3, weight_decay=0.04, freeze_last_layer=False)
            optimizer.zero_grad()
            backward(recipe, call, crops(step, world.share))
            clip_per_module(recipe.student.named_children(), 0.5)
            optimizer.step()
            recipe.after_step(step, momentum=0.9)
        assert recipe.num_refreshes == 1
        results[layout] = {name: whole(tensor) for name, tensor in recipe.state_dict().items()}
    assert_near(results["replicate"], results["shard"], 1e-5)
    moved = build().state_dict()["student.backbone.cls_token"]
    assert float((results["shard"]["student.backbone.cls_token"] - moved).abs().max()) > 1e-4


def record_chips(folder: Path) -> None:
    """From now on every process that reads chips writes down which, in a file of its own."""
    read = MixedChips.__getitem__

    def recorded(self: MixedChips, address: tuple[int, Sequence[object]]) -> object:
        with (folder / f"{os.environ['RANK']}_{os.getpid()}.txt").open("a") as file:
            file.write(f"{address}\n")
        return read(self, address)

    MixedChips.__getitem__ = recorded


def start(*arguments: str, processes: int = 2) -> list[subprocess.Popen[str]]:
    """Processes as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    return [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def finish(processes: Sequence[subprocess.Popen[str]]) -> None:
    answers = [process.communicate(timeout=600)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(answers)[-3000:]


def main() -> None:
    torch.set_num_threads(1)
    task = sys.argv[1]
    if task == "pretrain":
        settings = TrainSettings.model_validate_json(Path(sys.argv[2]).read_text())
        pretrain(settings, out=Path(sys.argv[3]), resume=True)
        return
    if task == "distill":
        students = DistillSettings.model_validate_json(Path(sys.argv[2]).read_text())
        distill(students, out=Path(sys.argv[3]), resume=True)
        return
    if task == "command":
        record_chips(Path(sys.argv[2]))
        raise SystemExit(command_line(sys.argv[3:]))
    with open_world(torch.device("cpu")) as world:
        assert world.size == 2
        {"losses_and_gradients": losses_and_gradients, "five_steps": five_steps}[task](world)


if __name__ == "__main__":
    main()
