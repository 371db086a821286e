"""Photographs and the bundled models' depth: `python -m tests.photo_sheet SHEET.png PHOTO...`."""

import argparse
import pathlib

import numpy as np
from PIL import Image

from d3epth_jax import DepthPipeline, gallery, image

MODELS = {"D3-nano": "nano", "D2-nano, its teacher": "nano-teacher"}


def main(out: str, photos: list[str]) -> None:
    """A row for each photograph, with each model's depth: red is near, blue is far."""
    pipes = [DepthPipeline.from_pretrained(name) for name in MODELS.values()]

    def row(picture):
        maps = [pipe(picture).far[0] for pipe in pipes]
        return [picture] + [gallery.depth_cell(d, *np.quantile(d, (0.02, 0.98))) for d in maps]

    rows = [row(image.load(photo)) for photo in photos]
    names = [pathlib.Path(photo).stem for photo in photos]
    sheet = gallery.contact_sheet(rows, ["photograph", *MODELS], names)
    Image.fromarray(sheet).save(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sheet", metavar="SHEET.png")
    parser.add_argument("photos", nargs="+", metavar="PHOTO")
    arguments = parser.parse_args()
    main(arguments.sheet, arguments.photos)
