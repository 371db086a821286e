"""What `d3epth data check` finds: every sample of a source decoded once, and judged."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from d3epth_jax.data import manifest
from d3epth_jax.data.filters import rejection

SET_MEDIAN = (0.1, 150.0)  # metres, of all samples' medians; rooms have 2 to 4, streets 10 to 30
OUTLIER = 50.0  # times the set's median, or a fiftieth: further off than scenes are apart


@dataclass(frozen=True)
class Finding:
    """One sample; `problems` is empty if all is well, `rejected` says which filter drops it.

    `depth` is its 2, 50 and 98 % quantiles (metres); NaN, and (0, 0) as `size`, if unreadable.
    """

    name: str
    group: str
    problems: tuple[str, ...]
    size: tuple[int, int] = (0, 0)
    depth: tuple[float, float, float] = (float("nan"),) * 3
    valid: float = 0.0
    rejected: str = ""


def inspect(source, i: int, filters: Mapping[str, float]) -> Finding:
    """Sample i, decoded once."""
    name, group = source.name(i), source.group(i)
    try:
        sample = source[i]
    except (OSError, ValueError) as error:
        return Finding(name, group, tuple(str(error).splitlines()))
    known = sample["depth"][sample["mask"]]
    quantiles = np.quantile(known, (0.02, 0.5, 0.98)) if known.size else (float("nan"),) * 3
    return Finding(
        name,
        group,
        tuple(source.judge(i, sample)),
        sample["image"].shape[:2],
        tuple(float(value) for value in quantiles),
        known.size / sample["mask"].size,
        rejection(sample, **filters),
    )


def inspect_all(
    source,
    filters: Mapping[str, float] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Finding]:
    """All samples, in their order, decoded by as many threads as there are cores."""
    findings = []
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        tasks = pool.map(lambda i: inspect(source, i, filters or {}), range(len(source)))
        for finding in tasks:
            findings.append(finding)
            progress(len(findings))
    return findings


def check_units(source, findings: Sequence[Finding]) -> tuple[list[Finding], list[str]]:
    """What no sample shows by itself: a set, or a few of its files, in another unit than metres.

    Returns the findings, in which such a few are problems, and what is wrong with the set.
    """
    known = [finding.depth[1] for finding in findings if np.isfinite(finding.depth[1])]
    if not known:
        return list(findings), []
    typical = float(np.median(known))
    if not SET_MEDIAN[0] <= typical <= SET_MEDIAN[1]:
        problem = f"{source.root}: depth is {typical:g} m typically (median); is its unit right?"
        return list(findings), [problem]
    judged = []
    for i, finding in enumerate(findings):
        median = finding.depth[1]
        if not finding.problems and not 1 / OUTLIER <= median / typical <= OUTLIER:
            problem = (
                f"{source.files(i)['depth']}: {finding.name}: median depth {median:g} m, but"
                f" {typical:g} m typically in this set; is its unit right?"
            )
            finding = replace(finding, problems=(problem,))
        judged.append(finding)
    return judged, []


def damaged_shards(source) -> list[str]:
    """Shards of a set of `d3epth data build` whose checksum is not their manifest's."""
    shards = {path for i in range(len(source)) for path in source.files(i).values()}
    names = sorted(path.name for path in shards if ".array_record-" in path.name)
    if not names:
        return []
    manifests = manifest.read_manifests(source.root)
    listed = {name: entry for m in manifests.values() for name, entry in m["shards"].items()}
    entries = {name: listed[name] for name in names if name in listed}
    return manifest.damage(source.root, entries, checksums=True)
