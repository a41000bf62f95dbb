"""The experiments of the papers, one command each, and a look at what DeepEMD matches.

"margins" trains backbones over margins and measures them; other commands look at those backbones, or train more. Each
writes its numbers as JSON and CSV and a picture, takes over what is already trained, and goes on where it was
interrupted. "collapse" trains embeddings with and without the Anti-Collapse term. "matches" draws the regions of two
images that DeepEMD matches, for the backbone of any checkpoint. All others are of the negative-margin paper.
"""

from fewshot_ext.commands.analyze import (
    angles,
    collapse,
    finetuning_margin,
    label_distribution,
    label_smoothing,
    losses,
    margins,
    matches,
    regularizers,
    shots,
    tsne,
    variance,
)

SUMMARY = "the experiments of the negative-margin and Anti-Collapse papers, the matches of DeepEMD"

COMMANDS = {
    "margins": margins,
    "variance": variance,
    "losses": losses,
    "angles": angles,
    "label-distribution": label_distribution,
    "regularizers": regularizers,
    "label-smoothing": label_smoothing,
    "tsne": tsne,
    "shots": shots,
    "finetuning-margin": finetuning_margin,
    "collapse": collapse,
    "matches": matches,
}
