"""Write a run's events for TensorBoard: curves, the mistakes as images, the recipe as hyperparameters."""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..config import ImageShape, Recipe
from ..errors import reason
from ..runs.record import images_of
from .html_report import picture_of

_IMAGE_PIXELS, _CAPTION_PIXELS, _COLUMNS, _MAX_IMAGES = 56, 14, 8, 64


class TensorBoard:
    """A sink that writes into `folder`.

    `step` is the step that the run resumes from. Existing data from later steps is discarded.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, names: Sequence[str], step: int, complain: Callable[[str], None]
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra, and slow to import

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        self._recipe, self._names, self._complain = recipe, names, complain

    def log(self, event: str, **fields: Any) -> None:
        """See `Sink`. A full disk ends the record, not the run."""
        handler = getattr(self, f"_on_{event}", None)
        if handler is None or self._writer is None:
            return
        try:
            handler(**fields)
        except OSError as error:
            self._writer = None
            self._complain(f"TensorBoard's record ends here: {reason(error)}")

    def close(self) -> None:
        """See `Sink`."""
        if self._writer is not None:
            self._writer.close()

    def _on_steps(
        self,
        *,
        step: int,
        first_step: int,
        losses: list[float],
        lr: float,
        images_per_second: float,
        ranks: dict[str, list[float]],
        **_: Any,
    ) -> None:
        for i, loss in enumerate(losses):
            self._writer.add_scalar("loss/train", loss, first_step + i)
        self._writer.add_scalar("learning rate", lr, step)
        self._writer.add_scalar("images per second", images_per_second, step)
        for name, seconds in ranks.items():
            for rank, value in enumerate(seconds):
                self._writer.add_scalar(f"{name} ms/rank {rank}", 1e3 * value, step)

    def _on_evaluation(
        self,
        *,
        step: int,
        train_accuracy: float,
        **scores: Any,
    ) -> None:
        images = images_of(scores)
        self._writer.add_scalar(f"loss/{images}", scores[f"{images}_loss"], step)
        self._writer.add_scalar("accuracy/train", train_accuracy, step)
        self._writer.add_scalar(f"accuracy/{images}", scores[f"{images}_accuracy"], step)

    def _on_test(self, *, step: int, test_loss: float, test_accuracy: float, **_: Any) -> None:
        self._writer.add_scalar("loss/test", test_loss, step)
        self._writer.add_scalar("accuracy/test", test_accuracy, step)

    def _on_mistakes(
        self, *, step: int, image_shape: ImageShape, mistakes: list[dict[str, Any]], **_: Any
    ) -> None:
        if mistakes:
            sheet = contact_sheet(mistakes, image_shape, self._names)
            self._writer.add_image("mistakes", sheet, step, dataformats="HWC" if sheet.ndim == 3 else "HW")

    def _on_end(self, *, result: dict[str, Any]) -> None:
        names = ("test_accuracy", "test_loss", "validation_accuracy", "train_seconds")
        metrics = {f"end/{name}": result[name] for name in names if name in result}
        self._writer.add_hparams(self._recipe.to_dict(), metrics, run_name=".")


def contact_sheet(
    mistakes: Sequence[dict[str, Any]], shape: ImageShape, names: Sequence[str]
) -> NDArray[np.uint8]:
    """Draw up to 64 mistakes as one image, `(height, width)` or `(height, width, 3)` as they are.

    Each has its true > predicted label.
    """
    shown = mistakes[:_MAX_IMAGES]
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    width, height = columns * (_IMAGE_PIXELS + 4), rows * (_IMAGE_PIXELS + _CAPTION_PIXELS + 4)
    grey = Image.new("L", (width, height), 60)
    sheet = grey if shape[0] == 1 else grey.convert("RGB")
    draw = ImageDraw.Draw(sheet)
    for i, mistake in enumerate(shown):
        left, top = (
            i % columns * (_IMAGE_PIXELS + 4) + 2,
            i // columns * (_IMAGE_PIXELS + _CAPTION_PIXELS + 4) + 2,
        )
        picture = picture_of(base64.b64decode(mistake["image"]), shape)
        scale = _IMAGE_PIXELS / max(picture.size)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        sheet.paste(picture.resize(size, Image.Resampling.NEAREST), (left, top))
        caption = f"{names[mistake['label']][:4]} > {names[mistake['predicted']][:4]}"
        draw.text((left + 2, top + _IMAGE_PIXELS + 1), caption, fill="white")
    return np.asarray(sheet)
