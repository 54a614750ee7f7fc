"""A field as a layer of a torch network: the bits of `Field.update`, and every refusal."""

import copy
import io
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

import dpnc
from dpnc.errors import (
    FieldError,
    FieldFormatError,
    OptimizerError,
    PointsError,
    StaleForwardError,
    TableError,
)
from tiers.errors import StoreForkedError

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

from dpnc.torch import HashGrid  # noqa: E402 - after the skip

ROOT = Path(__file__).resolve().parent.parent
GRID = dpnc.HashGrid(
    n_dims=2,
    n_levels=4,
    n_features_per_level=2,
    log2_hashmap_size=10,
    base_resolution=4,
    per_level_scale=2.0,
)


def new_field(path, dtype="float32", optimizer=dpnc.Adam(1e-2)):  # noqa: B008 - frozen
    return dpnc.create(path, GRID, dtype=dtype, budget="4MiB", optimizer=optimizer, seed=3)


@pytest.fixture
def field(tmp_path):
    with new_field(tmp_path / "field") as field:
        yield field


@pytest.fixture
def layer(field):
    return HashGrid(field)


def points(n=100, seed=0, dtype=torch.float32):
    return torch.rand((n, 2), generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_loop_takes_the_steps_of_field_update_bit_for_bit(tmp_path, dtype):
    with new_field(tmp_path / "a", dtype) as ours, new_field(tmp_path / "b", dtype) as plain:
        layer = HashGrid(ours)
        torch.manual_seed(0)
        mlp = torch.nn.Linear(layer.n_output_dims, 1)
        optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
        for step in range(5):
            parts = [points(64, 2 * step), points(32, 2 * step + 1, torch.float32)]
            gradients = []
            for x in parts:
                features = layer(x)
                assert (features.detach().numpy() == plain.query(x.numpy())).all()
                features.retain_grad()
                mlp(features).square().sum().backward()
                gradients.append(features.grad.numpy())
            assert layer.n_pending == 96
            layer.step()
            assert layer.n_pending == 0
            optimizer.step()
            optimizer.zero_grad()
            plain.update(np.concatenate([x.numpy() for x in parts]), np.concatenate(gradients))
            assert ours.digest() == plain.digest()
        assert ours.updates == 5


def test_points_in_double_precision_keep_it(layer, field):
    x = points(50, dtype=torch.float64)
    assert (layer(x).detach().numpy() == field.query(x.numpy())).all()


def test_it_learns_inside_a_sequence(field):
    layer = HashGrid(field)
    torch.manual_seed(1)
    net = torch.nn.Sequential(layer, torch.nn.Linear(layer.n_output_dims, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        x = points(256, step)
        loss = (net(x) - torch.sin(9 * x[:, :1])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        layer.step()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 20


def test_passes_up_to_different_levels_add_up(layer, field, tmp_path):
    x = points()
    with new_field(tmp_path / "other") as other:
        for levels in [(1,), (0, 2), (None, 1)]:
            grads = np.zeros((0, 8), np.float32)
            for level in levels:
                features = layer(x, max_level=level)
                assert (features.detach().numpy() == other.query(x, level)).all()
                features.backward(torch.ones((100, 8)))
                grad = np.ones((100, 8), np.float32)
                grad[:, 8 if level is None else 2 * (level + 1) :] = 0
                grads = np.concatenate([grads, grad])
            layer.step()
            other.update(np.concatenate([x.numpy()] * len(levels)), grads)
            assert field.digest() == other.digest()
    with pytest.raises(FieldError, match="max_level"):
        layer(x, max_level=4)


def test_the_rows_are_no_parameters(layer):
    assert list(layer.parameters()) == [] and list(layer.buffers()) == []
    assert "2-D" in repr(layer) and layer.n_input_dims == 2 and layer.n_output_dims == 8


def test_without_gradients_nothing_is_noted(layer, field):
    before = field.digest()
    with torch.no_grad():
        assert not layer(points()).requires_grad
    layer.step()
    layer(points()).sum()
    layer.step()
    assert field.updates == 0 and field.digest() == before


def test_zero_grad_forgets_what_waits(layer, field):
    layer(points()).sum().backward()
    assert layer.n_pending == 100
    layer.zero_grad()
    layer.step()
    assert layer.n_pending == 0 and field.updates == 0


@pytest.mark.parametrize("change", ["step", "update", "abort"])
def test_rows_that_changed_since_forward_are_an_error(layer, field, change):
    early = layer(points(seed=1))
    pending = layer(points(seed=2))
    if change == "step":
        layer(points(seed=3)).sum().backward()
        layer.step()
    elif change == "update":
        field.update(points().numpy(), np.ones((100, 8), np.float32))
    else:
        field.abort()
    before = field.digest()
    for stale in (early, pending):
        with pytest.raises(StaleForwardError, match="have changed"):
            stale.sum().backward()
    assert layer.n_pending == 0 and field.digest() == before


def test_rows_that_changed_between_backward_and_step_are_an_error(layer, field):
    layer(points()).sum().backward()
    field.abort()
    with pytest.raises(StaleForwardError):
        layer.step()
    layer.zero_grad()
    layer(points()).sum().backward()
    layer.step()
    assert field.updates == 1


def test_a_commit_in_between_changes_nothing(layer, field):
    features = layer(points())
    field.commit()
    features.sum().backward()
    layer.step()
    assert field.updates == 1


def test_a_gradient_that_is_not_finite_is_refused_and_can_be_forgotten(layer, field):
    before = field.digest()
    (layer(points()) * float("inf")).sum().backward()
    with pytest.raises(PointsError, match="not finite"):
        layer.step()
    assert field.digest() == before and field.updates == 0 and layer.n_pending == 100
    layer.zero_grad()
    layer(points()).sum().backward()
    layer.step()
    assert field.updates == 1


def test_points_that_were_written_to_since_are_noticed_by_torch(layer):
    x = points()
    features = layer(x)
    x.mul_(0.5)
    with pytest.raises(RuntimeError, match="inplace operation"):
        features.sum().backward()


def test_what_waits_is_a_copy(layer, field, tmp_path):
    x = points()
    grad = torch.ones((100, 8))
    layer(x).backward(grad)
    x.fill_(2.0)
    grad.fill_(float("nan"))
    layer.step()
    with new_field(tmp_path / "other") as other:
        other.update(points().numpy(), np.ones((100, 8), np.float32))
        assert other.digest() == field.digest()


def test_a_graph_that_is_kept_counts_twice(layer, field, tmp_path):
    features = layer(points())
    features.sum().backward(retain_graph=True)
    features.sum().backward()
    assert layer.n_pending == 200
    layer.step()
    with new_field(tmp_path / "other") as other:
        x = points().numpy()
        other.update(np.concatenate([x, x]), np.ones((200, 8), np.float32))
        assert other.digest() == field.digest()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (torch.zeros((3, 2), dtype=torch.float16), "float16"),
        (torch.zeros((3, 2), dtype=torch.int64), "int64"),
        (torch.zeros((3, 3)), "shape"),
        (torch.full((3, 2), 1.5), "1.5"),
        (torch.full((3, 2), float("nan")), "nan"),
        (torch.zeros((3, 2), requires_grad=True), "detach"),
        ([[0.5, 0.5]], "list"),
    ],
)
def test_points_are_refused_by_name(layer, wrong, named):
    with pytest.raises(PointsError, match=named):
        layer(wrong)


def test_an_empty_batch_is_fine(layer, field):
    features = layer(torch.zeros((0, 2)))
    assert features.shape == (0, 8)
    features.sum().backward()
    layer.step()
    assert field.updates == 0


def test_what_is_no_field_is_refused(tmp_path):
    with pytest.raises(FieldError, match="str"):
        HashGrid("field")


def test_a_field_that_cannot_learn_gives_features_without_a_gradient(tmp_path):
    with new_field(tmp_path / "still", optimizer=None) as still:
        assert not HashGrid(still)(points()).requires_grad
    new_field(tmp_path / "field").close()
    with dpnc.open(tmp_path / "field", budget="4MiB", read_only=True) as read:
        layer = HashGrid(read)
        mlp = torch.nn.Linear(8, 1)
        mlp(layer(points())).sum().backward()
        assert layer.n_pending == 0 and mlp.weight.grad is not None
        layer.step()


def test_a_frozen_layer_notes_nothing(layer, field):
    assert layer.requires_grad_(False) is layer
    assert not layer(points()).requires_grad
    layer.requires_grad_()
    layer(points()).sum().backward()
    layer.step()
    assert field.updates == 1


def test_a_scaled_loss_and_a_clipped_norm(layer, field, tmp_path):
    (layer(points()).sum() * 1024).backward()
    assert layer.pending_norm() == pytest.approx(1024 * 800**0.5)
    layer.step(grad_scale=1 / 1024)
    layer(points(seed=1)).sum().backward()
    layer.step(grad_scale=min(1.0, 0.5 / layer.pending_norm()))
    with new_field(tmp_path / "other") as other:
        grad = np.ones((100, 8), np.float32)
        other.update(points(), grad)
        other.update(points(seed=1), grad * np.float32(0.5 / 800**0.5))
        assert other.digest() == field.digest()


def test_torch_compile_leaves_the_layer_as_it_is(layer, field, tmp_path):
    net = torch.nn.Sequential(layer, torch.nn.Linear(8, 1))
    compiled = torch.compile(net, backend="eager")
    for step in range(3):
        x = points(seed=step)
        loss = compiled(x).square().mean()
        assert loss.item() == pytest.approx(net(x).square().mean().item())
        loss.backward()
        layer.step()
    assert field.updates == 3
    field.commit()


def test_points_of_numpy_are_copied_whatever_their_strides(layer, field, tmp_path):
    x = points().numpy()
    buffer = x[::-1].copy()
    features = layer(buffer[::-1])
    assert (features.detach().numpy() == field.query(x)).all()
    buffer[:] = 0.25
    features.sum().backward()
    layer.step()
    with new_field(tmp_path / "other") as other:
        other.update(x, np.ones((100, 8), np.float32))
        assert other.digest() == field.digest()
    with pytest.raises(PointsError):
        layer(x.astype(">f4"))
    with pytest.raises(PointsError, match="sparse"):
        layer(torch.zeros((3, 2)).to_sparse())


def test_a_negative_bit_is_resolved(layer, field, tmp_path):
    x = points()
    negated = torch.complex(torch.zeros(100, 2), x).conj().imag
    assert negated.is_neg()
    with pytest.raises(PointsError, match="must be in"):
        layer(negated)
    with pytest.raises(PointsError, match="must be in"):
        field.query(negated)
    real = torch.complex(torch.zeros(100, 2), -x).conj().imag
    assert real.is_neg() and (field.query(real) == field.query(x)).all()
    field.update(x, torch.complex(torch.zeros(100, 8), torch.ones(100, 8)).conj().imag)
    features = layer(x)
    torch.complex(torch.zeros(100, 8), features).conj().abs().sum().backward()
    layer.step()
    with new_field(tmp_path / "other") as other:
        other.update(x, -np.ones((100, 8), np.float32))
        other.update(x, np.sign(other.query(x)))
        assert other.digest() == field.digest()


def test_an_update_since_is_noticed_under_the_lock(field):
    x, grad = points().numpy(), np.ones((100, 8), np.float32)
    since = field.changes
    field.update(x, grad, since=since)
    before = field.digest()
    with pytest.raises(StaleForwardError):
        field.update(x, grad, since=since)
    assert field.digest() == before and field.updates == 1


def test_what_waits_while_another_thread_steps_is_kept_or_refused(layer, field, monkeypatch):
    layer(points()).sum().backward()
    late = layer(points(seed=1))
    update = field.update

    def meanwhile(*arguments, **options):
        late.sum().backward()
        update(*arguments, **options)

    monkeypatch.setattr(field, "update", meanwhile)
    layer.step()
    assert layer.n_pending == 100
    monkeypatch.setattr(field, "update", update)
    with pytest.raises(StaleForwardError):
        layer.step()
    fresh = layer(points(seed=2))
    with pytest.raises(StaleForwardError, match="earlier pass"):
        fresh.sum().backward()
    layer.zero_grad()
    layer(points()).sum().backward()
    layer.step()
    assert field.updates == 2


def test_it_is_neither_copied_nor_pickled(layer):
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(FieldError, match="one writer"):
            attempt(layer)
        with pytest.raises(FieldError, match="one writer"):
            attempt(torch.nn.Sequential(layer)) if attempt is not copy.copy else attempt(layer)
    with pytest.raises(FieldError, match="one writer"):
        torch.save(layer, io.BytesIO())
    with pytest.raises(FieldError, match="one writer"):
        layer._replicate_for_data_parallel()


def test_a_state_says_of_which_update_the_rows_are(layer, field, tmp_path):
    layer(points()).sum().backward()
    layer.step()
    field.commit()
    file = io.BytesIO()
    torch.save(torch.nn.Sequential(layer).state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    torch.nn.Sequential(layer).load_state_dict(state)
    layer(points()).sum().backward()
    layer.step()
    with pytest.raises(FieldFormatError, match=r"update 1 .* update 2"):
        torch.nn.Sequential(layer).load_state_dict(state)
    field.abort()
    torch.nn.Sequential(layer).load_state_dict(state)
    with pytest.raises(FieldFormatError, match="None"):
        layer.set_extra_state("nonsense")
    with new_field(tmp_path / "other") as other:
        other.update(points(), np.ones((100, 8), np.float32))
        assert other.updates == field.updates
        with pytest.raises(FieldFormatError, match=r"of store"):
            torch.nn.Sequential(HashGrid(other)).load_state_dict(state)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_after_a_fork_the_child_is_refused(layer):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            layer(points())
            os.write(write, b"served")
        except StoreForkedError:
            os.write(write, b"refused")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100) == b"refused"
    os.close(read)
    os.close(write)
    layer(points())


class Foreign:
    """Speaks DLPack and nothing else."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


def test_a_field_takes_and_gives_arrays_by_dlpack(field, tmp_path):
    x = points()
    plain = field.query(x.numpy())
    assert (field.query(x) == plain).all()
    assert (field.query(Foreign(x)) == plain).all()
    assert (torch.from_dlpack(field.query(x)).numpy() == plain).all()
    assert (HashGrid(field)(Foreign(x.numpy())).detach().numpy() == plain).all()
    field.update(x, torch.ones((100, 8)))
    with new_field(tmp_path / "other") as other:
        other.update(x.numpy(), np.ones((100, 8), np.float32))
        assert other.digest() == field.digest()
    for wrong in (x.requires_grad_(), torch.zeros((2, 2), dtype=torch.bfloat16), "points"):
        with pytest.raises(PointsError):
            field.query(wrong)


def test_a_step_may_have_a_learning_rate_of_its_own(layer, field, tmp_path):
    layer(points()).sum().backward()
    layer.step(learning_rate=1e-3)
    with new_field(tmp_path / "other") as other:
        other.update(points(), np.ones((100, 8), np.float32), learning_rate=1e-3)
        assert other.digest() == field.digest()
    layer(points()).sum().backward()
    with pytest.raises(OptimizerError, match="-1"):
        layer.step(learning_rate=-1)
    assert layer.n_pending == 100


def test_a_table_takes_ids_by_dlpack(tmp_path):
    with dpnc.Table.create(
        tmp_path / "table", 1000, 4, budget="4MiB", optimizer=dpnc.SGD(0.5)
    ) as table:
        ids = torch.tensor([5, 999, 5])
        table.update(ids, torch.ones((3, 4)))
        rows = torch.from_dlpack(table.rows(ids))
        assert (rows == torch.tensor([[-1.0], [-0.5], [-1.0]]).expand(3, 4)).all()
        with pytest.raises(TableError, match="id 1 is 1000"):
            table.rows(torch.tensor([0, 1000]))
        with pytest.raises(TableError, match="list"):
            table.rows([0, 1])


def test_the_documented_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/torch.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    names = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, "docs/torch.md", "exec"), names)
    printed = capsys.readouterr().out
    size = re.search(r"^(\d+) MiB$", printed, re.MULTILINE)
    assert f"The field has {size[1]} MiB" in text and int(size[1]) > 4
    error = float(re.search(r"mean error (\S+),", printed)[1])
    assert error < 0.01
