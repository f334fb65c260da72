"""The tests of qsfs; `tests.support` holds what they share."""
