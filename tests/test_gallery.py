import numpy as np
import pytest

from d3epth_jax import gallery
from d3epth_jax.image import NEUTRAL, visualize_depth

WHITE = np.array([255, 255, 255])


def colored(value, width=40, height=30):
    return np.full((height, width, 3), value, np.uint8)


def test_cells_mark_the_unknown_and_keep_their_range():
    depth = np.linspace(1, 5, 30 * 40, dtype=np.float32).reshape(30, 40, 1)
    mask = np.ones_like(depth, bool)
    mask[:10] = False
    low, high = gallery.depth_range(depth, mask)
    np.testing.assert_allclose([low, high], np.quantile(depth[mask], [0.02, 0.98]))
    cell = gallery.depth_cell(depth, low, high, mask)
    assert (cell[:10] == NEUTRAL).all() and not (cell[10:] == NEUTRAL).all(-1).any()
    expected = visualize_depth(depth, val_min=low, val_max=high)
    np.testing.assert_array_equal(cell[10:], expected[10:])
    assert gallery.depth_range(depth, mask & False) == (0.0, 1.0)
    low, high = gallery.depth_range(np.ones_like(depth), mask)
    assert high > low  # a plane still has a range


def test_error_cell_is_relative_and_fixed():
    depth = np.array([2.0, 2.0, 2.0, 0.0, 4.0]).reshape(1, 5, 1)
    prediction = np.array([2.0, 2.3, 9.0, 5.0, np.nan]).reshape(1, 5, 1)
    cell = gallery.error_cell(prediction, depth, depth > 0, max_error=0.3)
    ends = np.array([0, 0.5, 1, np.nan, np.nan]).reshape(1, 5, 1)
    np.testing.assert_array_equal(cell, visualize_depth(ends, color_map="OrRd"))


def test_sparse_depth_stays_visible_when_shrunk():
    depth = np.zeros((370, 1224, 1), np.float32)
    depth[180, 600] = 10
    mask = depth > 0
    row = gallery.row(colored(0, 1224, 370), depth, mask, {})
    sheet = gallery.sheet([row._replace(cells={"gt": row.cells["ground truth"]})], cell_width=240)
    body = sheet[: sheet.shape[0] - 70].astype(int)
    assert (body.max(-1) - body.min(-1)).max() > 60  # a coloured pixel amid grey, white and ink


def test_where_sparse_points_overlap_the_larger_error_is_shown():
    depth = np.zeros((370, 1224, 1), np.float32)
    depth[180, 600:602] = 10
    prediction = depth.copy()
    prediction[180, 600] = 20
    alone = np.zeros_like(depth)
    alone[180, 600] = 10
    both, worse = (gallery.error_cell(prediction, known, known > 0) for known in (depth, alone))
    drawn = (worse != NEUTRAL).any(-1)
    assert drawn.sum() > 20
    np.testing.assert_array_equal(both[drawn], worse[drawn])


def test_large_maps_are_thinned_without_missing_every_nth_line():
    mask = np.zeros((1200, 3000, 1), bool)
    mask[1::3] = True
    thin = gallery.thin(mask)
    assert thin.shape == (400, 1000, 1) and 0.2 < thin.mean() < 0.5
    small = np.arange(30.0).reshape(5, 6, 1)
    np.testing.assert_array_equal(gallery.thin(small), small)
    assert not np.shares_memory(gallery.thin(small), small)
    assert gallery.thin(np.zeros((1, 5999, 1))).shape[:2] == (1, 1000)


