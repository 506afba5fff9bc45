"""Tests of txl_train.data."""
