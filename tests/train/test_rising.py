"""A loss that rises and stays up is warned of: every number of such a training is finite, and it goes on to its end."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.train.test_trainer import make_trainer
from txl_train.callbacks import LogProgress
from txl_train.records import RunRecord
from txl_train.rising import RisingLoss


def warnings_of(losses: list[float]) -> list[int]:
    rising = RisingLoss()
    return [number for number, loss in enumerate(losses, start=1) if rising.add(number, loss)]


def test_a_loss_that_rises_and_stays_is_told_once() -> None:
    assert warnings_of([11.0, 6.0, 4.9, 7.5, 7.5, 7.4, 7.3]) == [5]


def test_a_falling_loss_one_hard_passage_and_small_waves_are_no_rise() -> None:
    assert warnings_of([11.0, 6.0, 4.9, 6.5, 4.8, 5.6, 5.7, 5.75, 4.5]) == []


def test_a_second_rise_is_told_too() -> None:
    assert warnings_of([5.0, 7.0, 7.0, 4.0, 6.0, 6.0]) == [3, 6]


def test_the_warning_says_from_where_it_rose_and_what_to_do() -> None:
    rising = RisingLoss()
    told = [rising.add(10 * number, loss) for number, loss in enumerate([5.0, 4.0, 6.0, 7.25], start=1)]
    assert told[:3] == [None, None, None]
    assert told[3] is not None
    assert "from 4.00 nats at step 20 to 7.25 at step 40" in told[3]
    assert "`--lr`" in told[3]
    assert "`--compile`" in told[3]


def test_training_whose_weights_are_blown_up_is_told_in_its_log(caplog: pytest.LogCaptureFixture) -> None:
    log = LogProgress(RunRecord(None, append=False), 5, char=False)
    trainer = make_trainer(max_step=30)
    with caplog.at_level(logging.WARNING):
        for _ in range(15):
            log.after_step(trainer, trainer.step())
        assert caplog.records == []
        with torch.no_grad():
            for parameter in trainer.model.head.parameters():
                parameter.mul_(100)
        for _ in range(15):
            log.after_step(trainer, trainer.step())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "training is unstable" in caplog.text
