import pytest

from tests import train_speed


@pytest.mark.slow
def test_a_training_step_keeps_up_with_torchs():
    found = train_speed.main(rounds=3)
    assert found["step"]["ratio"] >= found["wanted"]
