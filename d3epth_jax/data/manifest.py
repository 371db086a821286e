"""What `d3epth data build` leaves beside its shards: which samples lie where, and checksums.

A set is a folder of TFDS: features.json, dataset_info.json and, for each split, its shards and a
manifest. A build works in a hidden folder there, and writes manifest and dataset_info.json last.
"""

import hashlib
import json
import os
from pathlib import Path

FORMAT = 2
AGAIN = "run the same `d3epth data build` again: it keeps the shards that are whole"


def manifest_file(folder: Path, split: str) -> Path:
    return folder / f"manifest-{split}.json"


def work_folder(folder: Path, split: str) -> Path:
    """Where an unfinished build of the split keeps its books."""
    return folder / f".build-{split}"


def shard_file(dataset: str, split: str, number: int, count: int) -> str:
    """The name that TFDS gives a shard."""
    return f"{dataset}-{split}.array_record-{number:05d}-of-{count:05d}"


def read_json(path: Path):
    """The content of a JSON file, None if there is no such file; ValueError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def write_json(path: Path, content, work: Path) -> None:
    """Atomic, by way of the folder `work`; the same content gives the same bytes."""
    partial = work / f"{path.name}.{os.getpid()}.partial"
    partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_manifests(folder: Path) -> dict[str, dict]:
    """{split: manifest} of every finished split; empty if the set was not built by us."""
    manifests = {}
    for path in sorted(folder.glob("manifest-*.json")):
        manifest = read_json(path)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ValueError(
                f"{path}: not a manifest of `d3epth data build`, or of another version"
            )
        manifests[manifest["plan"]["split"]] = manifest
    return manifests


def started(folder: Path) -> list[str]:
    """Splits whose build was started; without dataset_info.json, or not in it, not finished."""
    return sorted(path.name.removeprefix(".build-") for path in folder.glob(".build-*"))


def damage(folder: Path, shards: dict[str, dict], *, checksums: bool) -> list[str]:
    """What is wrong with {shard file: its entry}: missing, of another size or (slow) content."""
    problems = []
    for name, entry in shards.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing; {AGAIN}")
        elif (size := path.stat().st_size) != entry["bytes"]:
            problems.append(f"{path}: {size} bytes instead of {entry['bytes']}; {AGAIN}")
        elif checksums and sha256(path) != entry["sha256"]:
            problems.append(f"{path}: damaged: another checksum than its manifest's; {AGAIN}")
    return problems


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
