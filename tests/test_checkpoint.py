"""Checkpoints that were damaged; what they are for is in test_train."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

from d3epth_jax import checkpoint


def test_a_damaged_array_is_told_in_a_sentence(tmp_path):
    state = {"kernel": jnp.arange(10_000.0)}
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
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


def test_a_part_of_a_state_is_read_alone_and_all_that_does_not_fit_is_told(tmp_path, monkeypatch):
    average = {"unet": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "encoder": jnp.ones(1)}
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(3, {"ema": average, "moments": (average, jnp.zeros(()))}, {})
    asked, restore = [], ocp.PyTreeCheckpointer.restore
    with monkeypatch.context() as patch:
        patch.setattr(
            ocp.PyTreeCheckpointer,
            "restore",
            lambda self, path, args: asked.append(args.item) or restore(self, path, args=args),
        )
        read = checkpoint.read_tree(tmp_path / "3/state", jax.eval_shape(lambda: average), "ema")
    assert [list(tree) for tree in asked] == [["ema"]]
    jax.tree.map(np.testing.assert_array_equal, read, average)
    other = {"unet": {"kernel": jnp.ones((2, 4)), "bias": jnp.zeros(3), "scale": jnp.zeros(3)}}
    with pytest.raises(ValueError) as error:
        checkpoint.read_tree(tmp_path / "3/state", other, "ema")
    assert str(error.value).splitlines() == [
        f"the weights in {tmp_path}/3/state do not fit the model:",
        "  missing: unet/scale",
        "  unexpected: encoder",
        "  wrong shape: unet/kernel is (2, 3), the model has (2, 4)",
    ]
    with pytest.raises(ValueError, match="not a complete checkpoint of Orbax: 'average'"):
        checkpoint.read_tree(tmp_path / "3/state", average, "average")


def test_a_save_that_failed_is_told_by_the_next_which_is_made(tmp_path, monkeypatch, caplog):
    state = {"kernel": jnp.arange(10.0)}
    errors = [ValueError("RESOURCE_EXHAUSTED: no space left on device")]
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        wait = checkpoints._manager.wait_until_finished

        def fails_once():
            wait()
            if errors:
                raise errors.pop()

        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fails_once)
        checkpoints.save(4, state, {"position": 2})
        assert "could not be written: RESOURCE_EXHAUSTED" in caplog.text
        assert "trying again with step 4" in caplog.text
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        restored, position = checkpoints.restore(checkpoint.abstract(state))
    assert checkpoints.latest == 4 and position == {"position": 2}
    assert jnp.array_equal(restored["kernel"], state["kernel"])


def test_a_disk_that_stays_full_is_told_in_a_sentence(tmp_path, monkeypatch):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: no space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    told = f"a checkpoint in {tmp_path} could not be written: RESOURCE_EXHAUSTED"
    with checkpoints, pytest.raises(OSError, match=told):
        checkpoints.save(4, {"kernel": jnp.arange(10.0)}, {})
    assert checkpoints.latest is None


def test_what_a_killed_save_left_is_deleted_by_a_writer_alone(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, {"kernel": jnp.arange(10.0)}, {})
    left = tmp_path / "2.orbax-checkpoint-tmp"
    left.mkdir()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 1
    assert left.is_dir()
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest == 1
    assert not left.exists()


def test_orbax_does_not_ask_for_the_signal_that_ends_all_processes(tmp_path, monkeypatch):
    """JAX's service keeps the last count it was asked with: `hosts.asked_to_end`'s, no other."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (3, 5):
            checkpoints.save(step, {"kernel": jnp.arange(10.0)}, {"position": 1})
    assert checkpoints.latest == 5 and not asked
