"""Trend, season and residual of series by STL (Cleveland et al. 1990), which statsmodels computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, DataError
from ditkit.data.calendar import MONTH, Step

MONTHS, DAYS = 12, 7


def period_of(step: Step, given: int = 0) -> int:
    """Return the steps of the cycle that a series is taken to have: a day's; of days a week's; of months a year's.

    Args:
        given: steps that somebody says, 0 for none.

    Raises:
        ConfigError: the step has no such cycle, and none is given.
    """
    if given:
        return given
    found = step.per_day
    if step.unit == MONTH and step.count < MONTHS and MONTHS % step.count == 0:
        found = MONTHS // step.count
    elif (step.count, step.unit) == (1, "day"):
        found = DAYS
    if not found:
        raise ConfigError(
            f"a value every {step} has no cycle of a day, a week or a year; expected a period, got none"
        )
    return found


def check_stl(steps: int, period: int) -> Any:
    """Return statsmodels' STL, which can smooth series of so many steps.

    Raises:
        DataError: there are fewer than two periods. ConfigError: statsmodels is not installed.
    """
    try:
        from statsmodels.tsa.seasonal import STL
    except ImportError as error:
        raise ConfigError("components of series need statsmodels: pip install 'ditkit[series]'") from error
    if steps < 2 * period:
        raise DataError(f"{steps} steps are less than two periods of {period}, which STL needs")
    return STL


def stl(series: Tensor, period: int) -> Tensor:
    """Components of series [N, S], N steps of S series: trend, season and residual, float32 [N, 3, S].

    They are smoothed over the whole of what is given, with statsmodels' own widths.

    Raises:
        DataError: there are fewer than two periods. ConfigError: statsmodels is not installed.
    """
    smoother = check_stl(len(series), period)
    parts = []
    for column in series.double().numpy().T:
        found = smoother(column, period=period).fit()
        parts.append([torch.from_numpy(x.copy()) for x in (found.trend, found.seasonal, found.resid)])
    return torch.stack([torch.stack(own) for own in parts], -1).transpose(0, 1).float()
