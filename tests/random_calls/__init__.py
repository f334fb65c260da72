"""The same random system calls on a mount and on a plain directory, with the same results."""