def test_galleries_keep_the_chosen_and_the_worst_images():
    depth = np.full((6, 8, 1), 2.0)
    galleries = gallery.Galleries({1, 3}, num_worst=2)
    errors = [0.5, 0.1, np.nan, 0.9, 0.2, 0.7]
    for index, error in enumerate(errors):
        arrays = colored(index, 8, 6), depth + index, depth > 0, {"ramp": depth + index}
        galleries.add(index, f"room/{index}", error, *arrays)
    assert [row.title for row in galleries._rows.values()] == ["3.0 to\n3.0 m", "5.0 to\n5.0 m"]
    titles = [row.title for _, _, row in galleries._worst]
    assert titles == [
        "AbsRel 0.900\nroom/ 3\n5.0 to\n5.0 m",
        "AbsRel 0.700\nroom/ 5\n7.0 to\n7.0 m",
    ]
    chosen, worst = galleries.sheets()
    assert chosen.dtype == worst.dtype == np.uint8
    assert gallery.Galleries(set(), 0).sheets() == (None, None)


def test_long_row_titles_make_room():
    cells = [[colored(9, 200, 20)]] * 2
    low = gallery.contact_sheet(cells, ["a"], ["one", "two"])
    high = gallery.contact_sheet(cells, ["a"], ["a\nb\nc\nd", "two"])
    assert high.shape[0] > low.shape[0] + 30


def test_rows_of_large_pictures_are_small():
    depth = np.ones((500, 3000, 1), np.float32)
    row = gallery.row(colored(7, 3000, 500), depth, depth > 0, {"ramp": depth})
    assert {cell.shape for cell in row.cells.values()} == {(40, 240, 3)}


def test_contact_sheet_is_a_grid():
    colors = [[(250, 0, 0), (0, 250, 0)], [(0, 0, 250), None], [(9, 9, 99), (99, 9, 9)]]
    rows = [[None if c is None else colored(c) for c in row] for row in colors]
    sheet = gallery.contact_sheet(rows, ["one", "two"], ["a", "b", "c"], cell_width=80)
    assert sheet.dtype == np.uint8
    places = {}
    for i, row in enumerate(colors):
        for j, color in enumerate(row):
            if color is not None:
                y, x = np.nonzero((sheet == color).all(-1))
                assert len(y) == 80 * 60  # drawn whole: nothing lies on top of it
                places[i, j] = y.min(), x.min()
    assert places[0, 0][0] == places[0, 1][0] and places[0, 0][1] == places[1, 0][1]
    assert places[0, 1][1] == places[2, 1][1]
    y, x = places[0, 0]
    assert (sheet[:y] < 100).any() and (sheet[y:, :x] < 100).any()  # titles above and beside
    y, x = places[1, 0][0], places[0, 1][1]
    assert (sheet[y : y + 60, x : x + 80] == WHITE).all()  # None leaves its place empty
    with pytest.raises(ValueError, match="do not fit"):
        gallery.contact_sheet(rows, ["one"], ["a", "b", "c"])


def test_long_titles_wrap_and_stay_in_their_column():
    title = "error: student after stage two, refined " + "x" * 80
    cells = [[colored(9)] * 2]
    plain = gallery.contact_sheet(cells, ["a", "b"], [""], cell_width=120)
    wrapped = gallery.contact_sheet(cells, [title, "b"], [""], cell_width=120)
    more = wrapped.shape[0] - plain.shape[0]
    assert more > 30 and wrapped.shape[1] == plain.shape[1]
    heading = wrapped[: more + 20]
    assert (heading[:more, 134:] == WHITE).all()  # above "b" is nothing
    assert (heading[:, :14] == WHITE).all()


def test_sheet_takes_rows_of_several_predictions():
    depth = np.linspace(1, 5, 30 * 40, dtype=np.float32).reshape(30, 40, 1)
    mask = depth > 1.5
    rows = [gallery.row(colored(80), depth, mask, {"student": depth, "ramp": depth * 1.1})] * 2
    assert list(rows[0].cells) == [
        "image",
        "ground truth",
        "student",
        "error: student",
        "ramp",
        "error: ramp",
    ]
    assert "1.6 to" in rows[0].title
    sheet = gallery.sheet(rows, cell_width=60)
    assert sheet.shape[1] >= 6 * 60 and sheet.dtype == np.uint8
    narrow = gallery.sheet([gallery.Row("", {"image": colored(80)})], cell_width=60)
    assert narrow.shape[1] > 60  # the legend is not cut
