import pytest
import torch

from fewshot_ext.models import DropBlock

pytestmark = pytest.mark.usefixtures("one_thread")


def dropped(output):
    return output == 0


def blocks_by_hand(starts, block, height, width):
    """Marks the block behind every start, one position after the other."""
    marked = torch.zeros(height, width, dtype=torch.bool)
    for row, column in starts.nonzero().tolist():
        marked[row : row + block, column : column + block] = True
    return marked


@pytest.mark.parametrize(("height", "width", "block"), [(10, 10, 5), (7, 9, 3), (5, 5, 5), (6, 4, 1)])
def test_blocks_lie_where_their_starts_say(height, width, block):
    drop = DropBlock(0.3, block, ramp_steps=0).train()
    torch.manual_seed(0)
    output = drop(torch.ones(4, 3, height, width))
    torch.manual_seed(0)
    valid = height - block + 1, width - block + 1
    gamma = 0.3 / block**2 * height * width / (valid[0] * valid[1])
    starts = torch.rand(4, 3, *valid) < gamma
    assert starts.any()
    for image in range(4):
        for channel in range(3):
            expected = blocks_by_hand(starts[image, channel], block, height, width)
            assert torch.equal(dropped(output[image, channel]), expected)


@pytest.mark.parametrize(("block", "least"), [(1, 0.199), (3, 0.17), (5, 0.17), (10, 0.19)])
def test_the_dropped_share_is_the_rate_but_for_overlap(block, least):
    torch.manual_seed(1)
    share = dropped(DropBlock(0.2, block, ramp_steps=0).train()(torch.ones(256, 64, 10, 10))).double().mean().item()
    assert least < share < 0.205


def test_the_mean_of_what_is_kept_stays():
    torch.manual_seed(2)
    output = DropBlock(0.4, 3, ramp_steps=0).train()(torch.ones(8, 16, 9, 9))
    assert output.mean().item() == pytest.approx(1.0, rel=1e-5)
    assert output.unique().numel() == 2


def test_a_block_larger_than_the_map_drops_whole_channels():
    torch.manual_seed(3)
    output = DropBlock(0.5, 7, ramp_steps=0).train()(torch.ones(16, 64, 3, 2))
    share = dropped(output).flatten(2).double().mean(2)
    assert ((share == 0) | (share == 1)).all()
    assert share.mean().item() == pytest.approx(0.5, abs=0.05)


def test_evaluation_and_rate_zero_are_the_identity():
    features = torch.randn(2, 3, 5, 5)
    assert DropBlock(0.5).eval()(features) is features
    assert DropBlock(0.0).train()(features) is features


def test_everything_dropped_gives_zeros():
    torch.manual_seed(0)
    outputs = torch.stack([DropBlock(0.99, 1, ramp_steps=0).train()(torch.ones(1, 1, 1, 1)) for _ in range(20)])
    assert outputs.isfinite().all()
    assert (outputs == 0).any()


def test_the_rate_grows_over_the_ramp_and_only_in_training():
    drop = DropBlock(0.5, 1, ramp_steps=4)
    torch.manual_seed(4)
    features = torch.ones(64, 64, 8, 8)
    shares = []
    for _ in range(6):
        drop.eval()(features)
        shares.append(dropped(drop.train()(features)).double().mean().item())
    assert shares == pytest.approx([0, 0.125, 0.25, 0.375, 0.5, 0.5], abs=0.01)
    assert drop.steps.item() == 6


def test_a_checkpoint_carries_the_ramp():
    drop = DropBlock(0.5, ramp_steps=10).train()
    for _ in range(3):
        drop(torch.ones(1, 1, 6, 6))
    resumed = DropBlock(0.5, ramp_steps=10)
    resumed.load_state_dict(drop.state_dict())
    assert resumed.steps.item() == 3


def test_gradients_pass_where_features_do():
    torch.manual_seed(5)
    features = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    output = DropBlock(0.4, 2, ramp_steps=0).train()(features)
    output.sum().backward()
    scale = (output / features).detach()
    torch.testing.assert_close(features.grad, scale)
    assert (features.grad == 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_and_layout_stay(dtype):
    features = torch.randn(2, 3, 6, 6).to(dtype).to(memory_format=torch.channels_last)
    output = DropBlock(0.3, 3, ramp_steps=0).train()(features)
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_compiles_without_graph_breaks():
    drop = DropBlock(0.3, 2, ramp_steps=10).train()
    compiled = torch.compile(drop, fullgraph=True, backend="aot_eager")
    features = torch.randn(2, 3, 6, 6)
    for _ in range(3):
        assert compiled(features).shape == features.shape
    assert drop.steps.item() == 3


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rate", {"rate": 1.0}),
        ("block_size", {"rate": 0.1, "block_size": 0}),
        ("ramp_steps", {"rate": 0.1, "ramp_steps": -1}),
    ],
)
def test_bad_settings_are_named(name, arguments):
    with pytest.raises(ValueError, match=name):
        DropBlock(**arguments)
