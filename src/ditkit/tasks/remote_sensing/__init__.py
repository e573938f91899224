"""Satellite series: the task, its four jobs, recipes, scores and figures."""

from ditkit.tasks.remote_sensing.task import RemoteSensingTask as RemoteSensingTask
