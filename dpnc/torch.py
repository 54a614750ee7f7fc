"""A torch module over a field: its features in an ordinary training loop.

Needs the extra ``torch``; nothing else of dpnc imports it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch.autograd.function import once_differentiable

from dpnc.errors import FieldError, FieldFormatError, PointsError, StaleForwardError
from dpnc.field import Field

DTYPES = (torch.float32, torch.float64)


class HashGrid(torch.nn.Module):
    """The features of a field as a layer, trained by `step`.

    The rows are not parameters of the module: they lie in the pages of the field's store, most of
    them on disk, and only those that a batch touches are ever in memory. So `parameters` is empty,
    a torch optimiser never sees them, and `step` takes the step of the field's own optimiser, on
    the rows that were touched::

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
        Open, and closed by whoever opened it. `commit` and `abort` are the field's, too.

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
    are not computed. A `state_dict` holds no rows, only of which update they are: commit the field
    when you save one. A module can be neither copied nor pickled, because a field has one writer;
    another process opens the field ``read_only``. After a fork the child's calls raise
    `tiers.errors.StoreForkedError`.
    """

    field: Field

    def __init__(self, field: Field) -> None:
        if not isinstance(field, Field):
            raise FieldError(f"field must be a dpnc.Field, not {type(field).__name__}")
        super().__init__()
        self.field = field
        # What lets backward run though no input asks for a gradient.
        self._anchor = torch.empty(0, requires_grad=True)
        self._pending: list[tuple[npt.NDArray[Any], npt.NDArray[np.float32]]] = []
        self._pending_changes = 0
        self._pending_level = 0

    @property
    def n_input_dims(self) -> int:
        return self.field.encoding.n_dims

    @property
    def n_output_dims(self) -> int:
        return self.field.encoding.n_output_dims

    @property
    def n_pending(self) -> int:
        return sum(len(x) for x, _ in self._pending)

    def forward(self, x: torch.Tensor, max_level: int | None = None) -> torch.Tensor:
        """Return the features of points.

        Parameters
        ----------
        x : float32 or float64 (n, n_input_dims)
            In [0, 1]. A tensor, or an array that speaks DLPack.
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
            if not hasattr(x, "__dlpack__"):
                raise PointsError(f"points must be a tensor, not {type(x).__name__}")
            x = torch.from_dlpack(x)
        if x.dtype not in DTYPES:
            raise PointsError(f"points must be float32 or float64, not {x.dtype}")
        if x.requires_grad and torch.is_grad_enabled():
            raise PointsError("a field gives no gradient by its points; detach() them")
        features: torch.Tensor = _Lookup.apply(self._anchor, x, self, max_level)
        return features

    def step(self, learning_rate: float | None = None) -> None:
        """Take one step of the field's optimiser with the gradients since the last one.

        Without any, nothing happens. Not durable before the field's `commit`.

        Parameters
        ----------
        learning_rate : float, optional
            Of this step, in place of the optimiser's; ``scheduler.get_last_lr()[0]``, say.

        Raises
        ------
        StaleForwardError
            If rows have changed since the forward pass. `zero_grad` forgets the gradients.
        PointsError
            If a gradient is not finite. Nothing has changed, and it still waits: `zero_grad`
            forgets it.
        OptimizerError, tiers.errors.TierError
            As `dpnc.Field.update` raises them.
        """
        if not self._pending:
            return
        self._require_unchanged(self._pending_changes)
        x = np.concatenate([x for x, _ in self._pending])
        grad = np.concatenate([grad for _, grad in self._pending])
        self.field.update(x, grad, max_level=self._pending_level, learning_rate=learning_rate)
        self._forget()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients that wait for `step`."""
        super().zero_grad(set_to_none)
        self._forget()

    def _forget(self) -> None:
        self._pending.clear()
        self._pending_level = 0

    def extra_repr(self) -> str:
        return f"{self.n_input_dims}, {self.n_output_dims}, field={self.field!r}"

    # Saving

    def get_extra_state(self) -> dict[str, Any]:
        """Return what `state_dict` holds: of which update the rows are, and where they lie."""
        return {"path": str(self.field.store.path), "updates": self.field.updates}

    def set_extra_state(self, state: Any) -> None:
        """Check that the field's rows are those that a `state_dict` was saved beside.

        Raises
        ------
        FieldFormatError
            If they are of another update.
        """
        updates = state.get("updates") if isinstance(state, dict) else None
        if updates != self.field.updates:
            raise FieldFormatError(
                f"the state was saved beside update {updates!r} of a field, and "
                f"{self.field.store.path} is at update {self.field.updates}; commit a field when "
                "its state is saved, and open it at that commit"
            )

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._refuse_copy()

    def __copy__(self) -> NoReturn:
        self._refuse_copy()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse_copy()

    def _refuse_copy(self) -> NoReturn:
        raise FieldError(
            f"a HashGrid is neither copied nor pickled: {self.field.store.path} has one writer. "
            "Open it with read_only=True where it is needed, or save state_dict() and commit"
        )

    # Inside

    def _require_unchanged(self, changes: int) -> None:
        if self.field.changes != changes:
            raise StaleForwardError(
                f"rows of {self.field.store.path} have changed since the forward pass; its "
                "gradient would be that of other rows"
            )

    def _add(
        self, x: torch.Tensor, grad: torch.Tensor, changes: int, max_level: int | None
    ) -> None:
        """Note a gradient by features that were read when the field had seen `changes`."""
        self._require_unchanged(changes)
        if self._pending:
            self._require_unchanged(self._pending_changes)
        self._pending_changes = changes
        # Copied: whoever owns the tensors may write to them before the step.
        points = np.array(x.detach().cpu().numpy())
        gradient = np.array(grad.detach().cpu().numpy(), np.float32)
        encoding = self.field.encoding
        level = encoding.n_levels - 1 if max_level is None else max_level
        # Rows whose gradient is zero take no step: levels of several passes may differ.
        gradient[:, (level + 1) * encoding.n_features_per_level :] = 0
        self._pending.append((points, gradient))
        self._pending_level = max(self._pending_level, level)


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
        features = torch.from_numpy(module.field.query(x.detach().cpu().numpy(), max_level))
        return features.to(x.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.module._add(x, grad, ctx.changes, ctx.max_level)
        return None, None, None, None
