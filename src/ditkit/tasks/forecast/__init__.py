"""Forecasts: the task, recipes, scores and figures."""

from ditkit.tasks.forecast.task import ForecastTask as ForecastTask
