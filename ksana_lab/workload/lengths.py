"""How many tokens prompts and answers have: distributions over positive integers. Knows nothing of the tokens themselves.

A plain integer means a fixed length. ``sample`` takes its randomness from outside, so the same generator gives the same lengths."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Fixed(_Frozen):
    kind: Literal["fixed"] = "fixed"
    tokens: int = Field(ge=1)

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """[count] int64."""
        return np.full(count, self.tokens, dtype=np.int64)


class Uniform(_Frozen):
    """Every length from ``low`` to ``high``, both included, equally likely."""

    kind: Literal["uniform"] = "uniform"
    low: int = Field(ge=1)
    high: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """[count] int64."""
        return rng.integers(self.low, self.high, size=count, endpoint=True)


class LogNormal(_Frozen):
    """exp(N(ln median, sigma)), rounded, at least 1: the heavy right tail that real prompts have."""

    kind: Literal["lognormal"] = "lognormal"
    median: float = Field(ge=1)
    sigma: float = Field(gt=0, le=5)

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """[count] int64."""
        values = np.exp(rng.normal(np.log(self.median), self.sigma, size=count))
        return np.maximum(1, np.rint(values)).astype(np.int64)


class Empirical(_Frozen):
    """Drawn with replacement from observed lengths; ``weights`` (any positive scale) or all equally likely."""

    kind: Literal["empirical"] = "empirical"
    tokens: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None

    @model_validator(mode="after")
    def _weighted(self) -> Empirical:
        if self.weights is not None and (len(self.weights) != len(self.tokens) or sum(self.weights) <= 0):
            raise ValueError(f"weights must be one per length ({len(self.tokens)}), not all zero")
        return self

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """[count] int64."""
        p = None if self.weights is None else np.asarray(self.weights) / sum(self.weights)
        return rng.choice(np.asarray(self.tokens, dtype=np.int64), size=count, p=p)


def _fixed_if_int(value: Any) -> Any:
    return {"kind": "fixed", "tokens": value} if isinstance(value, int) and not isinstance(value, bool) else value


_ByKind = Annotated[Fixed | Uniform | LogNormal | Empirical, Field(discriminator="kind")]
Lengths = Annotated[_ByKind, BeforeValidator(_fixed_if_int)]
