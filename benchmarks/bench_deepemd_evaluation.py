"""The whole evaluation of DeepEMD on the CPU, at the size of the paper: how long 5000 episodes take.

    python benchmarks/bench_deepemd_evaluation.py

The novel classes of mini-ImageNet, 20 of 600 images, as a ResNet-12 sees them at 84 x 84: maps of 5 x 5 with 640
channels. Features are extracted once and every episode takes them from memory. Some images pass through the network
(with random weights) and their time is scaled to all 12,000. Matching is timed whole, on random maps with a pattern for
each class: 5-way 1-shot with 15 queries a class, 375 transport problems an episode. Of the structured layer for 5-shot,
100 passes over the support set of every episode, fewer episodes are timed.
"""

import sys
import time
from collections.abc import Callable

import harness
import torch
from torch import Tensor

from fewshot_ext.data import Episodes, sample_episodes
from fewshot_ext.evaluation import episode_accuracies
from fewshot_ext.heads import choose_head
from fewshot_ext.models import BackboneConfig, build_backbone

CLASSES, IMAGES, REGIONS, CHANNELS, PIXELS = 20, 600, 25, 640, 84
WAY, QUERIES = 5, 15
HEADER = ["step", "timed", "seconds", "of the whole", "seconds of the whole"]


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def novel_maps(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Maps ``[12000, 25, 640]``, rectified as a network's, and their classes."""
    labels = torch.arange(CLASSES).repeat_interleave(IMAGES)
    pattern = torch.randn(CLASSES, 1, CHANNELS, generator=generator)
    maps = torch.randn(len(labels), REGIONS, CHANNELS, generator=generator)
    for label in range(CLASSES):
        maps[labels == label] += 0.2 * pattern[label]
    return maps.relu_(), labels


def extraction(images: int) -> float:
    backbone = build_backbone(BackboneConfig("resnet12")).eval()
    batch = torch.rand(min(images, 32), 3, PIXELS, PIXELS)
    with torch.inference_mode():
        backbone.feature_map(batch)
        return sum(seconds(lambda: backbone.feature_map(batch)) for _ in range(images // len(batch)))


def matching(maps: Tensor, episodes: Episodes) -> float:
    head = choose_head("deepemd").head
    few = Episodes(*(part[:2] for part in (episodes.support, episodes.query, episodes.classes)))
    with torch.inference_mode():
        episode_accuracies(maps, few, head=head)
        return seconds(lambda: episode_accuracies(maps, episodes, head=head))


def main() -> None:
    options = harness.parser(__doc__.splitlines()[0], results="deepemd_evaluation_cpu", in_turns=False)
    options.add_argument("--images", type=int, default=128, help="that pass through the network, in batches of 32")
    options.add_argument("--episodes", type=int, default=5000, help="1-shot")
    options.add_argument("--structured_episodes", type=int, default=20, help="5-shot")
    options = options.parse_args()
    for name, least in (("images", 32), ("episodes", 1), ("structured_episodes", 1)):
        if getattr(options, name) < least:
            sys.exit(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    torch.set_num_threads(options.threads)
    machine, generator = harness.machine(), torch.Generator().manual_seed(0)
    maps, labels = novel_maps(generator)
    images = options.images // 32 * 32
    steps = [("features of images", images, CLASSES * IMAGES, extraction(images))]
    for shot, count, whole in ((1, options.episodes, 5000), (5, options.structured_episodes, 600)):
        episodes = sample_episodes(labels, count, way=WAY, shot=shot, queries=QUERIES, generator=generator)
        steps.append((f"{shot}-shot episodes", count, whole, matching(maps, episodes)))
    rows, table = [], []
    for step, timed, whole, taken in steps:
        scaled = taken * whole / timed
        rows.append(
            {"step": step, "timed": timed, "seconds": f"{taken:.3f}", "whole": whole, "whole_seconds": f"{scaled:.1f}"}
            | machine
        )
        table.append([step, timed, harness.significant(taken), whole, harness.significant(scaled)])
    text = (
        f"`{harness.command()}` on {machine['device']}, threads: {machine['threads']}, torch {machine['torch']}; "
        f"ResNet-12 at {PIXELS} x {PIXELS}, maps of 5 x 5 x {CHANNELS}, {WAY}-way, {QUERIES} queries a class, float32. "
        "5-shot with the structured layer, 100 passes.\n\n" + harness.markdown_table(HEADER, table)
    )
    harness.report(text, rows, options.save)


if __name__ == "__main__":
    main()
