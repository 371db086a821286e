"""The notebook's cells that ask nothing of a shell, run in order."""

import json
import pathlib

NOTEBOOK = pathlib.Path(__file__).parents[1] / "colab" / "quickstart.ipynb"


def test_the_photograph_and_the_losses_run_as_they_stand(capsys):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    plain = [s for s in sources if "!" not in s and "%" not in s and "runs/" not in s]
    assert len(plain) == 2
    names = {}
    for source in plain:
        exec(source, names)
    picture, sheet = names["picture"], names["sheet"]
    assert sheet.size == (2 * picture.width, picture.height)
    coloured = sheet.crop((picture.width, 0, *sheet.size))
    assert len(coloured.getcolors(picture.width * picture.height)) > 100  # a map, not a plane
    assert "ssi" in capsys.readouterr().out
