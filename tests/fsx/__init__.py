"""Random reads and writes of a few files by every way there is, checked against their bytes in memory."""
