"""``fewshot-ext retrieve --rerank``: the second stage, what it writes, draws and leaves behind when it ends early."""

import csv
import json

import pytest
import torch
from PIL import Image
from retrieve_cases import few_digits, run

from fewshot_ext.cli import main
from fewshot_ext.commands import retrieve
from fewshot_ext.data import Split, load_digits
from fewshot_ext.evaluation import FrozenBackbone
from fewshot_ext.models import FCN, BackboneConfig, EmbeddedBackbone, LocalFeaturesConfig, load_network
from fewshot_ext.retrieval import nearest_neighbors, rerank, retrieve_and_rerank
from fewshot_ext.retrieval import pictures as retrieval_images
from fewshot_ext.training import MetricTrainingConfig, MetricTrainingRun

# The command sets the number of threads of the process; the fixture sets it back.
pytestmark = pytest.mark.usefixtures("one_thread")


def test_reranked_results_are_those_of_python(with_regions, tmp_path, capsys):
    images, labels = few_digits(tmp_path / "few.npz")
    settings = ["--local_features.pyramid", "[1]", "--weighting", "uniform", "--map_dtype", "float16"]
    arguments = ["--data", str(tmp_path / "few.npz"), "--no_nmi", "--ks", "1", "3", "--rerank", "25", *settings]
    assert run(with_regions, tmp_path / "a", *arguments) == 0
    found = retrieve_and_rerank(
        images,
        labels,
        FrozenBackbone.from_checkpoint(with_regions),
        candidates=25,
        ks=(1, 3),
        weighting="uniform",
        local_features=LocalFeaturesConfig(pyramid=(1,)),
        map_dtype=torch.float16,
    )
    record = json.loads((tmp_path / "a" / "retrieval.json").read_text())
    measures = record["measures"]
    for k in (1, 3):
        assert measures[f"recall_at_{k}"] == pytest.approx(found.before[k])
        assert measures[f"recall_at_{k}_reranked"] == pytest.approx(found.after[k])
    assert found.before != found.after
    assert record["rerank"] == {
        "candidates": 25,
        "local_features": {"name": "fcn", "pyramid": [1]},
        "weighting": "uniform",
        "map_dtype": "float16",
    }
    (row,) = csv.DictReader((tmp_path / "a" / "retrieval.csv").open())
    assert row["rerank"] == "25"
    assert float(row["recall_at_3_reranked"]) == measures["recall_at_3_reranked"]
    lines = capsys.readouterr().out.splitlines()
    for title, recall in (("embeddings", found.before), ("25 re-ranked", found.after)):
        line = next(line for line in lines if line.startswith(title))
        assert line.removeprefix(title).split()[::2][:2] == [f"{100 * recall[k]:.2f}" for k in (1, 3)]

    rows = list(csv.DictReader((tmp_path / "a" / "neighbors.csv").open()))
    assert [row["neighbor_class"] for row in rows] == [str(labels[i].item()) for i in found.reranked[:, :8].flatten()]
    before = found.candidates.tolist()
    for query in (0, 99):
        places = [1 + before[query].index(i) for i in found.reranked[query, :8].tolist()]
        assert [int(row["rank_by_embedding"]) for row in rows[8 * query : 8 * query + 8]] == places

    config = ["--config", str(tmp_path / "a" / "config.yaml"), "--output", str(tmp_path / "b")]
    assert main(["retrieve", *config]) == 0
    assert json.loads((tmp_path / "b" / "retrieval.json").read_text())["measures"] == measures


def test_the_picture_of_reranked_neighbors_says_so(with_regions, tmp_path, monkeypatch):
    few_digits(tmp_path / "few.npz")
    captions, draw = [], retrieval_images.contact_sheet

    def contact_sheet(images, texts, **options):
        captions.extend(texts)
        return draw(images, texts, **options)

    monkeypatch.setattr(retrieval_images, "contact_sheet", contact_sheet)
    arguments = ["--data", str(tmp_path / "few.npz"), "--no_nmi", "--rows", "2", "--neighbors", "2", "--ks", "1"]
    assert run(with_regions, tmp_path / "one", *arguments) == 0
    assert not any("was" in caption for caption in captions)
    captions.clear()
    assert run(with_regions, tmp_path / "two", *arguments, "--rerank", "9") == 0
    rows = list(csv.DictReader((tmp_path / "two" / "neighbors.csv").open()))
    told = {f", was {row['rank_by_embedding']}\n{row['neighbor_class']}" for row in rows}
    # The picture of the first stage is drawn before the second begins.
    assert len(captions) == 12
    assert not any("was" in caption for caption in captions[:6])
    del captions[:6]
    assert all(caption[5:] in told for caption in captions if not caption.startswith("query"))
    sizes = [Image.open(tmp_path / name / "neighbors.png").size for name in ("one", "two")]
    # A heading above the rows, no wider than they are.
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] < sizes[1][1]


