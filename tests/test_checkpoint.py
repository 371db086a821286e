"""Checkpoints that were damaged; what they are for is in test_train."""

import jax.numpy as jnp
import pytest

from d3epth_jax import checkpoint


def test_a_damaged_array_is_told_in_a_sentence(tmp_path):
    state = {"kernel": jnp.arange(10_000.0)}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {"position": 1})
    files = [path for path in tmp_path.rglob("d/*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    told = f"the checkpoint of step 3 in {tmp_path} does not fit .* or is damaged; .*kernel"
    with (
        checkpoint.Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=told),
    ):
        checkpoints.restore(checkpoint.abstract(state))
