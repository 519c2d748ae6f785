"""Self-distillation in closed form: kernel ridge regression refitted to itself any number of times (2102.13088, exact mode)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, ValidationError, WrapValidator, field_validator
from torch import Tensor

from limbeck.contract import Frozen, validated
from limbeck.errors import InputError
from limbeck.losses.kernel_ridge import (
    Kernel,
    Schedule,
    apply_kernel,
    constant_filter,
    effective_ridge,
    factorise,
    greedy_schedule,
    mixture_weights,
    rbf,
    solve,
    spectral_filters,
)


def _explained(value: Any, handler: Any) -> Any:
    try:
        return handler(value)
    except ValidationError as error:
        raise ValueError("alpha is a number in [0, 1], a list of such numbers for rounds 2, 3, …, or 'estimate'") from error


_Weight = Annotated[float, Field(ge=0, le=1)]
Alpha = Annotated[_Weight | Annotated[tuple[_Weight, ...], Field(min_length=1)] | Literal["estimate"], WrapValidator(_explained)]
"""α, the weight of the GROUND TRUTH from round 2 on: constant, one a round, or estimated on validation data (eq. 7-8)."""


class RidgeConfig(Frozen):
    """Knobs of `SelfDistilledRidge`."""

    ridge: tuple[float, ...] = Field(min_length=1, description="λ > 0; of several, the one whose plain fit is best on the validation pairs (eq. 1)")
    alpha: Alpha = Field(0.35, description="α, the weight of the ground truth; the notebook's toy: 0, 0.25, 0.35 (eq. 1, 7)")
    rounds: int = Field(10, ge=2, le=10_000, description="rounds for which 'estimate' finds a weight; later ones keep the last (ours)")
    clip: bool = Field(True, description="keep estimated weights within [0, 1] (eq. 7)")
    per_output: bool = Field(False, description="'estimate': one weight an output instead of one for all (eq. 7)")

    @field_validator("ridge")
    @classmethod
    def _positive(cls, ridge: tuple[float, ...]) -> tuple[float, ...]:
        if min(ridge) <= 0:
            raise ValueError("the ridge must be above 0")
        return ridge


class SelfDistilledRidge:
    """Kernel ridge regression distilled into itself any number of times, ∞ included, from one factorisation of K.

        model = SelfDistilledRidge(rbf(80.0), ridge=0.2, alpha=0.35).fit(X, Y)
        model.predict(x, rounds=6), model.predict(x, rounds=math.inf), model.report(rounds=6)

    Args:
        kernel: [M, D], [N, D] → [M, N], such as `rbf(gamma)`.
        ridge: λ > 0 of the problem that sums over points; several are tried on the validation pairs.
        alpha, rounds, clip, per_output: see `RidgeConfig`. Round 1 is the plain fit. After the end of a schedule its last weight is kept.

    Raises:
        InputError: a knob is wrong.
    """

    def __init__(
        self,
        kernel: Kernel,
        *,
        ridge: float | Sequence[float],
        alpha: float | Sequence[float] | Literal["estimate"] = 0.35,
        rounds: int = 10,
        clip: bool = True,
        per_output: bool = False,
    ) -> None:
        ridges = (ridge,) if isinstance(ridge, int | float) else tuple(ridge)
        knobs = {"ridge": ridges, "alpha": alpha, "rounds": rounds, "clip": clip, "per_output": per_output}
        self.kernel, self.config = kernel, validated(RidgeConfig, knobs)

    def fit(self, X: Tensor, Y: Tensor, validation: tuple[Tensor, Tensor] | None = None) -> Self:
        """Factorise K, choose λ and α where they were left open; returns itself.

        Args:
            X: [N, D] or [N]. Y: [N] or [N, C]. validation: held-out (X, Y) of the same form.

        Raises:
            InputError: no validation pairs to choose by, lengths that differ, or a kernel matrix that is none.
        """
        config = self.config
        self._X, self._Y, self._flat = _points(X), _columns(Y), torch.as_tensor(Y).ndim == 1
        if len(self._X) != len(self._Y):
            raise InputError(f"{len(self._X)} inputs and {len(self._Y)} targets.", where="Y", fix="Give one target an input.")
        if validation is None and (config.alpha == "estimate" or len(config.ridge) > 1):
            raise InputError("choosing λ or α needs held-out pairs.", where="validation", fix="Pass validation=(X, Y).")
        self._factor = factorise(self.kernel(self._X, self._X))
        self._held_out = None if validation is None else (self.kernel(_points(validation[0]), self._X).double(), _columns(validation[1]))
        self.ridge = min(config.ridge, key=self._plain_error) if len(config.ridge) > 1 else config.ridge[0]
        self.schedule: Schedule | None = None
        if config.alpha == "estimate":
            assert self._held_out is not None
            k_MN, Y_MC = self._held_out
            self.schedule = greedy_schedule(
                self._factor, self._Y, k_MN, Y_MC, self.ridge, config.rounds, clip=config.clip, per_output=config.per_output
            )  # fmt: skip
            self.alphas = self.schedule.alphas
        else:
            self.alphas = torch.as_tensor(config.alpha, dtype=torch.float64, device=self._Y.device).reshape(-1)
        return self

    def predict(self, X: Tensor, rounds: float = math.inf) -> Tensor:
        """f_t at new points after t = `rounds` rounds (1 is the plain fit, `math.inf` the limit): float64, [M] or [M, C] as Y was.

        Raises:
            InputError: t is neither a whole number ≥ 1 nor ∞; or the weight to be kept beyond the schedule's end is outside [0, 1].
        """
        values_MC = self.kernel(_points(X), self._X).double() @ self._duals(rounds)
        return values_MC[:, 0] if self._flat else values_MC

    def report(self, rounds: int = 10) -> dict[str, Any]:
        """What t = 1 … `rounds` and t = ∞ amount to, as JSON values.

        ridge λ; alphas used in rounds 2 … ; limit_ridge λ/α (None for α = 0); mixture_weights of the pure chains in the last round (eq. 4);
        rounds: for each t the spectral filter B_t by falling eigenvalue (eq. 6), degrees of freedom tr B_t, training and validation MSE.
        """
        used = [self._weight(t).squeeze(0) for t in range(2, rounds + 1)]
        alphas = torch.stack(used) if used else torch.zeros(0, 1, dtype=torch.float64)
        last = self._weight(math.inf).flatten().tolist()
        limits = [None if alpha == 0 else effective_ridge(self.ridge, alpha) for alpha in last]
        return {
            "ridge": self.ridge,
            "alphas": _listed(alphas),
            "alphas_unclipped": None if self.schedule is None else self.schedule.unclipped.tolist(),
            "degenerate": None if self.schedule is None else self.schedule.degenerate.tolist(),
            "limit_ridge": limits[0] if len(limits) == 1 else limits,
            "mixture_weights": _listed(mixture_weights(alphas)),
            "rounds": [self._round(t) for t in (*range(1, rounds + 1), math.inf)],
        }

    def _round(self, t: float) -> dict[str, Any]:
        filter_NC, duals_NC = self._filter(t), self._duals(t)
        fit = (apply_kernel(self._factor, duals_NC) - self._Y).square().mean()
        held_out = None if self._held_out is None else float((self._held_out[0] @ duals_NC - self._held_out[1]).square().mean())
        freedom = filter_NC.sum(0).tolist()
        return {
            "round": "limit" if math.isinf(t) else t,
            "filter": _listed(filter_NC),
            "degrees_of_freedom": freedom[0] if len(freedom) == 1 else freedom,
            "training_error": float(fit),
            "validation_error": held_out,
        }

    def _weight(self, t: float) -> Tensor:
        """α_t for t ≥ 2, [1, 1] or [1, C]."""
        alphas = self.alphas.reshape(len(self.alphas), -1)
        return alphas[int(min(t - 2, len(alphas) - 1))][None]

    def _filter(self, t: float) -> Tensor:
        """Diagonal of B_t, [N, 1] or [N, C]: eq. 6 along the schedule, then eq. 3 or 5 with its last weight."""
        alphas = self.alphas.reshape(len(self.alphas), -1)
        scheduled = int(min(t - 1, len(alphas)))
        reached = spectral_filters(self._factor.values, alphas[:scheduled], self.ridge)[-1]
        if t - 1 == scheduled:
            return reached
        if not ((alphas[-1] >= 0) & (alphas[-1] <= 1)).all():
            what = f"the schedule ends after round {len(alphas) + 1} with a weight outside [0, 1]."
            raise InputError(what, where="rounds", fix="Ask for fewer rounds, or clip the weights.")
        return constant_filter(self._factor.values[:, None], alphas[-1:], self.ridge, t - 1 - scheduled, reached)

    def _duals(self, t: float) -> Tensor:
        """Dual coefficients of f_t, [N, C]: (K + λI)⁻¹ Z_t, in the eigenbasis."""
        if not (t >= 1 and (math.isinf(t) or t == int(t))):
            raise InputError(f"rounds is a whole number from 1, or math.inf, not {t}.", where="rounds")
        projected_NC = self._factor.vectors.T @ self._Y
        if t > 1:
            alpha = self._weight(t)
            projected_NC = (alpha + (1 - alpha) * self._filter(t - 1)) * projected_NC  # Vᵀ Z_t
        return self._factor.vectors @ (projected_NC / (self._factor.values + self.ridge)[:, None])

    def _plain_error(self, ridge: float) -> float:
        assert self._held_out is not None
        k_MN, Y_MC = self._held_out
        return float((k_MN @ solve(self._factor, self._Y, ridge) - Y_MC).square().mean())


def _points(X: Tensor) -> Tensor:
    X = torch.as_tensor(X).double()
    return X[:, None] if X.ndim == 1 else X


def _columns(Y: Tensor) -> Tensor:
    Y = torch.as_tensor(Y).double()
    return Y[:, None] if Y.ndim == 1 else Y


def _listed(values_NC: Tensor) -> list[Any]:
    """[N, 1] to N numbers, [N, C] to N lists."""
    return (values_NC[:, 0] if values_NC.shape[1] == 1 else values_NC).tolist()


__all__ = ["Alpha", "RidgeConfig", "SelfDistilledRidge", "rbf"]
