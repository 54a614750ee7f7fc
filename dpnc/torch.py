"""A torch module over a field: its features in an ordinary training loop.

Needs the extra ``torch``; nothing else of dpnc imports it.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch.autograd.function import once_differentiable

from dpnc.errors import FieldError, FieldFormatError, PointsError, StaleForwardError
from dpnc.field import Field
from dpnc.points import checked_points

DTYPES = (torch.float32, torch.float64)


class Pass(NamedTuple):
    """One backward pass whose gradient waits for a step."""

    x: npt.NDArray[Any]
    grad: npt.NDArray[np.float32]
    max_level: int
    changes: int


class HashGrid(torch.nn.Module):
    """The features of a field as a layer, trained by `step`.

    `dpnc.HashGrid` is how a grid is laid out; this is a layer over a field of such a grid. The rows
    are not parameters of the module: they lie in the pages of the field's store, most of them on
    disk, and only those that a batch touches are ever in memory. So `parameters` is empty, a torch
    optimiser never sees them, and `step` takes the step of the field's own optimiser, on the rows
    that were touched::

        grid = dpnc.torch.HashGrid(field)
        loss = mlp(grid(x)).square().mean()
        loss.backward()                  # notes the gradient by the features
        grid.step()                      # the field's optimiser, the touched rows
        optimizer.step()                 # torch's, the parameters of `mlp`

    Several backward passes before a `step` add up, as they do in torch; `zero_grad` forgets them.
    The bits are those of `dpnc.Field.update` with the same gradients.

    Parameters
    ----------
    field : dpnc.Field
        Open, and closed by whoever opened it. `commit` and `abort` are the field's, too. One that
        is open read-only, or has no optimiser, gives features without a gradient.

    Attributes
    ----------
    field : dpnc.Field
    n_input_dims, n_output_dims : int
    n_pending : int
        Points whose gradient waits for `step`.

    Raises
    ------
    FieldError
        If `field` is none.

    Notes
    -----
    Points and features may be on any device; the lookup is the processor's. Gradients by the points
    are not computed. A `state_dict` holds no rows, only of which update of which store they are:
    commit the field when you save one. A module can be neither copied nor pickled nor replicated,
    because a field has one writer; another process opens the field ``read_only``. After a fork the
    child's calls raise `tiers.errors.StoreForkedError`. ``torch.compile`` leaves the layer as it
    is.
    """

    field: Field

    def __init__(self, field: Field) -> None:
        if not isinstance(field, Field):
            raise FieldError(f"field must be a dpnc.Field, not {type(field).__name__}")
        super().__init__()
        self.field = field
        can_step = field.optimizer is not None and not field.store.read_only
        # What lets backward run though no input asks for a gradient.
        self._anchor = torch.empty(0, requires_grad=can_step, device="cpu")
        self._guard = threading.Lock()
        self._pending: list[Pass] = []

    @property
    def n_input_dims(self) -> int:
        return self.field.encoding.n_dims

    @property
    def n_output_dims(self) -> int:
        return self.field.encoding.n_output_dims

    @property
    def n_pending(self) -> int:
        return sum(len(one.x) for one in self._pending)

    @torch.compiler.disable
    def forward(self, x: torch.Tensor, max_level: int | None = None) -> torch.Tensor:
        """Return the features of points.

        Parameters
        ----------
        x : float32 or float64 (n, n_input_dims)
            In [0, 1]. A tensor, or an array of numpy or that speaks DLPack, which is copied.
        max_level : int, optional
            The finest level that is read and trained, from 0: coarse levels first, for example.
            Features of finer ones are zero.

        Returns
        -------
        float32 (n, n_output_dims)
            On the device of `x`; the bits of `dpnc.Field.query`.

        Raises
        ------
        PointsError
            If `x` is refused, or asks for a gradient.
        FieldError
            If there is no such level.
        """
        if not isinstance(x, torch.Tensor):
            # Not by torch: it ends the process at a negative stride.
            x = torch.from_numpy(checked_points(x, self.n_input_dims).copy())
        if x.dtype not in DTYPES or x.layout != torch.strided:
            raise PointsError(f"points must be dense float32 or float64, not {x.dtype} {x.layout}")
        if x.requires_grad and torch.is_grad_enabled():
            raise PointsError("a field gives no gradient by its points; detach() them")
        features: torch.Tensor = _Lookup.apply(self._anchor, x, self, max_level)
        return features

    def step(self, learning_rate: float | None = None, grad_scale: float = 1.0) -> None:
        """Take one step of the field's optimiser with the gradients since the last one.

        Without any, nothing happens. Not durable before the field's `commit`. Points of float32 are
        widened where points of float64 wait beside them.

        Parameters
        ----------
        learning_rate : float, optional
            Of this step, in place of the optimiser's; ``scheduler.get_last_lr()[0]``, say.
        grad_scale : float
            The gradients are multiplied by it: 1 / scale after a loss that was scaled, or
            ``min(1, limit / pending_norm())`` to clip them.

        Raises
        ------
        StaleForwardError
            If rows have changed since a forward pass. `zero_grad` forgets the gradients.
        PointsError
            If a gradient is not finite. Nothing has changed, and it still waits: `zero_grad`
            forgets it.
        OptimizerError, tiers.errors.TierError
            As `dpnc.Field.update` raises them.
        """
        with self._guard:
            passes = list(self._pending)
        if not passes:
            return
        if isinstance(learning_rate, torch.Tensor):
            learning_rate = float(learning_rate)
        grad = np.concatenate([one.grad for one in passes])
        if grad_scale != 1.0:
            grad *= np.float32(grad_scale)
        self.field.update(
            np.concatenate([one.x for one in passes]),
            grad,
            max_level=max(one.max_level for one in passes),
            learning_rate=learning_rate,
            since=passes[0].changes,
        )
        with self._guard:
            # What came meanwhile, in another thread, waits on.
            self._pending = [
                one for one in self._pending if all(one is not took for took in passes)
            ]

    def pending_norm(self) -> float:
        """Return the Euclidean norm of the gradients by features that wait for `step`."""
        with self._guard:
            return float(
                np.sqrt(sum(np.square(p.grad, dtype=np.float64).sum() for p in self._pending))
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients that wait for `step`.

        Of this layer: ``zero_grad`` of a module around it, or of an optimiser, does not reach it.
        """
        super().zero_grad(set_to_none)
        with self._guard:
            self._pending = []

    def requires_grad_(self, requires_grad: bool = True) -> HashGrid:
        """Let backward passes note gradients, or not; those that wait are not touched."""
        self._anchor.requires_grad_(requires_grad)
        return self

    def extra_repr(self) -> str:
        return f"{self.n_input_dims}, {self.n_output_dims}, field={self.field!r}"

    # Saving

    def get_extra_state(self) -> dict[str, Any]:
        """Return what `state_dict` holds: of which update of which store the rows are."""
        return {"store": self.field.store.id, "updates": self.field.updates}

    def set_extra_state(self, state: Any) -> None:
        """Check that the field's rows are those that a `state_dict` was saved beside.

        Raises
        ------
        FieldFormatError
            If they are of another store or update.
        """
        saved = state if isinstance(state, dict) else {}
        if saved != self.get_extra_state():
            raise FieldFormatError(
                f"the state was saved beside update {saved.get('updates')} of store "
                f"{saved.get('store')}, and {self.field.store.path} is at update "
                f"{self.field.updates} of store {self.field.store.id}; commit a field when its "
                "state is saved, and open it at that commit"
            )

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._refuse_copy()

    def __copy__(self) -> NoReturn:
        self._refuse_copy()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse_copy()

    def _replicate_for_data_parallel(self) -> NoReturn:
        self._refuse_copy()

    def _refuse_copy(self) -> NoReturn:
        raise FieldError(
            f"a HashGrid is neither copied nor pickled: {self.field.store.path} has one writer. "
            "Open it with read_only=True where it is needed, or save state_dict() and commit"
        )

    # Inside

    def _add(self, x: torch.Tensor, grad: torch.Tensor, level: int | None, changes: int) -> None:
        """Note a gradient by features that were read when the field had seen `changes`."""
        self.field.require_unchanged(changes)
        if not len(x):
            return
        # Copied: whoever owns the tensors may write to them before the step.
        points = np.array(x.detach().resolve_neg().cpu().numpy())
        gradient = np.array(grad.detach().resolve_neg().cpu().numpy(), np.float32)
        encoding = self.field.encoding
        finest = encoding.n_levels - 1 if level is None else int(level)
        # Rows whose gradient is zero take no step: levels of several passes may differ.
        gradient[:, (finest + 1) * encoding.n_features_per_level :] = 0
        with self._guard:
            if self._pending and self._pending[0].changes != changes:
                raise StaleForwardError(
                    f"gradients of an earlier pass wait for a step, and rows of "
                    f"{self.field.store.path} have changed since; zero_grad() forgets them"
                )
            self._pending.append(Pass(points, gradient, finest, changes))


class _Lookup(torch.autograd.Function):
    """Features of points forward; backward notes their gradient with the module."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, x: torch.Tensor, module: HashGrid, max_level: int | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.module, ctx.max_level = module, max_level
        # Before the rows are read: an update meanwhile is one since.
        ctx.changes = module.field.changes
        points = x.detach().resolve_neg().cpu().numpy()
        return torch.from_numpy(module.field.query(points, max_level)).to(x.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.module._add(x, grad, ctx.max_level, ctx.changes)
        return None, None, None, None
