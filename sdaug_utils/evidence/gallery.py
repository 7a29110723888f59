"""Pools to page through: a widget in a live notebook, a sheet of images where it is only read."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from sdaug_utils.evidence import figures
from sdaug_utils.generation.pool_files import Pool

WIDGET = "application/vnd.jupyter.widget-view+json"
PER_PAGE = 10  # images of each technique
SIDE = 64  # pixels on screen, at least


class Gallery:
    """Techniques side by side: the same class, the same places in their pools' sequences."""

    def __init__(self, pools: Mapping[str, Sequence[Pool]], sheet: Figure, num_colours: int):
        self.pools, self.alt = pools, figures.described(sheet)
        self.sheet = base64.b64encode(figures.png_of(sheet, num_colours)).decode()
        every = [pool for of_classes in pools.values() for pool in of_classes]
        self.class_names = list(dict.fromkeys(pool.class_name for pool in every))
        self.num_pages = -(-max(len(pool.files) for pool in every) // PER_PAGE)

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The widget, and the sheet for programs that cannot show it."""
        widget = self.widget()._repr_mimebundle_()
        shown = {"image/png": self.sheet, "text/plain": self.alt, WIDGET: widget[WIDGET]}
        return shown, {"image/png": {"alt": self.alt}}

    def widget(self) -> Any:
        """Controls for class and page, and the images of that page."""
        import ipywidgets

        names = ipywidgets.Dropdown(options=self.class_names, description="class")
        pages = ipywidgets.IntSlider(min=1, max=self.num_pages, value=1, description="page")
        picture = ipywidgets.Image(format="png")
        text = ipywidgets.HTML()

        def turn(_: Any = None) -> None:
            picture.value = self.page(names.value, pages.value - 1)
            text.value = self.caption(names.value, pages.value - 1)

        for control in (names, pages):
            control.observe(turn, names="value")
        turn()
        return ipywidgets.VBox([ipywidgets.HBox([names, pages]), picture, text])

    def _chosen(self, class_name: str, page: int) -> list[tuple[str, Pool, range]]:
        """Each technique that has a pool of the class, the pool, and its images on the page."""
        return [
            (technique, pool, range(len(pool.files))[page * PER_PAGE : (page + 1) * PER_PAGE])
            for technique, of_classes in self.pools.items()
            for pool in of_classes
            if pool.class_name == class_name
        ]

    def page(self, class_name: str, page: int) -> bytes:
        """A row of images per technique, as a PNG file."""
        chosen = self._chosen(class_name, page)
        rows = [list(pool.images().taken(places)) for _, pool, places in chosen]
        largest = max((image.shape[0] for row in rows for image in row), default=SIDE)
        side = min(max(SIDE, largest), figures.LARGEST)
        file = io.BytesIO()
        Image.fromarray(figures.mosaic(rows, gap=2, side=side)).save(file, "PNG")
        return file.getvalue()

    def caption(self, class_name: str, page: int) -> str:
        """What the rows are, with the seeds of their images, as HTML."""
        lines = []
        for technique, pool, places in self._chosen(class_name, page):
            seeds = ", ".join(str(pool.seeds[place]) for place in places)
            shown = f"images {places[0]} to {places[-1]}, seeds {seeds}" if places else "no more"
            lines.append(f"<b>{figures.label_of(technique)}</b>: {shown}")
        return "<br>".join(lines)


def show(pools: Mapping[str, Sequence[Pool]], sheet: Figure, num_colours: int = 64) -> None:
    """Display a pool per class of some techniques: a gallery in JupyterLab, ``sheet`` elsewhere."""
    display(Gallery(pools, sheet, num_colours))
