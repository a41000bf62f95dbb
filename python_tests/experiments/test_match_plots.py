"""The picture of a match: what it shows, and what it refuses."""

import pytest
import torch

from fewshot_ext.experiments.match_plots import MatchedPair, _heat_map, plot_match, plot_matches, square_regions
from fewshot_ext.models import match_flows

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(nodes=4):
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, nodes, 6, generator=generator)
    images = (torch.rand(2, 3, 12, 16, generator=generator) * 255).byte()
    return images[0], images[1], maps[0], maps[1]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, instead of files."""
    from matplotlib.figure import Figure

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: saved.append(figure))
    return saved


def test_square_regions_cover_the_image():
    regions = square_regions(4, 12, 16)
    assert regions.tolist() == [[0, 0, 8, 6], [8, 0, 16, 6], [0, 6, 8, 12], [8, 6, 16, 12]]


def test_writes_a_picture_of_a_column(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    query, support, query_map, support_map = pair()
    match = plot_match(query, support, query_map, support_map, tmp_path / "match.png")
    for found, expected in zip(match, match_flows(query_map, support_map), strict=True):
        assert torch.equal(found, expected)
    width, height = image_module.open(tmp_path / "match.png").size
    assert width == 680 and 600 < height < 1000


def test_shows_the_strongest_flows_and_their_shares(figures):
    query, support, query_map, support_map = pair(nodes=9)
    match = plot_match(query, support, query_map, support_map, "unused.png", flows=3)
    shares = (match.flow / 9).flatten().topk(3)
    figure = figures[0]
    labels = [artist.get_text() for artist in figure.artists if hasattr(artist, "get_text")]
    expected = [f"{100 * share:.0f}" for share in shares.values.flip(0).tolist() for _ in range(2)]
    assert labels == expected
    boxes = [[rectangle.get_bbox().bounds for rectangle in axis.patches] for axis in figure.axes[:2]]
    for rank, place in enumerate(shares.indices.flip(0).tolist()):
        for side, index in enumerate(divmod(place, 9)):
            left, top, right, bottom = square_regions(9, 12, 16)[index].tolist()
            assert boxes[side][rank] == pytest.approx((left - 0.5, top - 0.5, right - left, bottom - top), rel=1e-5)


def test_no_line_for_what_does_not_move(figures):
    image, features = torch.rand(1, 8, 8), torch.eye(4)
    plot_match(image, image, features, features, "unused.png", flows=50)
    assert len(figures[0].axes[0].patches) == 4


def test_equal_weights_have_a_scale(figures):
    query, support, query_map, support_map = pair()
    plot_match(query, support, query_map, support_map, "unused.png", weighting="uniform")
    assert figures[0].axes[4].get_xlim() == (0.0, 1.0)


def test_heat_map_averages_the_regions_over_a_pixel():
    regions = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 4.0, 2.0]])
    heat = _heat_map(torch.zeros(3, 4, 3), regions, torch.tensor([0.5, 1.5]))
    torch.testing.assert_close(heat[:2], torch.tensor([[0.5, 1.0, 1.5, 1.5]] * 2, dtype=torch.float64))
    assert heat[2].isnan().all()


def test_several_pairs_share_one_scale(figures):
    pairs = [MatchedPair(*pair(), title=f"pair {k}") for k in range(3)]
    matches = plot_matches(pairs, "unused.png", flows=2, columns=2)
    for match in matches:
        assert torch.equal(match.flow, match_flows(*pair()[2:]).flow)
    axes = figures[0].axes
    assert len(axes) == 3 * 4 + 1
    weights = torch.cat([matches[0].query_weight, matches[0].support_weight])
    assert axes[0].get_xlim() == pytest.approx((weights.min().item(), weights.max().item()), rel=1e-5)
    above = figures[0].subfigs[0].subfigs
    assert [block.get_suptitle() for block in above[:3]] == ["pair 0", "pair 1", "pair 2"]
    assert [len(block.axes[0].patches) for block in above[:3]] == [2, 2, 2]


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([], {}, "pairs: expected at least one pair, got none"),
        ([MatchedPair(*pair())], {"columns": 0}, "columns: expected at least 1"),
        ([MatchedPair(*pair())], {"flows": 0}, "flows: expected at least 1"),
        (
            [MatchedPair(*pair()), MatchedPair(*pair()[:3], torch.rand(4, 9))],
            {},
            "support_map: expected the 6 channels",
        ),
    ],
)
def test_bad_pairs_are_named_and_nothing_is_written(pairs, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot_matches(pairs, tmp_path / "matches.png", **options)
    assert not list(tmp_path.iterdir())


IMAGE, MAP = torch.zeros(3, 8, 8), torch.rand(4, 6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query_image": [1]}, TypeError, "query_image: expected a tensor, got list"),
        ({"query_image": IMAGE[0]}, ValueError, r"query_image: expected shape \[C, H, W\] .* got \[8, 8\]"),
        ({"support_image": torch.zeros(2, 8, 8)}, ValueError, "support_image: expected .* one or three channels"),
        ({"support_image": IMAGE.int()}, TypeError, "support_image: expected uint8 or floating-point, got torch.int32"),
        ({"support_image": IMAGE + 7}, ValueError, r"support_image: expected a number in \[0, 1\], got 7 to 7"),
        ({"query_map": None}, TypeError, "query_map: expected a floating-point tensor, got NoneType"),
        ({"query_map": MAP[None]}, ValueError, r"query_map: expected shape \[N, C\], got \[1, 4, 6\]"),
        ({"support_map": MAP[:, :5]}, ValueError, "support_map: expected the 6 channels of query_map, got 5"),
        ({"support_map": MAP[:3]}, ValueError, "regions: expected a value for 3 local features"),
        ({"support_map": MAP[:0]}, ValueError, "regions: expected a value for 0 local features"),
        ({"query_map": MAP * float("nan")}, ValueError, "query_map: expected finite entries, got NaN"),
        ({"query_regions": torch.zeros(3, 4)}, ValueError, r"query_regions: expected shape \[4, 4\], got \[3, 4\]"),
        ({"support_regions": torch.zeros(4, 4)}, ValueError, r"support_regions: expected an area, got \[0.0, 0.0, 0"),
        ({"query_regions": torch.full((4, 4), float("nan"))}, ValueError, "query_regions: expected an area, got .nan"),
        ({"query_regions": [0]}, TypeError, "query_regions: expected a tensor, got list"),
        ({"flows": 0}, ValueError, "flows: expected at least 1, got 0"),
        ({"weighting": "norm"}, ValueError, "weighting: expected one of cross_reference, uniform"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(changes, error, message, tmp_path):
    arguments = {"query_image": IMAGE, "support_image": IMAGE, "query_map": MAP, "support_map": MAP, **changes}
    with pytest.raises(error, match=message):
        plot_match(**arguments, path=tmp_path / "match.png")
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_is_named(monkeypatch):
    from fewshot_ext import _extras

    monkeypatch.setattr(_extras, "is_installed", lambda module: module != "matplotlib")
    with pytest.raises(ImportError, match=r"'matplotlib' is missing; pip install 'fewshot_ext\[train\]'"):
        plot_match(IMAGE, IMAGE, MAP, MAP, "match.png")
