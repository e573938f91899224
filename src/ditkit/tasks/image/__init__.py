"""Pictures: the task, recipes of class-conditional models and of image codecs, and scores."""

from ditkit.tasks.image.task import ImageCodecTask as ImageCodecTask
from ditkit.tasks.image.task import ImageTask as ImageTask