@pytest.mark.parametrize("regions", ["fcn", "grid", "sampling"])
def test_pictures_in_folders_are_reranked(regions, with_regions, folders, tmp_path):
    arguments = ["--query", str(folders / "query"), "--gallery", str(folders / "gallery"), "--no_nmi"]
    settings = ["--rerank", "12", "--local_features.name", regions, "--batch_size", "20"]
    assert run(with_regions, tmp_path, *arguments, *settings) == 0
    backbone = FrozenBackbone.from_checkpoint(with_regions)
    query, gallery = (
        retrieve.LabeledImages.of_folder(folders / name).in_memory(backbone, lambda count: None)
        for name in ("query", "gallery")
    )
    assert len(query) == 6 and gallery.images.shape == (18, 1, 8, 8)
    labels = retrieve.common_labels(query, gallery)
    config = LocalFeaturesConfig(regions)
    found = retrieve_and_rerank(
        query.images, labels[0], backbone, gallery.images, labels[1], candidates=12, local_features=config
    )
    measures = json.loads((tmp_path / "retrieval.json").read_text())["measures"]
    assert measures["recall_at_1_reranked"] == pytest.approx(found.after[1])
    rows = list(csv.DictReader((tmp_path / "neighbors.csv").open()))
    assert [row["neighbor"] for row in rows] == [gallery.names[i] for i in found.reranked[:, :8].flatten()]


def test_a_projection_counts_in_the_first_stage_alone(tmp_path):
    digits = load_digits().subset(Split.BASE)
    config = MetricTrainingConfig(
        epochs=1,
        classes_per_batch=3,
        samples_per_class=8,
        backbone=BackboneConfig(width=4, pooled_blocks=2, embedding=3),
    )
    MetricTrainingRun(config, digits, tmp_path / "trained").train()
    path = tmp_path / "trained" / "last.ckpt"
    images, labels = few_digits(tmp_path / "few.npz")
    arguments = ["--data", str(tmp_path / "few.npz"), "--no_nmi", "--rerank", "30"]
    assert run(path, tmp_path / "out", *arguments) == 0
    extractor = load_network(path)
    assert isinstance(extractor.backbone, EmbeddedBackbone)
    with torch.inference_mode():
        embeddings = extractor(images)
        maps = FCN(extractor.backbone, preprocessing=extractor.preprocessing).eval()(images)
    assert embeddings.shape == (100, 3) and maps.shape == (100, 4, 4)
    found = nearest_neighbors(embeddings, k=30)
    ordered = rerank(maps, maps, found)
    measures = json.loads((tmp_path / "out" / "retrieval.json").read_text())["measures"]
    for name, order in (("recall_at_1", found), ("recall_at_1_reranked", ordered)):
        assert measures[name] == pytest.approx((labels[order[:, 0]] == labels).double().mean().item())


def test_progress_has_a_bar_for_each_stage(with_regions, folders, tmp_path, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, *, total, desc, unit):
            self.total, self.desc, self.n, self.closed = total, desc, 0, False
            bars.append(self)

        def update(self, count):
            self.n += count

        def close(self):
            self.closed = True

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.close()

    monkeypatch.setattr(retrieve, "progress_bar", Bar)
    arguments = ["--query", str(folders / "query"), "--gallery", str(folders / "gallery"), "--no_nmi", "--rerank", "8"]
    assert run(with_regions, tmp_path, *arguments) == 0
    stages = [(bar.desc, bar.total) for bar in bars]
    assert stages[:3] == [("reading pictures", 24), ("embedding", 24), ("searching", 6)]
    assert stages[3:] == [("maps", 6), ("maps", 18), ("matching", 6)]
    assert all(bar.n == bar.total and bar.closed for bar in bars)


@pytest.mark.parametrize(
    ("error", "code", "ending"),
    [
        (KeyboardInterrupt(), 130, "interrupted before everything was measured"),
        (
            ValueError("query_maps: expected finite entries"),
            1,
            "fewshot-ext retrieve: error: query_maps: expected finite entries",
        ),
    ],
)
def test_what_ends_the_second_stage_leaves_the_first(error, code, ending, with_regions, tmp_path, monkeypatch, capsys):
    few_digits(tmp_path / "few.npz")
    arguments = ["--data", str(tmp_path / "few.npz"), "--no_nmi"]
    assert run(with_regions, tmp_path / "plain", *arguments) == 0
    plain = capsys.readouterr().out

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(retrieve, "retrieve_and_rerank", broken)
    assert run(with_regions, tmp_path / "out", *arguments, "--rerank", "8") == code
    printed = capsys.readouterr()
    assert printed.err == f"{ending}; what was written are the results without --rerank\n"
    assert printed.out == plain.replace(str(tmp_path / "plain"), str(tmp_path / "out"))
    for name in ("retrieval.csv", "neighbors.csv", "neighbors.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    records = [json.loads((tmp_path / name / "retrieval.json").read_text()) for name in ("plain", "out")]
    assert records[0].pop("seconds") >= 0 and records[1].pop("seconds") >= 0
    assert records[0] == records[1]

    # The record of the settings is that of the whole search, which it repeats.
    monkeypatch.undo()
    again = ["--config", str(tmp_path / "out" / "config.yaml"), "--output", str(tmp_path / "again")]
    assert main(["retrieve", *again]) == 0
    assert json.loads((tmp_path / "again" / "retrieval.json").read_text())["rerank"]["candidates"] == 8
