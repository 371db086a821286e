"""`d3epth data check` and `speed`: what is wrong is found, and named by file."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from d3epth_jax import cli, data
from d3epth_jax.data import build as building
from d3epth_jax.data import check as checking
from d3epth_jax.data.sources.files import SourceError
from d3epth_jax.image import save_png
from tests import benchmark_trees
from tests.conftest import write_pairs


@pytest.fixture
def pairs(tmp_path):
    root = tmp_path / "pairs"
    write_pairs(root / "kitchen", 4)
    write_pairs(root / "cellar", 3, height=24, width=40, seed=1)
    return root


@pytest.fixture
def check(capsys):
    """Runs the command: (exit code, standard output, standard error)."""

    def run(source, path, *more, scale=1000):
        scale = ["--set", f"depth_scale={scale}"] if source == "folder" else []
        code = cli.main(["data", "check", source, str(path), *scale, *map(str, more)])
        return code, *capsys.readouterr()

    return run


def build(pairs, out):
    source = data.make_source("folder", path=pairs, depth_scale=1000.0)
    building.build(source, out, dataset="small", origin={}, shards=2)
    return out / "small" / "1.0.0"


def test_a_sound_set_is_described_by_group(pairs, check):
    code, out, _ = check("folder", pairs)
    table = [line.strip("| ").split() for line in out.replace(" | ", " ").splitlines()]
    assert code == 0 and "problem" not in out
    assert [row[:3] for row in table[2:]] == [
        ["cellar", "3", "40x24"],
        ["kitchen", "4", "48x32"],
        ["all", "7", "40x24"],
    ]
    source = data.make_source("folder", path=pairs, depth_scale=1000.0)
    samples = [source[i] for i in range(len(source)) if source.group(i) == "kitchen"]
    known = [sample["depth"][sample["mask"]] for sample in samples]
    low, high = (f(np.quantile(k, q) for k in known) for f, q in ((min, 0.02), (max, 0.98)))
    assert table[3][3:6] == [f"{low:.3g}", "..", f"{high:.3g}"]
    share = np.mean([sample["mask"].mean() for sample in samples])
    assert table[3][-2:] == [f"{100 * share:.1f}", "%"]


def test_a_folder_is_of_millimetres_unless_told_otherwise(pairs, capsys):
    told = {}
    for name, more in {"as it is": [], "the same": ["1000"], "other": ["500"]}.items():
        settings = [x for scale in more for x in ("--set", f"depth_scale={scale}")]
        assert cli.main(["data", "check", "folder", str(pairs), *settings]) in (0, 1)
        told[name] = capsys.readouterr().out
    assert told["as it is"] == told["the same"] != told["other"]


def half_written(pairs):
    path = pairs / "kitchen" / "depth" / "001.png"
    os.truncate(path, path.stat().st_size // 2)
    return path, "unreadable"


def half_written_picture(pairs):
    path = pairs / "cellar" / "rgb" / "002.png"
    os.truncate(path, path.stat().st_size // 2)
    return path, "truncated"


def wrong_unit(pairs):
    """Metres in a file that should hold millimetres."""
    path = pairs / "cellar" / "depth" / "000.npy"
    path.with_suffix(".png").unlink()
    np.save(path, np.full((24, 40), 2500, np.float32))
    return path, "median depth 2500 m is implausible; the .npy is probably not in metres"


def another_unit(pairs):
    """Centimetres among metres: plausible by itself."""
    path = pairs / "kitchen" / "depth" / "002.npy"
    path.with_suffix(".png").unlink()
    np.save(path, np.full((32, 48), 420, np.float32))
    return path, "median depth 420 m, but"


def swapped(pairs):
    one, two = pairs / "kitchen" / "depth" / "000.png", pairs / "cellar" / "depth" / "000.png"
    other = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(other)
    return one, "40x24"


def missing(pairs):
    path = pairs / "cellar" / "depth" / "001.png"
    path.unlink()
    return path.with_suffix(""), "missing depth"


@pytest.mark.parametrize(
    "harm",
    [half_written, half_written_picture, wrong_unit, another_unit, swapped, missing],
    ids=lambda f: f.__name__,
)
def test_harm_is_found_and_named_by_file(pairs, check, caplog, harm):
    path, said = harm(pairs)
    code, out, _ = check("folder", pairs)
    assert code == 1
    assert check("folder", pairs, "--set", "on_error=skip")[:2] == (code, out)
    lines = [line for line in out.splitlines() if str(path) in line and said in line]
    assert len(lines) == 1, out
    assert said not in caplog.text  # not in a log as well
    assert "1 problem(s)" in out or (harm is swapped and "2 problem(s)" in out)
    assert "kitchen" in out  # the rest is described all the same


def test_harm_to_built_sets_is_found_and_named_by_file(pairs, check, tmp_path):
    folder = build(pairs, tmp_path / "out")
    assert check("tfds:small", tmp_path / "out")[0] == 0
    shard = folder / "small-train.array_record-00001-of-00002"
    content = bytearray(shard.read_bytes())
    content[500] ^= 1
    shard.write_bytes(content)
    code, out, _ = check("tfds:small/train", tmp_path / "out")
    assert code == 1
    assert f"{shard}: damaged: another checksum than its manifest's" in out
    assert f"{shard}, record 0: unreadable" in out and "00000-of-00002" not in out
    os.truncate(shard, 70000)
    code, _, error = check("tfds:small", tmp_path / "out")
    assert code == 2 and f"{shard}: 70000 bytes instead of" in error


def test_bytes_that_no_record_uses_are_checked_too(pairs, check, tmp_path):
    shard = build(pairs, tmp_path / "out") / "small-train.array_record-00000-of-00002"
    content = bytearray(shard.read_bytes())
    unused = max(i for i in range(len(content) - 65536) if content[i] == 0)
    content[unused] = 1
    shard.write_bytes(content)
    code, out, _ = check("tfds:small", tmp_path / "out")
    assert code == 1 and f"{shard}: damaged" in out


def test_a_wrong_unit_in_a_built_set_is_found(pairs, check, tmp_path):
    build(pairs, tmp_path / "out")
    code, out, _ = check("tfds:small", tmp_path / "out", "--set", "depth_scale=1000")
    assert code == 1 and out.count("depth_scale 1000 is probably wrong") == 7


def test_a_sources_own_least_number_of_pixels_counts(pairs, check, tmp_path):
    build(pairs, tmp_path / "out")
    code, out, _ = check("tfds:small", tmp_path / "out", "--set", "min_valid=1500")
    assert code == 1 and out.count("valid pixel(s), 1500 are needed") == 3, out
    few = np.zeros((32, 48), np.uint16)
    few[0, :3] = 2000
    save_png(pairs / "kitchen" / "depth" / "000.png", few)
    assert check("folder", pairs, "--set", "min_valid=3")[0] == 0
    assert "3 valid pixel(s), 4 are needed" in check("folder", pairs, "--set", "min_valid=4")[1]


def test_every_sample_is_decoded_once(pairs):
    source = data.make_source("folder", path=pairs, depth_scale=1000.0)
    save_png(pairs / "kitchen" / "depth" / "000.png", np.zeros((32, 48), np.uint16))
    read, decode = [], source._read
    source._read = lambda item: read.append(item.name) or decode(item)
    findings = checking.inspect_all(source)
    assert sorted(read) == sorted(finding.name for finding in findings)
    assert [f.name for f in findings if f.problems] == ["kitchen/000"]


@pytest.mark.parametrize(
    "command", [["check"], ["build", "--out", "{}/built"], ["speed", "--seconds", "0.1"]]
)
def test_a_source_without_files_is_refused(command, tmp_path, capsys):
    name, *more = (part.format(tmp_path) for part in command)
    assert cli.main(["data", name, "procedural", str(tmp_path), *more]) == 2
    assert "procedural makes its samples: it has no folder" in capsys.readouterr().err
    assert not (tmp_path / "built").exists()


def test_a_whole_set_in_another_unit_is_found(pairs, check):
    code, out, _ = check("folder", pairs, scale=10)
    assert code == 1 and "1 problem(s)" in out
    assert f"{pairs}: depth is" in out and "is its unit right?" in out


def test_names_that_pass_the_filters_are_a_filename_list(pairs, check, tmp_path):
    save_png(pairs / "kitchen" / "rgb" / "002.png", np.full((32, 48, 3), 90, np.uint8))
    save_png(pairs / "kitchen" / "depth" / "000.png", np.full((32, 48), 2000, np.uint16))
    half_written_picture(pairs)
    filters = ["--min-range", "0.5", "--min-contrast", "10", "--max-invalid", "0.03"]
    names = tmp_path / "lists" / "good.txt"
    code, out, _ = check("folder", pairs, *filters, "--write-list", names)
    assert code == 1 and "4 of 6 samples without problems pass the filters" in out
    shutil.rmtree(pairs / "cellar" / "rgb", ignore_errors=False)
    kept = names.read_text().split()
    assert kept == ["cellar/000", "cellar/001", "kitchen/001", "kitchen/003"]


def test_a_written_list_narrows_its_source(pairs, check, tmp_path):
    check("folder", pairs, "--min-range", "4", "--write-list", tmp_path / "l.txt")
    kept = (tmp_path / "l.txt").read_text().split()
    listed = data.make_source(
        "folder", path=pairs, depth_scale=1000.0, filename_list=str(tmp_path / "l.txt")
    )
    assert 0 < len(kept) < 7 and [listed.name(i) for i in range(len(listed))] == kept


def test_a_written_list_leaves_out_what_is_in_another_unit(pairs, check, tmp_path):
    another_unit(pairs)
    code, out, _ = check("folder", pairs, "--max-invalid", "1", "--write-list", tmp_path / "l.txt")
    kept = (tmp_path / "l.txt").read_text().split()
    assert code == 1 and "median depth 420 m, but" in out and "6 of 6 samples" in out
    assert len(kept) == 6 and "kitchen/002" not in kept


def test_a_list_of_one_split_is_all_of_it(pairs, check, tmp_path):
    check("folder", pairs, "--set", "split=train", "--write-list", tmp_path / "l.txt")
    kept = (tmp_path / "l.txt").read_text().split()
    settings = {"path": pairs, "depth_scale": 1000.0, "filename_list": str(tmp_path / "l.txt")}
    listed = data.make_source("folder", split="train", **settings)
    assert len(kept) == 6 and [listed.name(i) for i in range(len(listed))] == kept
    with pytest.raises(SourceError, match="names no pair of split 'validation'"):
        data.make_source("folder", split="validation", **settings)


def test_the_sheet_shows_pictures_beside_depth(pairs, check, tmp_path):
    code, out, _ = check("folder", pairs, "--out", tmp_path / "sheet.png")
    assert code == 0 and "contact sheet" in out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 480 and sheet.height > 7 * 100


@pytest.mark.parametrize(
    "name", sorted(set(benchmark_trees.NAMES) - {"kitti"})
)  # of small pictures
def test_every_benchmark_is_drawn(name, check, tmp_path):
    for sample in benchmark_trees.NAMES[name]:
        picture, depth = benchmark_trees.gradient(), benchmark_trees.plane()
        getattr(benchmark_trees, f"write_{name}")(tmp_path / "set", sample, depth, picture)
    _, out, err = check(name, tmp_path / "set", "--out", tmp_path / "sheet.png")
    assert "contact sheet" in out, err
    assert Image.open(tmp_path / "sheet.png").height > 2 * 12


@pytest.mark.parametrize("option", ["--out", "--write-list"])
def test_what_cannot_be_written_is_told_before_the_set_is_read(
    option, pairs, check, tmp_path, monkeypatch
):
    monkeypatch.setattr(checking, "inspect_all", lambda *_: pytest.fail("it was read"))
    (tmp_path / "file").write_text("")
    for path, told in ((tmp_path / "file/x.txt", "cannot be made"), (tmp_path, "is a folder")):
        code, _, err = check("folder", pairs, option, path)
        assert code == 2 and told in err


def test_problems_are_listed_before_files_are_written(pairs, check, tmp_path, monkeypatch):
    path, said = missing(pairs)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("d3epth_jax.image.save_png", full)
    code, out, err = check("folder", pairs, "--out", tmp_path / "sheet.png")
    assert code == 2 and str(path) in out and said in out and "No space" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("folder", "{}/nowhere"), "no such folder"),
        (("foldr", "{}"), "unknown data source 'foldr'"),
        (("folder", "{}", "--set", "depthscale=1"), "did you mean depth_scale?"),
        (("folder", "{}", "--set", "depth_scale"), "write KEY=VALUE"),
        (("folder", "{}", "--set", "depth_scale=-1"), "must be a positive number"),
        (("folder", "{}", "--set", "split=test"), "split must be 'train'"),
        (("folder", "{}", "--set", "min_valid=few"), "a value of the wrong type"),
        (("folder", "{}", "--set", "split=train", "--set", "holdout_sources=attic"), "['attic']"),
    ],
)
@pytest.mark.parametrize("job", ["check", "build"])
def test_senseless_arguments_are_refused(pairs, tmp_path, capsys, job, arguments, said):
    command = [argument.format(pairs) for argument in arguments]
    out = ["--out", str(tmp_path / "out"), *["--split", "train"] * (job == "build")]
    assert cli.main(["data", job, *command, *out]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("check", "--max-invalid 3", "--max-invalid: must be in 0..1, not 3"),
        ("check", "--max-invalid nan", "must be in 0..1, not nan"),
        ("check", "--min-contrast -1", "must be in 0..255, not -1"),
        ("check", "--min-range inf", "must be at least 0, not inf"),
        ("check", "--min-range wide", "invalid number value: 'wide'"),
        ("build", "--height 0 --width 0", "--height: must be at least 1, not 0"),
        ("build", "--shards 0", "must be at least 1, not 0"),
        ("speed", "--seconds -1", "--seconds: must be at least 0.1, not -1"),
        ("speed", "--height -1 --width 5", "--height: must be at least 1, not -1"),
    ],
)
def test_arguments_out_of_range_are_refused(pairs, tmp_path, capsys, command, arguments, said):
    out = ["--out", str(tmp_path / "out")] if command == "build" else []
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", command, "folder", str(pairs), *out, *arguments.split()])
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_speed_is_told_per_core(pairs, capsys):
    command = ["data", "speed", "folder", str(pairs), "--set", "depth_scale=1000"]
    assert cli.main([*command, "--height", "16", "--width", "24", "--seconds", "0.2"]) == 0
    out = capsys.readouterr().out
    rate, sixteen = float(out.split()[0]), float(out.split()[-2])
    assert rate > 1 and abs(sixteen / rate - 16) < 0.5
