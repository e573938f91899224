"""Clips: the task, recipes, masks, scores and figures."""

from ditkit.tasks.video.task import VideoTask as VideoTask
